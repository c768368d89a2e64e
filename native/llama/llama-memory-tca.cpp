#include "llama-memory-tca.h"

#include "llama-model-tca.h"
#include "tca-hash.h"
#include "tca-io.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-model.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

static constexpr uint64_t  STATE_MAGIC = 0x3230544154534354;  // "TCSTAT02": bump when the layout of state_write changes
static constexpr llama_pos POS_END     = std::numeric_limits<llama_pos>::max();

llama_memory_tca::llama_memory_tca(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, ggml_type type_v,
        llama_tca_rest rest, bool swa_full) :
        cparams(cparams), causal_always(model.hparams.non_causal_type == LLAMA_NON_CAUSAL_TYPE_SWA_ONLY), rest(std::move(rest)), n_lead(swa_full ? 0 : this->rest.n_swa), store(model, cparams, type_k, type_v), fingerprint(store.fingerprint()),
        streams(store.n_stream()), held(store.n_stream()) {
}

//
// batches
//

// Positions are stored by counting, so they must follow. n_tokens [n_stream]: tokens of every sequence after the batch.
bool llama_memory_tca::holds_batch(const llama_batch & batch, std::vector<uint32_t> & n_tokens) const {
    std::vector<int64_t> next_pos(streams.size());
    n_tokens.resize(streams.size());
    for (size_t s = 0; s < streams.size(); ++s) {
        n_tokens[s] = streams[s].state.n_tokens;
        next_pos[s] = n_tokens[s] == 0 ? -1 : (int64_t) streams[s].pos0 + n_tokens[s];  // -1: any
    }
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t j = 0; j < batch.n_seq_id[i]; ++j) {
            const llama_seq_id id = batch.seq_id[i][j];
            if (next_pos[id] >= 0 && batch.pos[i] != next_pos[id]) {  // llama.cpp itself lets a position occur twice
                LLAMA_LOG_ERROR("tca: position %d of sequence %d does not follow %lld; the ragged cache needs consecutive positions%s\n",
                        batch.pos[i], id, (long long) next_pos[id] - 1, batch.embd == nullptr ? "" :
                        ", which the images of this model do not have: load with --override-kv tca.enabled=bool:false to use them");
                return false;
            }
            next_pos[id] = (int64_t) batch.pos[i] + 1;
            ++n_tokens[id];
        }
    }
    return true;
}

std::vector<uint32_t> llama_memory_tca::tokens_held() const {
    std::vector<uint32_t> n_tokens(streams.size());
    for (size_t s = 0; s < streams.size(); ++s) {
        n_tokens[s] = std::max(held[s].state.n_tokens, streams[s].state.n_tokens);
    }
    return n_tokens;
}

bool llama_memory_tca::find_room(const std::vector<uint32_t> & n_tokens) {
    wanted.clear();
    if (store.has_room(n_tokens)) {
        return true;
    }
    if (store.fits(n_tokens)) {
        wanted = n_tokens;  // llama_decode asks for an update that makes the room, and tries again
    }
    return false;
}

