#include "llama-kv-cache-tca-iswa.h"

#include "llama-model-tca.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>

// The stock cache sizes its sliding-window part for the window and one micro-batch. Told of a longer micro-batch it also holds
// the window before any tail that the ragged cache can take back (window + group tokens at most), so that both reach as far.
// A full-size sliding-window cache (swa_full, llama.cpp's default) would serve longer tails only, and the ragged cache refuses those.
static uint32_t longest_tail(const llama_model & model, const llama_cparams & cparams) {
    const tca_budgets_data & budgets = model.tca->budgets;
    return std::min<uint64_t>((uint64_t) cparams.n_ubatch + budgets.window + budgets.group_size, cparams.n_ctx_seq);
}

static uint64_t sum(const std::map<ggml_backend_buffer_type_t, size_t> & sizes) {
    uint64_t n = 0;
    for (const auto & [_, size] : sizes) {
        n += size;
    }
    return n;
}

llama_kv_cache_tca_iswa::llama_kv_cache_tca_iswa(const llama_model & model, const llama_cparams & cparams, const llama_memory_params & params) :
        n_swa(model.hparams.n_swa), swa_full(params.swa_full),
        stock_cells(GGML_PAD(std::min(cparams.n_ctx_seq, n_swa + cparams.n_ubatch), 256)),
        iswa(model, params.type_k, params.type_v, !cparams.flash_attn, cparams.offload_kqv, /* swa_full */ false, cparams.kv_unified,
            cparams.n_ctx_seq, cparams.n_seq_max, longest_tail(model, cparams), 1, nullptr,
            [&model](int32_t il) { return model.hparams.is_swa(il); }, nullptr, nullptr),
        tca(model, cparams, params.type_k, params.type_v) {
}

llama_memory_context_ptr llama_kv_cache_tca_iswa::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool /*embd_all*/) {
    // with more streams than one the stock cache takes successive sequences only
    std::vector<llama_ubatch> ubatches;
    if (tca.split(balloc, n_ubatch, true, ubatches)) {
        auto sinfos_base = iswa.get_base()->prepare(ubatches);
        auto sinfos_swa  = iswa.get_swa() ->prepare(ubatches);
        if (!sinfos_base.empty() && !sinfos_swa.empty()) {
            auto ctx_tca = std::make_unique<llama_kv_cache_tca_context>(&tca, ubatches);
            return std::make_unique<llama_kv_cache_tca_iswa_context>(&iswa, std::move(ctx_tca), std::move(sinfos_base),
                    std::move(sinfos_swa), std::move(ubatches));
        }
    }
    return std::make_unique<llama_kv_cache_tca_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
}

llama_memory_context_ptr llama_kv_cache_tca_iswa::init_full() {
    return std::make_unique<llama_kv_cache_tca_iswa_context>(&iswa, tca.init_full());
}

llama_memory_context_ptr llama_kv_cache_tca_iswa::init_update(llama_context * lctx, bool optimize) {
    return std::make_unique<llama_kv_cache_tca_iswa_context>(&iswa, tca.init_update(lctx, optimize), lctx, optimize);
}

void llama_kv_cache_tca_iswa::clear(bool data) {
    tca.clear(data);
    iswa.clear(data);
}

// The next token, at p0, sees the n_swa - 1 tokens before it: what a saved state holds, too, for its own last token.
bool llama_kv_cache_tca_iswa::window_held(llama_seq_id seq_id, llama_pos p0) const {
    const llama_pos first = iswa.get_swa()->seq_pos_min(seq_id);
    return first <= std::max<llama_pos>(p0 - (llama_pos) n_swa + 1, tca.get_stream(seq_id).pos0);
}

