#include "llama-kv-cache-tca.h"

#include "llama-model-tca.h"
#include "tca-device.h"
#include "tca-rope.h"

#include "cpu/tca-pages.h"
#include "metrics/tca-metric.h"

#include "llama-context.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

static constexpr uint32_t STATE_MAGIC = 0x41435401;  // bump when the layout of state_write changes

// Normalised Walsh-Hadamard matrix: entry (i, j) is (-1)^(number of common bits)/sqrt(n).
static std::vector<float> make_hadamard(int n) {
    std::vector<float> m((size_t) n*n);
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
            bool odd = false;
            for (int bits = i & j; bits != 0; bits &= bits - 1) {
                odd = !odd;
            }
            m[(size_t) i*n + j] = (odd ? -1.0f : 1.0f)/std::sqrt((float) n);
        }
    }
    return m;
}

// Quantized caches hold rotated keys and values, as in the stock cache: the largest power of two that divides the head size,
// from 64 on, for keys; 64 for values.
static int hadamard_size_k(ggml_type type, uint32_t head_dim) {
    if (!ggml_is_quantized(type) || head_dim % 64 != 0) {
        return 0;
    }
    int n = 64;
    while (head_dim % (2*n) == 0) {
        n *= 2;
    }
    return n;
}

static int hadamard_size_v(ggml_type type, uint32_t head_dim) {
    return ggml_is_quantized(type) && head_dim % 64 == 0 ? 64 : 0;
}