llama_memory_context_ptr llama_memory_tca::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    const auto failed = [this] {
        return std::make_unique<llama_memory_tca_context>(this, nullptr, LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    };
    if (!cparams.causal_attn && !causal_always) {
        LLAMA_LOG_ERROR("tca: this batch attends in both directions, as the images of some models do, and the ragged cache is causal; "
                "load with --override-kv tca.enabled=bool:false to use images\n");
        return std::make_unique<llama_memory_tca_context>(this, nullptr, LLAMA_MEMORY_STATUS_FAILED_COMPUTE);
    }
    if (queue.empty()) {
        for (size_t s = 0; s < streams.size(); ++s) {
            held[s] = { streams[s].state, streams[s].stash };
        }
    }
    std::vector<uint32_t> n_tokens;
    if (!holds_batch(balloc.get_batch(), n_tokens) || !find_room(n_tokens)) {
        return failed();  // a full context: llama_decode returns 1, as with the stock cache
    }
    if (rest.memory && !rest.take) {
        llama_memory_context_ptr ctx = rest.memory->init_batch(balloc, n_ubatch, embd_all);
        const llama_memory_status status = ctx->get_status();
        return status != LLAMA_MEMORY_STATUS_SUCCESS ? std::make_unique<llama_memory_tca_context>(this, std::move(ctx), status) :
            std::make_unique<llama_memory_tca_context>(this, std::move(ctx), std::vector<llama_ubatch>());
    }
    balloc.split_reset();
    std::vector<llama_ubatch> ubatches;
    while (true) {
        llama_ubatch ubatch = balloc.split_equal(n_ubatch, rest.sequential, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return failed();
    }
    return std::make_unique<llama_memory_tca_context>(this, nullptr, std::move(ubatches));
}

llama_memory_context_ptr llama_memory_tca::init_full() {
    return std::make_unique<llama_memory_tca_context>(this, rest.memory ? rest.memory->init_full() : nullptr, LLAMA_MEMORY_STATUS_SUCCESS);
}

llama_memory_context_ptr llama_memory_tca::init_update(llama_context * lctx, bool optimize) {
    owner = lctx;
    llama_memory_context_ptr ctx = rest.memory ? rest.memory->init_update(lctx, optimize) : nullptr;
    llama_memory_status status = ctx ? ctx->get_status() : LLAMA_MEMORY_STATUS_NO_UPDATE;
    if (!optimize) {
        wanted.clear();  // of a batch that was given up
    }
    if (!queue.empty() || !wanted.empty()) {
        llama_synchronize(lctx);
        status = llama_memory_status_combine(status, LLAMA_MEMORY_STATUS_SUCCESS);
    }
    return std::make_unique<llama_memory_tca_context>(this, std::move(ctx), status);
}

void llama_memory_tca::append(uint32_t s, const llama_ubatch & ubatch, uint32_t first) {
    stream & st = streams[s];
    if (st.state.n_tokens == 0) {
        st.pos0 = ubatch.pos[first];
    }
    for (uint32_t i = first; i < first + ubatch.n_seq_tokens; ++i) {
        st.tokens.push_back(ubatch.token ? ubatch.token[i] : next_embedding--);
    }
}

//
// sequences
//

void llama_memory_tca::clear(bool data) {
    std::fill(streams.begin(), streams.end(), stream());
    std::fill(held.begin(), held.end(), llama_tca_store::rows());
    queue.clear();
    wanted.clear();
    unfinished.clear();
    if (data) {
        store.clear_data();
    }
    if (rest.memory) {
        rest.memory->clear(data);
    }
}

llama_pos llama_memory_tca::first_removable(llama_seq_id seq_id, bool over_a_compaction) const {
    const stream & s = streams[seq_id];
    tca_seq_state state = s.state;
    if (over_a_compaction && s.stash) {
        --state.n_groups;
    }
    llama_pos p = s.pos0 + (llama_pos) store.full_plan().n_fixed(state);
    if (rest.sliding) {
        // the next token, at p, sees the n_swa - 1 tokens before it; a saved state, too, holds no more
        const llama_pos first = rest.sliding->seq_pos_min(seq_id);
        p = std::max(p, first <= s.pos0 ? s.pos0 : first + (llama_pos) rest.n_swa - 1);
    }
    return p;
}

bool llama_memory_tca::can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    const stream & s = streams[seq_id];
    const llama_pos end = s.pos0 + (llama_pos) s.state.n_tokens;
    if (p1 <= s.pos0 || p0 >= end || p0 >= p1) {
        return true;   // nothing to remove
    }
    if (p0 <= s.pos0 && p1 >= end) {
        return true;   // the whole sequence
    }
    return p1 >= end && p0 >= first_removable(seq_id, true);
}

void llama_memory_tca::drop(llama_seq_id seq_id) {
    streams[seq_id] = {};
    if (rest.memory) {
        rest.memory->seq_rm(seq_id, -1, -1);
    }
}

// What can_rm() allows, in the store. The tail starts at p0.
void llama_memory_tca::rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    stream & s = streams[seq_id];
    const llama_pos end = s.pos0 + (llama_pos) s.state.n_tokens;
    if (p1 <= s.pos0 || p0 >= end || p0 >= p1) {
        return;
    }
    const uint32_t n_tokens = p0 - s.pos0;
    if (n_tokens < store.full_plan().n_fixed(s.state)) {
        queue.push_back({ pending::UNDO, (uint32_t) seq_id, 0, { s.state, s.stash }, n_tokens });
        --s.state.n_groups;
        s.stash = false;
    }
    s.state.n_tokens = n_tokens;
    s.tokens.resize(n_tokens);
}