llama_pos llama_kv_cache_tca_iswa::first_removable(llama_seq_id seq_id) const {
    const llama_pos begin = tca.get_stream(seq_id).pos0;
    const llama_pos first = iswa.get_swa()->seq_pos_min(seq_id);
    return std::max<llama_pos>(tca.seq_pos_min(seq_id) + 1, first <= begin ? begin : first + (llama_pos) n_swa - 1);
}

bool llama_kv_cache_tca_iswa::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    const llama_seq_id first = seq_id < 0 ? 0                           : seq_id;
    const llama_seq_id last  = seq_id < 0 ? (llama_seq_id) tca.n_stream() : seq_id + 1;
    for (llama_seq_id id = first; id < last; ++id) {
        const llama_pos begin = tca.get_stream(id).pos0;
        if (p0 > begin && p0 <= tca.seq_pos_max(id) && !window_held(id, p0)) {
            return false;
        }
    }
    if (!tca.seq_rm(seq_id, p0, p1)) {
        return false;
    }
    for (llama_seq_id id = first; id < last; ++id) {
        // the ragged cache knows what is left, also after a micro-batch that failed while it compacted
        iswa.seq_rm(id, tca.seq_pos_max(id) < 0 ? -1 : tca.seq_pos_max(id) + 1, -1);
    }
    return true;
}

void llama_kv_cache_tca_iswa::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }
    tca.seq_cp(seq_id_src, seq_id_dst, p0, p1);
    // the stock cache copies whole streams only; then dst is cut to what the ragged cache could copy
    iswa.seq_cp(seq_id_src, seq_id_dst, -1, -1);
    const llama_pos end = tca.seq_pos_max(seq_id_dst);
    if (end >= 0 && end < tca.seq_pos_max(seq_id_src) && !window_held(seq_id_src, end + 1)) {
        LLAMA_LOG_ERROR("tca: seq_cp of positions [%d, %d) is not possible, the sliding-window layers no longer hold the window before "
                "%d; sequence %d is now empty\n", p0, p1, end + 1, seq_id_dst);
        tca.seq_rm(seq_id_dst, -1, -1);
    }
    iswa.seq_rm(seq_id_dst, tca.seq_pos_max(seq_id_dst) < 0 ? -1 : tca.seq_pos_max(seq_id_dst) + 1, -1);
}

void llama_kv_cache_tca_iswa::seq_keep(llama_seq_id seq_id) {
    tca.seq_keep(seq_id);
    iswa.seq_keep(seq_id);
}

void llama_kv_cache_tca_iswa::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    tca.seq_add(seq_id, p0, p1, shift);  // refuses and says so
}

void llama_kv_cache_tca_iswa::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    tca.seq_div(seq_id, p0, p1, d);
}

llama_pos llama_kv_cache_tca_iswa::seq_pos_min(llama_seq_id seq_id) const {
    const llama_pos end = tca.seq_pos_max(seq_id);
    if (end < 0) {
        return -1;
    }
    // A tail that starts at the end takes nothing back. llama-server restores a state and then removes its last token if
    // seq_pos_min is below it, so where that token has to stay (a group was just compacted) it must be seq_pos_min.
    const llama_pos p = first_removable(seq_id);
    return p > end ? end : std::max<llama_pos>(tca.get_stream(seq_id).pos0, p - 1 - (swa_full ? 0 : (llama_pos) n_swa));
}

llama_pos llama_kv_cache_tca_iswa::seq_pos_max(llama_seq_id seq_id) const {
    return tca.seq_pos_max(seq_id);
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_tca_iswa::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res = tca.memory_breakdown();
    for (const auto & [buft, size] : iswa.memory_breakdown()) {
        res[buft] += size;
    }
    return res;
}

uint64_t llama_kv_cache_tca_iswa::bytes_beyond_stock() const {
    const uint64_t cells = iswa.get_swa()->get_size();
    return sum(iswa.get_swa()->memory_breakdown())/cells*(cells - std::min<uint64_t>(stock_cells, cells));
}