llama_kv_cache_tca::llama_kv_cache_tca(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, ggml_type type_v) :
        model(model), plan(model.tca->budgets, cparams.n_ctx_seq), type_k(type_k), type_v(type_v),
        tables(plan.n_layer()) {
    const llama_hparams & hparams = model.hparams;

    const uint32_t n_layer = plan.n_layer();
    streams.resize(cparams.n_seq_max);
    layers.resize(n_layer);

    const auto buft_less = [](ggml_backend_buffer_type_t a, ggml_backend_buffer_type_t b) {
        return strcmp(ggml_backend_buft_name(a), ggml_backend_buft_name(b)) < 0;
    };
    std::map<ggml_backend_buffer_type_t, ggml_context_ptr, decltype(buft_less)> ctx_map(buft_less);

    std::vector<llama_tca_rope> ropes(n_layer);
    if (!hparams.no_alloc) {
        ropes = llama_tca_ropes(model, cparams);
    }

    bool first = true;
    for (uint32_t il = 0; il < n_layer; ++il) {
        if (!plan.layer_stored(il)) {
            continue;
        }
        layer & l = layers[il];
        const uint32_t head_dim_k = hparams.n_embd_head_k(il);
        const uint32_t head_dim_v = hparams.n_embd_head_v(il);
        const tca_layer_shape shape = { type_k, type_v, head_dim_k, head_dim_v, hparams.n_head(il), hparams.n_head_kv(il) };
        const auto refuse = [](const std::string & problem) {
            if (!problem.empty()) {
                throw std::runtime_error("tca: " + problem);
            }
        };
        refuse(tca_types_problem(shape));

        const int layer_rot_k = hadamard_size_k(type_k, head_dim_k);
        const int layer_rot_v = hadamard_size_v(type_v, head_dim_v);
        if (!first && (layer_rot_k != rot_k || layer_rot_v != rot_v)) {
            throw std::runtime_error("tca: quantized caches need the same head size in every layer; use f16");
        }
        rot_k = layer_rot_k;
        rot_v = layer_rot_v;
        first = false;

        tca_select_params  select;
        select.metric      = tca_metric_find(plan.budgets.metric.c_str());  // known: the budgets were checked
        select.layer       = il;
        select.block_size  = plan.budgets.block_size;
        select.group_size  = plan.budgets.group_size;
        select.n_keep      = plan.budgets.keep_counts.size();
        select.n_configs   = plan.budgets.configs.size()/plan.budgets.keep_counts.size();
        select.keep_counts = plan.budgets.keep_counts.data();
        select.configs     = plan.budgets.configs.data();
        select.hadamard    = rot_k;
        select.probe       = plan.budgets.probe.empty() ? nullptr : &plan.budgets.probe[(size_t) il*plan.n_head_kv()*head_dim_k];
        if (hparams.no_alloc) {
            const bool rotates = hparams.rope_type != LLAMA_ROPE_TYPE_NONE && hparams.n_rot(il) > 0;  // the size alone counts
            select.rope = { rotates ? TCA_ROPE_NORM : TCA_ROPE_NONE, (int32_t) hparams.n_rot(il), 1.0f, nullptr };
        } else {
            select.rope = ropes[il].view();
        }

        ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();
        if (cparams.offload_kqv) {
            ggml_backend_dev_t dev = model.dev_layer(il);
            refuse(tca_device_problem(dev, shape, select));
            buft = ggml_backend_dev_buffer_type(dev);
        }

        ggml_context_ptr & ctx = ctx_map[buft];
        if (!ctx) {
            ctx.reset(ggml_init({ 3*(size_t) n_layer*ggml_tensor_overhead(), nullptr, true }));
        }

        const int64_t n_slots = plan.slots(il)*streams.size();
        if (n_slots > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error("tca: the context is too large for one cache; lower n_ctx or the number of sequences");
        }
        l.k   = ggml_new_tensor_2d(ctx.get(), type_k, head_dim_k, n_slots);
        l.v   = ggml_new_tensor_2d(ctx.get(), type_v, head_dim_v, n_slots);
        l.pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_slots);
        ggml_format_name(l.k,   "cache_tca_k_l%d",   il);
        ggml_format_name(l.v,   "cache_tca_v_l%d",   il);
        ggml_format_name(l.pos, "cache_tca_pos_l%d", il);
        l.tables = tables.add(buft, select, std::move(ropes[il].freqs), head_dim_k, plan.n_head_kv());
    }
    for (int n : { rot_k, rot_v }) {
        if (n > 0) {
            hadamard[n] = make_hadamard(n);
        }
    }

    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf;
        if (hparams.no_alloc) {
            // memory is only being estimated: a buffer without data keeps the scheduler from allocating the tensors
            buf = ggml_backend_buft_alloc_buffer(buft, 0);
            for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t != nullptr; t = ggml_get_next_tensor(ctx.get(), t)) {
                t->buffer = buf;
            }
        } else {
            buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
        }
        if (!buf) {
            throw std::runtime_error("tca: failed to allocate the KV cache; lower n_ctx or use a smaller cache type");
        }
        if (ggml_backend_buffer_is_host(buf)) {
            tca_prefer_large_pages(ggml_backend_buffer_get_base(buf), ggml_backend_buffer_get_size(buf));
        }
        ggml_backend_buffer_clear(buf, 0);
        ctxs_bufs.emplace_back(std::move(ctx), buf);
    }
    if (!tables.alloc(hparams.no_alloc)) {
        throw std::runtime_error("tca: failed to allocate the selection tables; lower n_ctx or use a smaller cache type");
    }
}

int llama_kv_cache_tca::n_chunks(int32_t il) const {
    int64_t longest = 0;
    for (uint32_t h = 0; h < plan.n_head_kv(); ++h) {
        longest = std::max(longest, plan.capacity(il, h));
    }
    return tca_attn_n_chunks(longest);
}

uint64_t llama_kv_cache_tca::bytes() const {
    uint64_t n = 0;
    for (const layer & l : layers) {
        n += l.k ? ggml_nbytes(l.k) + ggml_nbytes(l.v) + ggml_nbytes(l.pos) : 0;
    }
    return n;
}

uint64_t llama_kv_cache_tca::bytes_dense() const {
    uint64_t n = 0;
    for (const layer & l : layers) {
        if (!l.k) {
            continue;
        }
        n += (ggml_row_size(type_k, l.k->ne[0]) + ggml_row_size(type_v, l.v->ne[0]))*
            plan.n_head_kv()*plan.n_ctx_seq*streams.size();
    }
    return n;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_kv_cache_tca::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : ctxs_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += model.hparams.no_alloc ?
            ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    tables.breakdown(res);
    return res;
}