bool llama_memory_tca::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(seq_id == -1 || (seq_id >= 0 && (size_t) seq_id < streams.size()));
    p0 = p0 < 0 ? 0       : p0;
    p1 = p1 < 0 ? POS_END : p1;

    const size_t first = seq_id < 0 ? 0              : seq_id;
    const size_t last  = seq_id < 0 ? streams.size() : seq_id + 1;
    for (size_t s = first; s < last; ++s) {
        if (std::find(unfinished.begin(), unfinished.end(), s) != unfinished.end()) {
            // llama_decode takes back a micro-batch that failed: a group may be compacted in some layers and not in others, and a
            // recurrent state may have gone on
            LLAMA_LOG_WARN("tca: the micro-batch that failed has changed sequence %zu for good, which is now empty\n", s);
            drop(s);
        }
    }
    for (size_t s = first; s < last; ++s) {
        if (!can_rm(s, p0, p1)) {
            return false;
        }
    }
    for (size_t s = first; s < last; ++s) {
        if (p0 <= streams[s].pos0 && p1 > seq_pos_max(s)) {
            drop(s);
            continue;
        }
        if (rest.memory && p1 > seq_pos_max(s) && p0 <= seq_pos_max(s) && !rest.memory->seq_rm(s, p0, -1)) {
            return false;  // a recurrent state that goes back no further; nothing was changed in this sequence
        }
        rm(s, p0, p1);
    }
    return true;
}

void llama_memory_tca::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(seq_id_src >= 0 && (size_t) seq_id_src < streams.size());
    GGML_ASSERT(seq_id_dst >= 0 && (size_t) seq_id_dst < streams.size());
    if (seq_id_src == seq_id_dst) {
        return;
    }
    p0 = p0 < 0 ? 0       : p0;
    p1 = p1 < 0 ? POS_END : p1;

    // the interface has no way to fail: leave an empty sequence, which no caller can mistake for a copy
    const auto refuse = [&](const char * why) {
        LLAMA_LOG_ERROR("tca: seq_cp of positions [%d, %d) is not possible, %s; sequence %d is now empty\n", p0, p1, why, seq_id_dst);
        drop(seq_id_dst);
    };
    const stream & src = streams[seq_id_src];
    const llama_pos end = src.pos0 + (llama_pos) src.state.n_tokens;
    drop(seq_id_dst);
    if (src.state.n_tokens == 0 || p1 <= src.pos0) {
        return;
    }
    if (p0 > src.pos0 || (p1 < end && p1 < first_removable(seq_id_src, false))) {
        return refuse("part of them was compacted");
    }
    std::vector<uint32_t> n_tokens = tokens_held();
    n_tokens[seq_id_dst] = std::max(n_tokens[seq_id_dst], src.state.n_tokens);
    if (!store.fits(n_tokens)) {
        return refuse("the context is full");
    }
    if (rest.memory) {
        rest.memory->seq_cp(seq_id_src, seq_id_dst, -1, -1);
        if (p1 < end && !rest.memory->seq_rm(seq_id_dst, p1, -1)) {
            return refuse("the recurrent state goes back no further");
        }
    }
    streams[seq_id_dst] = src;
    queue.push_back({ pending::COPY, (uint32_t) seq_id_src, (uint32_t) seq_id_dst, { src.state, src.stash }, 0 });
    rm(seq_id_dst, p1, POS_END);
}

void llama_memory_tca::do_pending() const {
    if (rest.memory && owner) {
        // a stock memory puts copies off, too, and does not make up for it before its states are read or written
        const llama_memory_context_ptr update = rest.memory->init_update(owner, false);
        if (update->get_status() == LLAMA_MEMORY_STATUS_SUCCESS) {
            update->apply();
        }
    }
    for (const pending & op : queue) {
        if (op.what == pending::UNDO) {
            store.undo_compaction(op.from, op.held.state, op.n_tokens);
            held[op.from] = { { op.n_tokens, op.held.state.n_groups - 1 }, false };
            continue;
        }
        std::vector<uint32_t> n_tokens = tokens_held();
        n_tokens[op.to] = std::max(n_tokens[op.to], op.held.state.n_tokens);
        held[op.to] = {};
        if (!store.has_room(n_tokens)) {
            store.make_room(n_tokens, held);
        }
        store.copy(op.from, op.to, op.held);
        held[op.to] = op.held;
    }
    queue.clear();
    for (size_t s = 0; s < streams.size(); ++s) {
        held[s] = { streams[s].state, streams[s].stash };
    }
}