void llama_kv_cache_tca_iswa::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags /*flags*/) const {
    tca.state_write(io, seq_id);
    iswa.state_write(io, seq_id);
}

void llama_kv_cache_tca_iswa::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags /*flags*/) {
    tca.state_read(io, seq_id);
    try {
        iswa.state_read(io, seq_id);
    } catch (...) {
        if (seq_id < 0) {
            tca.clear(true);
        } else {
            tca.seq_rm(seq_id, -1, -1);
        }
        throw;
    }
}

//
// llama_kv_cache_tca_iswa_context
//

llama_kv_cache_tca_iswa_context::llama_kv_cache_tca_iswa_context(llama_memory_status status) :
        llama_kv_cache_iswa_context(status), tca(std::make_unique<llama_kv_cache_tca_context>(status)) {
}

llama_kv_cache_tca_iswa_context::llama_kv_cache_tca_iswa_context(llama_kv_cache_iswa * iswa, llama_memory_context_ptr tca) :
        llama_kv_cache_iswa_context(iswa), tca(std::move(tca)) {
}

llama_kv_cache_tca_iswa_context::llama_kv_cache_tca_iswa_context(llama_kv_cache_iswa * iswa, llama_memory_context_ptr tca,
        llama_context * lctx, bool optimize) :
        llama_kv_cache_iswa_context(iswa, lctx, optimize), tca(std::move(tca)) {
}

llama_kv_cache_tca_iswa_context::llama_kv_cache_tca_iswa_context(llama_kv_cache_iswa * iswa, llama_memory_context_ptr tca,
        slot_info_vec_t sinfos_base, slot_info_vec_t sinfos_swa, std::vector<llama_ubatch> ubatches) :
        llama_kv_cache_iswa_context(iswa, std::move(sinfos_base), std::move(sinfos_swa), std::move(ubatches)), tca(std::move(tca)) {
}

bool llama_kv_cache_tca_iswa_context::next() {
    tca->next();
    return llama_kv_cache_iswa_context::next();
}

bool llama_kv_cache_tca_iswa_context::apply() {
    // an update may concern one of the two only
    const bool done_tca  = tca->get_status() == LLAMA_MEMORY_STATUS_NO_UPDATE || tca->apply();
    const bool done_iswa = llama_kv_cache_iswa_context::get_status() == LLAMA_MEMORY_STATUS_NO_UPDATE || llama_kv_cache_iswa_context::apply();
    return done_tca && done_iswa;
}

llama_memory_status llama_kv_cache_tca_iswa_context::get_status() const {
    return llama_memory_status_combine(llama_kv_cache_iswa_context::get_status(), tca->get_status());
}

//
// the ragged part of any memory
//

const llama_kv_cache_tca_context * llama_tca_context_of(const llama_memory_context_i * mctx) {
    if (const auto * both = dynamic_cast<const llama_kv_cache_tca_iswa_context *>(mctx)) {
        return both->get_tca();
    }
    return dynamic_cast<const llama_kv_cache_tca_context *>(mctx);
}

const llama_kv_cache_tca * llama_tca_cache_of(const llama_memory_i * memory) {
    if (const auto * both = dynamic_cast<const llama_kv_cache_tca_iswa *>(memory)) {
        return both->get_tca();
    }
    return dynamic_cast<const llama_kv_cache_tca *>(memory);
}

llama_tca_bytes llama_tca_count_bytes(const llama_memory_i & memory) {
    const uint64_t all = sum(memory.memory_breakdown());
    const llama_kv_cache_tca * tca = llama_tca_cache_of(&memory);
    if (tca == nullptr) {
        return { all, all };
    }
    const auto * both = dynamic_cast<const llama_kv_cache_tca_iswa *>(&memory);
    const uint64_t rest = all - sum(tca->memory_breakdown());
    return { rest + tca->bytes(), rest + tca->bytes_dense() - (both ? both->bytes_beyond_stock() : 0) };
}