//
// batches
//

bool llama_kv_cache_tca::split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool sequential, std::vector<llama_ubatch> & ubatches) const {
    balloc.split_reset();
    ubatches.clear();
    std::vector<uint64_t>     n_tokens(streams.size());
    std::vector<int64_t>      next_pos(streams.size());
    for (size_t s = 0; s < streams.size(); ++s) {
        n_tokens[s] = streams[s].state.n_tokens;
        next_pos[s] = n_tokens[s] == 0 ? -1 : (int64_t) streams[s].pos0 + streams[s].state.n_tokens;  // -1: any
    }

    while (true) {
        llama_ubatch ubatch = balloc.split_equal(n_ubatch, sequential, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            if (ubatch.n_seq_id[i] != 1) {
                LLAMA_LOG_ERROR("tca: a token belongs to %d sequences; the ragged cache needs one sequence a token\n", ubatch.n_seq_id[i]);
                return false;
            }
        }
        for (uint32_t s = 0; s < ubatch.n_seqs; ++s) {
            const llama_seq_id id = ubatch.seq_id[s*ubatch.n_seq_tokens][0];
            for (uint32_t i = s*ubatch.n_seq_tokens; i < (s + 1)*ubatch.n_seq_tokens; ++i) {
                // positions are stored by counting; llama.cpp itself lets a position occur twice
                if (next_pos[id] >= 0 && ubatch.pos[i] != next_pos[id]) {
                    LLAMA_LOG_ERROR("tca: position %d of sequence %d does not follow %lld; the ragged cache needs consecutive positions\n",
                            ubatch.pos[i], id, (long long) next_pos[id] - 1);
                    return false;
                }
                next_pos[id] = (int64_t) ubatch.pos[i] + 1;
            }
            n_tokens[id] += ubatch.n_seq_tokens;
        }
        ubatches.push_back(std::move(ubatch));
    }
    if (balloc.get_n_used() < balloc.get_n_tokens()) {
        return false;
    }
    for (uint64_t n : n_tokens) {
        if (n > plan.n_ctx_seq) {
            return false;  // the context is full: llama_decode returns 1, as with the stock cache
        }
    }
    return true;
}

llama_memory_context_ptr llama_kv_cache_tca::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool /*embd_all*/) {
    std::vector<llama_ubatch> ubatches;
    if (!split(balloc, n_ubatch, false, ubatches)) {
        return std::make_unique<llama_kv_cache_tca_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }
    return std::make_unique<llama_kv_cache_tca_context>(this, std::move(ubatches));
}

llama_memory_context_ptr llama_kv_cache_tca::init_full() {
    return std::make_unique<llama_kv_cache_tca_context>(this);
}

llama_memory_context_ptr llama_kv_cache_tca::init_update(llama_context * lctx, bool /*optimize*/) {
    if (!has_pending_copies()) {
        return std::make_unique<llama_kv_cache_tca_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
    }
    llama_synchronize(lctx);
    return std::make_unique<llama_kv_cache_tca_context>(this, LLAMA_MEMORY_STATUS_SUCCESS);
}

//
// sequences
//

void llama_kv_cache_tca::clear(bool data) {
    for (stream & s : streams) {
        s = {};
    }
    copies.clear();
    if (data) {
        for (auto & [_, buf] : ctxs_bufs) {
            ggml_backend_buffer_clear(buf.get(), 0);
        }
    }
}

bool llama_kv_cache_tca::can_rm(const stream & s, llama_pos p0, llama_pos p1) const {
    const llama_pos end = s.pos0 + (llama_pos) s.state.n_tokens;
    if (p1 <= s.pos0 || p0 >= end || p0 >= p1) {
        return true;   // nothing to remove
    }
    if (p0 <= s.pos0 && p1 >= end) {
        return true;   // the whole sequence
    }
    return p1 >= end && p0 >= s.pos0 + (llama_pos) plan.n_fixed(s.state);
}