void llama_memory_tca::seq_keep(llama_seq_id seq_id) {
    GGML_ASSERT(seq_id >= 0 && (size_t) seq_id < streams.size());
    for (size_t s = 0; s < streams.size(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            drop(s);
        }
    }
}

void llama_memory_tca::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift != 0 && p0 != p1 && seq_pos_max(seq_id) >= std::max(p0, 0)) {
        LLAMA_LOG_ERROR("tca: positions in the ragged cache cannot be shifted; seq_add(%d, %d, %d, %d) was ignored\n", seq_id, p0, p1, shift);
    }
}

void llama_memory_tca::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d != 1 && p0 != p1 && seq_pos_max(seq_id) >= std::max(p0, 0)) {
        LLAMA_LOG_ERROR("tca: positions in the ragged cache cannot be divided; seq_div(%d, %d, %d, %d) was ignored\n", seq_id, p0, p1, d);
    }
}

llama_pos llama_memory_tca::seq_pos_min(llama_seq_id seq_id) const {
    GGML_ASSERT(seq_id >= 0 && (size_t) seq_id < streams.size());
    const llama_pos end = seq_pos_max(seq_id);
    if (end < 0) {
        return -1;
    }
    // A tail that starts at the end takes nothing back. llama-server restores a state and then removes its last token if
    // seq_pos_min is below it, so where that token has to stay (a group was just compacted) it must be seq_pos_min.
    const llama_pos p   = first_removable(seq_id, false);
    const llama_pos min = p > end ? end : std::max<llama_pos>(streams[seq_id].pos0, p - 1 - (llama_pos) n_lead);
    return rest.memory && !rest.sliding ? std::max(min, rest.memory->seq_pos_min(seq_id)) : min;
}

llama_pos llama_memory_tca::seq_pos_max(llama_seq_id seq_id) const {
    GGML_ASSERT(seq_id >= 0 && (size_t) seq_id < streams.size());
    const stream & s = streams[seq_id];
    return s.state.n_tokens == 0 ? -1 : s.pos0 + (llama_pos) s.state.n_tokens - 1;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_memory_tca::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res = store.memory_breakdown();
    if (rest.memory) {
        for (const auto & [buft, size] : rest.memory->memory_breakdown()) {
            res[buft] += size;
        }
    }
    return res;
}

static uint64_t sum(const std::map<ggml_backend_buffer_type_t, size_t> & sizes) {
    uint64_t n = 0;
    for (const auto & [_, size] : sizes) {
        n += size;
    }
    return n;
}

llama_tca_bytes llama_memory_tca::bytes() const {
    const uint64_t beside = rest.memory ? sum(rest.memory->memory_breakdown()) : 0;
    uint64_t beyond_stock = 0;
    if (rest.sliding) {
        const uint64_t n_cells = (uint64_t) rest.sliding->get_size()*rest.sliding->get_n_stream();
        beyond_stock = sum(rest.sliding->memory_breakdown())/n_cells*(n_cells - std::min(rest.n_cells_stock, n_cells));
    }
    return { beside + store.bytes(), beside + store.bytes_dense() - beyond_stock };
}

//
// state
//

namespace {
struct state_header {
    uint64_t magic;
    uint64_t fingerprint;
    uint32_t n_seqs;
    uint32_t partial;
};

struct state_sequence {
    uint32_t  n_tokens;
    uint32_t  n_groups;
    llama_pos pos0;
    uint32_t  n_listed;  // tokens that follow: all, or in a partial state those behind the last compaction
    uint64_t  before;    // hash of the tokens before those
};
}  // namespace

static uint64_t hash_tokens(const std::vector<llama_token> & tokens, size_t n) {
    return tca_hash(TCA_HASH_START, tokens.data(), n*sizeof(llama_token));
}

void llama_memory_tca::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    do_pending();  // callers synchronize first (llama_state_*)

    const bool     partial = flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
    const uint32_t first   = seq_id < 0 ? 0              : seq_id;
    const uint32_t last    = seq_id < 0 ? streams.size() : seq_id + 1;
    const state_header head = { STATE_MAGIC, fingerprint, last - first, partial };
    io.write(&head, sizeof(head));

    for (uint32_t s = first; s < last; ++s) {
        const stream & st = streams[s];
        const uint32_t n_before = partial ? store.full_plan().n_fixed(st.state) : 0;
        const state_sequence seq = { st.state.n_tokens, st.state.n_groups, st.pos0, st.state.n_tokens - n_before, hash_tokens(st.tokens, n_before) };
        io.write(&seq, sizeof(seq));
        io.write(st.tokens.data() + n_before, seq.n_listed*sizeof(llama_token));
    }
    for (uint32_t s = first; s < last; ++s) {
        const tca_seq_state & state = streams[s].state;
        store.for_each_rows(s, state, partial ? state.n_groups : 0, [&](ggml_tensor * t, size_t offset, size_t size) {
            const uint64_t n = size;
            io.write(&n, sizeof(n));
            io.write_tensor(t, offset, size);
        });
    }
    if (rest.memory) {
        rest.memory->state_write(io, seq_id, flags);
    }
    io.write(&STATE_MAGIC, sizeof(STATE_MAGIC));
}

// llama.cpp reads nothing, and says nothing, behind the end of a file: what was read must be something that cannot be left over.
static void expect(llama_io_read_i & io, uint64_t want) {
    uint64_t got = 0;
    io.read(&got, sizeof(got));
    if (got != want) {
        throw std::runtime_error("tca: the saved state is damaged or cut short");
    }
}

// Positions of a region, [n_bytes/4]: increasing, of the sequence, and the newest token's last.
static bool positions_follow(const uint8_t * data, size_t n_bytes, llama_pos pos0, uint32_t n_tokens) {
    llama_pos before = pos0 - 1;
    for (size_t i = 0; i < n_bytes; i += sizeof(llama_pos)) {
        llama_pos pos;
        memcpy(&pos, data + i, sizeof(pos));
        if (pos <= before) {
            return false;
        }
        before = pos;
    }
    return before == pos0 + (llama_pos) n_tokens - 1;
}