void llama_kv_cache_tca::rm(stream & s, llama_pos p0, llama_pos p1) {
    const llama_pos end = s.pos0 + (llama_pos) s.state.n_tokens;
    if (p1 <= s.pos0 || p0 >= end || p0 >= p1) {
        return;
    }
    if (p0 <= s.pos0) {
        s = {};
    } else {
        s.state.n_tokens = p0 - s.pos0;
    }
}

bool llama_kv_cache_tca::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(seq_id == -1 || (seq_id >= 0 && (size_t) seq_id < streams.size()));
    p0 = p0 < 0 ? 0 : p0;
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    const size_t first = seq_id < 0 ? 0              : seq_id;
    const size_t last  = seq_id < 0 ? streams.size() : seq_id + 1;
    for (size_t s = first; s < last; ++s) {
        if (std::find(compacting.begin(), compacting.end(), s) != compacting.end()) {
            // llama_decode takes back a micro-batch that failed: a group may be compacted in some layers and not in others
            LLAMA_LOG_WARN("tca: the micro-batch that failed was compacting sequence %zu, which is now empty\n", s);
            streams[s] = {};
        }
    }
    for (size_t s = first; s < last; ++s) {
        if (!can_rm(streams[s], p0, p1)) {
            return false;
        }
    }
    for (size_t s = first; s < last; ++s) {
        rm(streams[s], p0, p1);
    }
    return true;
}

void llama_kv_cache_tca::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_ASSERT(seq_id_src >= 0 && (size_t) seq_id_src < streams.size());
    GGML_ASSERT(seq_id_dst >= 0 && (size_t) seq_id_dst < streams.size());
    if (seq_id_src == seq_id_dst) {
        return;
    }
    p0 = p0 < 0 ? 0 : p0;
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    const stream & src = streams[seq_id_src];
    stream         dst = src;
    if (p0 > src.pos0 || (p1 < src.pos0 + (llama_pos) src.state.n_tokens && !can_rm(src, p1, std::numeric_limits<llama_pos>::max()))) {
        // the interface has no way to fail: leave an empty sequence, which no caller can mistake for a copy
        LLAMA_LOG_ERROR("tca: seq_cp of positions [%d, %d) is not possible, part of them was compacted; sequence %d is now empty\n",
                p0, p1, seq_id_dst);
        streams[seq_id_dst] = {};
        return;
    }
    rm(dst, p1, std::numeric_limits<llama_pos>::max());

    streams[seq_id_dst] = dst;
    copies.push_back({ (uint32_t) seq_id_src, (uint32_t) seq_id_dst, dst.state });
}

template <typename F>
void llama_kv_cache_tca::for_each_region(uint32_t s, const tca_seq_state & state, F && visit) const {
    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        for (uint32_t h = 0; h < plan.n_head_kv() && plan.layer_stored(il); ++h) {
            visit(layers[il], s*plan.slots(il) + plan.offset(il, h), plan.length(il, h, state));
        }
    }
}

void llama_kv_cache_tca::copy_pending_streams() const {
    std::vector<uint8_t> buffer;
    for (const stream_copy & copy : copies) {
        const int64_t distance = (int64_t) copy.to - copy.from;
        for_each_region(copy.from, copy.state, [&](const layer & l, int64_t slot, int64_t n) {
            const int64_t shift = distance*(l.pos->ne[0]/(int64_t) streams.size());
            for (ggml_tensor * t : { l.k, l.v, l.pos }) {
                const size_t row = t == l.pos ? t->nb[0] : t->nb[1];
                buffer.resize(n*row);
                ggml_backend_tensor_get(t, buffer.data(), slot*row,           n*row);
                ggml_backend_tensor_set(t, buffer.data(), (slot + shift)*row, n*row);
            }
        });
    }
    copies.clear();
}

void llama_kv_cache_tca::seq_keep(llama_seq_id seq_id) {
    GGML_ASSERT(seq_id >= 0 && (size_t) seq_id < streams.size());
    for (size_t s = 0; s < streams.size(); ++s) {
        if ((llama_seq_id) s != seq_id) {
            streams[s] = {};
        }
    }
}