// First everything is read and checked, then everything is changed.
void llama_memory_tca::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    GGML_ASSERT(seq_id == -1 || (seq_id >= 0 && (size_t) seq_id < streams.size()));
    do_pending();

    const bool     partial = flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
    const uint32_t first   = seq_id < 0 ? 0              : seq_id;
    const uint32_t last    = seq_id < 0 ? streams.size() : seq_id + 1;
    const tca_plan & plan  = store.full_plan();

    state_header head = {};
    io.read(&head, sizeof(head));
    if (head.magic != STATE_MAGIC || head.partial != (uint32_t) partial || head.n_seqs != last - first) {
        throw std::runtime_error("tca: the saved state does not come from a ragged cache with the same number of sequences");
    }
    if (head.fingerprint != fingerprint) {
        throw std::runtime_error("tca: the saved state was made with other budgets or cache types; use those, or evaluate the text again");
    }
    std::vector<stream>   restored(streams);
    std::vector<uint32_t> n_tokens = tokens_held();
    for (uint32_t s = first; s < last; ++s) {
        const stream & now = streams[s];
        stream       & st  = restored[s];
        state_sequence seq = {};
        io.read(&seq, sizeof(seq));
        st.state = { seq.n_tokens, seq.n_groups };
        st.pos0  = seq.pos0;
        if (!plan.possible(st.state) || st.pos0 < 0 || st.pos0 > POS_END - (llama_pos) plan.n_ctx_seq) {
            throw std::runtime_error("tca: the saved state does not fit this context; use the same n_ctx or a larger one");
        }
        const uint32_t n_before = partial ? plan.n_fixed(st.state) : 0;
        if (seq.n_listed != st.state.n_tokens - n_before) {
            throw std::runtime_error("tca: the saved state is damaged or cut short");
        }
        const bool shorter = now.state.n_groups < st.state.n_groups || now.pos0 != st.pos0;
        if ((n_before > 0 && shorter) || seq.before != hash_tokens(now.tokens, n_before)) {
            throw std::runtime_error("tca: the sequence does not hold the text that this partial state continues; evaluate the text again");
        }
        st.tokens.resize(n_before);
        st.tokens.resize(st.state.n_tokens);
        io.read(st.tokens.data() + n_before, seq.n_listed*sizeof(llama_token));
        // the rows set aside are those of the same tokens if no group was compacted since
        st.stash    = partial && now.stash && now.state.n_groups == st.state.n_groups && store.stash_holds(st.state);
        n_tokens[s] = partial ? std::max(n_tokens[s], st.state.n_tokens) : st.state.n_tokens;
    }
    if (!store.fits(n_tokens)) {
        throw std::runtime_error("tca: the saved state does not fit beside the other sequences of this context");
    }

    const auto for_rows = [&](auto && visit) {
        for (uint32_t s = first; s < last; ++s) {
            store.for_each_rows(s, restored[s].state, partial ? restored[s].state.n_groups : 0, visit);
        }
    };
    const auto make_room = [&] {
        std::vector<llama_tca_store::rows> kept = held;
        for (uint32_t s = first; s < last && !partial; ++s) {
            kept[s] = {};
        }
        if (!store.has_room(n_tokens)) {
            store.make_room(n_tokens, kept);
        }
    };
    std::vector<uint8_t> rows;
    const bool on_device = flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE;  // rows do not pass through the host; a state of this process
    if (on_device) {
        make_room();
    }
    for_rows([&](ggml_tensor * t, size_t offset, size_t size) {
        expect(io, size);  // before there is memory for it: a header may promise more than there is
        if (on_device) {
            io.read_tensor(t, offset, size);
        } else {
            rows.resize(rows.size() + size);
            io.read(rows.data() + rows.size() - size, size);
        }
    });
    const uint8_t * next = rows.data();
    for (uint32_t s = first; s < last && !on_device; ++s) {
        store.for_each_rows(s, restored[s].state, partial ? restored[s].state.n_groups : 0, [&](ggml_tensor * t, size_t, size_t size) {
            if (t->type == GGML_TYPE_I32 && !positions_follow(next, size, restored[s].pos0, restored[s].state.n_tokens)) {
                throw std::runtime_error("tca: the saved state is damaged or cut short");
            }
            next += size;
        });
    }
    rest_read(io, seq_id, flags, restored);

    if (!on_device) {
        make_room();
        next = rows.data();
        for_rows([&](ggml_tensor * t, size_t offset, size_t size) {
            ggml_backend_tensor_set(t, next, offset, size);
            next += size;
        });
    }
    for (uint32_t s = first; s < last; ++s) {
        held[s] = { restored[s].state, restored[s].stash };
    }
    streams = std::move(restored);
}

// The end of a state: the rest's part, if there is one. If that cannot be restored the rest is as before.
void llama_memory_tca::rest_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, const std::vector<stream> & restored) {
    if (!rest.memory) {
        return expect(io, STATE_MAGIC);
    }
    const bool   partial = flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY;
    const size_t first   = seq_id < 0 ? 0              : seq_id;
    const size_t last    = seq_id < 0 ? streams.size() : seq_id + 1;
    const auto clear = [&] {  // stock memories leave a sequence as it is where the state has none
        for (size_t s = first; s < last && !partial; ++s) {
            rest.memory->seq_rm(s, -1, -1);
        }
    };
    tca_io_copy before;
    rest.memory->state_write(before, seq_id, flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
    try {
        clear();
        rest.memory->state_read(io, seq_id, flags);
        expect(io, STATE_MAGIC);
    } catch (...) {
        io.discard();  // what it has read and not written yet
        clear();
        rest.memory->state_read(before, seq_id, flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
        throw;
    }
    for (size_t s = first; s < last && partial; ++s) {
        rest.memory->seq_rm(s, restored[s].pos0 + (llama_pos) restored[s].state.n_tokens, -1);
    }
}

//
// llama_memory_tca_context
//

llama_memory_tca_context::llama_memory_tca_context(llama_memory_tca * memory, llama_memory_context_ptr rest, llama_memory_status status) :
        what(OTHER), memory(memory), rest(std::move(rest)), status(status) {
}

llama_memory_tca_context::llama_memory_tca_context(llama_memory_tca * memory, llama_memory_context_ptr rest, std::vector<llama_ubatch> ubatches) :
        what(BATCH), memory(memory), rest(std::move(rest)), status(LLAMA_MEMORY_STATUS_SUCCESS), ubatches(std::move(ubatches)) {
}

llama_memory_tca_context::~llama_memory_tca_context() {
    if (what == BATCH) {
        memory->unfinished.clear();
    }
}

bool llama_memory_tca_context::next() {
    memory->unfinished.clear();
    ++i_cur;
    return ubatches.empty() ? rest->next() : i_cur < ubatches.size();
}

bool llama_memory_tca_context::apply() {
    GGML_ASSERT(!llama_memory_status_is_fail(status));

    if (memory->rest.take && what == BATCH) {
        rest = memory->rest.take(ubatches[i_cur]);
        if (llama_memory_status_is_fail(rest->get_status())) {
            return false;
        }
    }
    // of an update, one part may have nothing to do
    const bool done = !rest || rest->get_status() == LLAMA_MEMORY_STATUS_NO_UPDATE || rest->apply();
    if (what == OTHER) {
        memory->do_pending();
        if (!memory->wanted.empty()) {
            memory->store.make_room(memory->wanted, memory->held);
            memory->wanted.clear();
        }
        return done;
    }

    const llama_ubatch & ubatch = get_ubatch();
    GGML_ASSERT(ubatch.n_tokens == ubatch.n_seqs*ubatch.n_seq_tokens);

    struct entry { llama_seq_id id; uint32_t token; };
    std::vector<entry> entries;
    for (int32_t j = 0, more = 1; more; ++j) {  // the first sequence of every set, then the second, ...
        more = 0;
        for (uint32_t i = 0; i < ubatch.n_seqs; ++i) {
            const uint32_t token = i*ubatch.n_seq_tokens;
            if (j < ubatch.n_seq_id[token]) {
                entries.push_back({ ubatch.seq_id[token][j], token });
                more = 1;
            }
        }
    }

    cur.clear();
    memory->unfinished.clear();
    for (size_t i = 0; i < entries.size(); ++i) {
        const auto [id, token] = entries[i];
        memory->append(id, ubatch, token);

        llama_memory_tca::stream & stream = memory->streams[id];
        uint32_t done_tokens = 0;
        const std::vector<tca_segment> segments = memory->store.full_plan().advance(stream.state, ubatch.n_seq_tokens);
        for (size_t j = 0; j < segments.size(); ++j) {
            if (cur.size() <= j) {
                cur.resize(j + 1, std::vector<stream_segment>(entries.size()));  // zeros: nothing to do for a stream
            }
            cur[j][i] = { (uint32_t) id, token + done_tokens, (llama_pos) (ubatch.pos[token] + done_tokens), segments[j] };
            done_tokens += segments[j].n_tokens;
        }
        const bool compacted = segments.front().compacts;  // only the last segment may not
        if (compacted || (rest && !memory->rest.sliding)) {
            memory->unfinished.push_back(id);
        }
        stream.stash = (stream.stash || compacted) && memory->store.stash_holds(stream.state);
        memory->held[id] = { stream.state, stream.stash };
    }
    return done;
}

uint32_t llama_memory_tca_context::n_segments(const llama_ubatch & ubatch) const {
    return what == OTHER ? memory->store.full_plan().max_segments(ubatch.n_seq_tokens) : cur.size();
}

uint32_t llama_memory_tca_context::n_entries(const llama_ubatch & ubatch) const {
    return what == OTHER ? ubatch.n_seqs : cur.front().size();
}

bool llama_memory_tca_context::compacts() const {
    const auto compacts = [](const stream_segment & s) { return s.seg.compacts; };
    return what == OTHER || std::any_of(cur.begin(), cur.end(), [&](const auto & segment) {
        return std::any_of(segment.begin(), segment.end(), compacts);
    });
}

//
// which memory it is
//

const llama_memory_context_i * llama_tca_unwrap(const llama_memory_context_i * mctx, llm_graph_result * res) {
    res->mctx_tca = dynamic_cast<const llama_memory_tca_context *>(mctx);
    return res->mctx_tca && res->mctx_tca->get_rest() ? res->mctx_tca->get_rest() : mctx;
}

llama_tca_bytes llama_tca_count_bytes(const llama_memory_i & memory) {
    const llama_memory_tca * tca = llama_tca_memory_of(&memory);
    const uint64_t all = tca ? 0 : sum(memory.memory_breakdown());
    return tca ? tca->bytes() : llama_tca_bytes { all, all };
}

const llama_memory_tca * llama_tca_memory_of(const llama_memory_i * memory) {
    return dynamic_cast<const llama_memory_tca *>(memory);
}