void llama_kv_cache_tca::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    if (shift != 0 && p0 != p1 && seq_pos_max(seq_id) >= std::max(p0, 0)) {
        LLAMA_LOG_ERROR("tca: positions in the ragged cache cannot be shifted; seq_add(%d, %d, %d, %d) was ignored\n", seq_id, p0, p1, shift);
    }
}

void llama_kv_cache_tca::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    if (d != 1 && p0 != p1 && seq_pos_max(seq_id) >= std::max(p0, 0)) {
        LLAMA_LOG_ERROR("tca: positions in the ragged cache cannot be divided; seq_div(%d, %d, %d, %d) was ignored\n", seq_id, p0, p1, d);
    }
}

llama_pos llama_kv_cache_tca::seq_pos_min(llama_seq_id seq_id) const {
    GGML_ASSERT(seq_id >= 0 && (size_t) seq_id < streams.size());
    const stream & s = streams[seq_id];
    if (s.state.n_tokens == 0) {
        return -1;
    }
    return s.pos0 + std::max<llama_pos>(0, (llama_pos) plan.n_fixed(s.state) - 1);
}

llama_pos llama_kv_cache_tca::seq_pos_max(llama_seq_id seq_id) const {
    GGML_ASSERT(seq_id >= 0 && (size_t) seq_id < streams.size());
    const stream & s = streams[seq_id];
    return s.state.n_tokens == 0 ? -1 : s.pos0 + (llama_pos) s.state.n_tokens - 1;
}

//
// state
//

void llama_kv_cache_tca::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags /*flags*/) const {
    copy_pending_streams();  // callers synchronize first (llama_state_*)

    const uint32_t first = seq_id < 0 ? 0              : seq_id;
    const uint32_t last  = seq_id < 0 ? streams.size() : seq_id + 1;
    const uint32_t head[] = { STATE_MAGIC, last - first, (uint32_t) type_k, (uint32_t) type_v, plan.n_layer(), plan.n_head_kv() };
    io.write(head, sizeof(head));

    for (uint32_t s = first; s < last; ++s) {
        const stream & st = streams[s];
        io.write(&st.state.n_tokens, sizeof(uint32_t));
        io.write(&st.state.n_groups, sizeof(uint32_t));
        io.write(&st.pos0,           sizeof(llama_pos));
        for_each_region(s, st.state, [&](const layer & l, int64_t slot, int64_t n) {
            const uint32_t n_slots = n;
            io.write(&n_slots, sizeof(n_slots));
            if (n > 0) {
                io.write_tensor(l.k,   slot*l.k->nb[1],   n*l.k->nb[1]);
                io.write_tensor(l.v,   slot*l.v->nb[1],   n*l.v->nb[1]);
                io.write_tensor(l.pos, slot*l.pos->nb[0], n*l.pos->nb[0]);
            }
        });
    }
}

void llama_kv_cache_tca::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags /*flags*/) {
    GGML_ASSERT(seq_id == -1 || (seq_id >= 0 && (size_t) seq_id < streams.size()));
    const uint32_t first = seq_id < 0 ? 0              : seq_id;
    const uint32_t last  = seq_id < 0 ? streams.size() : seq_id + 1;
    const uint32_t want[] = { STATE_MAGIC, last - first, (uint32_t) type_k, (uint32_t) type_v, plan.n_layer(), plan.n_head_kv() };
    uint32_t head[6];
    io.read(head, sizeof(head));
    if (memcmp(head, want, sizeof(head)) != 0) {
        throw std::runtime_error("tca: the saved state does not come from a ragged cache with the same number of sequences, types and heads");
    }

    // until everything was read, the sequences are empty: a broken state leaves nothing that looks valid
    copy_pending_streams();
    std::vector<stream> restored(last - first);
    for (uint32_t s = first; s < last; ++s) {
        streams[s] = {};
    }
    for (uint32_t s = first; s < last; ++s) {
        stream & st = restored[s - first];
        io.read(&st.state.n_tokens, sizeof(uint32_t));
        io.read(&st.state.n_groups, sizeof(uint32_t));
        io.read(&st.pos0,           sizeof(llama_pos));
        if (!plan.possible(st.state) || st.pos0 < 0 || st.pos0 > std::numeric_limits<llama_pos>::max() - (llama_pos) plan.n_ctx_seq) {
            throw std::runtime_error("tca: the saved state does not fit this context; use the same n_ctx and budgets");
        }
        for_each_region(s, st.state, [&](const layer & l, int64_t slot, int64_t n) {
            uint32_t n_slots;
            io.read(&n_slots, sizeof(n_slots));
            if (n_slots != n) {
                throw std::runtime_error("tca: the saved state was made with other budgets");
            }
            if (n > 0) {
                io.read_tensor(l.k,   slot*l.k->nb[1],   n*l.k->nb[1]);
                io.read_tensor(l.v,   slot*l.v->nb[1],   n*l.v->nb[1]);
                io.read_tensor(l.pos, slot*l.pos->nb[0], n*l.pos->nb[0]);
            }
        });
    }
    std::copy(restored.begin(), restored.end(), streams.begin() + first);
}

//
// llama_kv_cache_tca_context
//

llama_kv_cache_tca_context::llama_kv_cache_tca_context(llama_memory_status status) : status(status) {
}

llama_kv_cache_tca_context::llama_kv_cache_tca_context(llama_kv_cache_tca * kv) :
        status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), reserving(true) {
}

llama_kv_cache_tca_context::llama_kv_cache_tca_context(llama_kv_cache_tca * kv, llama_memory_status status) : status(status), kv(kv) {
}

llama_kv_cache_tca_context::llama_kv_cache_tca_context(llama_kv_cache_tca * kv, std::vector<llama_ubatch> ubatches) :
        status(LLAMA_MEMORY_STATUS_SUCCESS), kv(kv), ubatches(std::move(ubatches)) {
}

llama_kv_cache_tca_context::~llama_kv_cache_tca_context() {
    if (!ubatches.empty()) {
        kv->set_compacting({});
    }
}

bool llama_kv_cache_tca_context::next() {
    kv->set_compacting({});
    return ++i_cur < ubatches.size();
}

bool llama_kv_cache_tca_context::apply() {
    GGML_ASSERT(!llama_memory_status_is_fail(status));

    if (ubatches.empty()) {
        kv->copy_pending_streams();
        return true;
    }

    const llama_ubatch & ubatch = ubatches[i_cur];

    cur.clear();
    std::vector<uint32_t> compacting;
    for (uint32_t i = 0; i < ubatch.n_seqs; ++i) {
        const uint32_t     token = i*ubatch.n_seq_tokens;
        const llama_seq_id id    = ubatch.seq_id[token][0];

        llama_kv_cache_tca::stream & stream = kv->get_stream(id);
        if (stream.state.n_tokens == 0) {
            stream.pos0 = ubatch.pos[token];
        }
        uint32_t done = 0;
        const std::vector<tca_segment> segments = kv->get_plan().advance(stream.state, ubatch.n_seq_tokens);
        for (size_t j = 0; j < segments.size(); ++j) {
            if (cur.size() <= j) {
                cur.resize(j + 1, std::vector<seq_segment>(ubatch.n_seqs));  // zeros: nothing to do for a sequence
            }
            cur[j][i] = { (uint32_t) id, token + done, (llama_pos) (ubatch.pos[token] + done), segments[j] };
            done += segments[j].n_tokens;
        }
        if (segments.front().compacts) {  // only the last segment may not
            compacting.push_back(id);
        }
    }
    kv->set_compacting(std::move(compacting));
    return true;
}

uint32_t llama_kv_cache_tca_context::n_segments(const llama_ubatch & ubatch) const {
    return reserving ? kv->get_plan().max_segments(ubatch.n_seq_tokens) : cur.size();
}
