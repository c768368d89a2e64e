#include "tca-store.h"

#include "llama-model-tca.h"
#include "tca-device.h"
#include "tca-hash.h"
#include "tca-rope.h"

#include "cpu/tca-pages.h"
#include "metrics/tca-metric.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

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

llama_tca_store::llama_tca_store(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, ggml_type type_v) :
        model(model), plan_full(std::make_shared<tca_plan>(model.tca->budgets, cparams.n_ctx_seq)), type_k(type_k), type_v(type_v),
        n_ctx(cparams.n_ctx), shared(cparams.kv_unified && cparams.n_seq_max > 1), tables(model.tca->budgets.n_layer) {
    const llama_hparams & hparams = model.hparams;
    const tca_plan      & plan    = *plan_full;

    const uint32_t n_layer  = plan.n_layer();
    const uint32_t n_stream = cparams.n_seq_max;
    layers.resize(n_layer);
    n_slots.resize(n_layer);
    for (uint32_t il = 0; il < n_layer; ++il) {
        n_slots[il] = llama_tca_store_slots(plan, il, n_ctx, n_stream, shared);
    }
    rooms.resize(n_stream);
    rooms = lay_out(std::vector<uint32_t>(n_stream, shared ? 0 : cparams.n_ctx_seq));

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
        const tca_layer_shape shape = { type_k, type_v, head_dim_k, head_dim_v, hparams.n_head(il), hparams.n_head_kv(il),
            model.layers[il].attn_sinks != nullptr };
        const auto refuse = [](const std::string & problem) {
            if (!problem.empty()) {
                throw std::runtime_error("tca: " + problem);
            }
        };
        refuse(tca_types_problem(shape));
        if (shape.sinks && (tca_metric_find(plan.budgets.metric.c_str())->needs & TCA_NEEDS_QUERIES)) {
            refuse("metric " + plan.budgets.metric + " looks at attention and does not know the attention sinks of this model; use another one");
        }

        const int layer_rot_k = hadamard_size_k(type_k, head_dim_k);
        const int layer_rot_v = hparams.is_mla() ? 0 : hadamard_size_v(type_v, head_dim_v);  // latent values are multiplied before they are turned back
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

        if (n_slots[il] > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error("tca: the context is too large for one cache; lower n_ctx or the number of sequences");
        }
        l.k   = ggml_new_tensor_2d(ctx.get(), type_k, head_dim_k, n_slots[il]);
        l.v   = ggml_new_tensor_2d(ctx.get(), type_v, head_dim_v, n_slots[il]);
        l.pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_slots[il]);
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

int llama_tca_store::n_chunks(int32_t il) const {
    int64_t longest = 0;
    for (uint32_t h = 0; h < plan_full->n_head_kv(); ++h) {
        longest = std::max(longest, plan_full->capacity(il, h));
    }
    return tca_attn_n_chunks(longest);
}

uint64_t llama_tca_store::bytes() const {
    uint64_t n = 0;
    for (const layer & l : layers) {
        n += l.k ? ggml_nbytes(l.k) + ggml_nbytes(l.v) + ggml_nbytes(l.pos) : 0;
    }
    return n;
}

uint64_t llama_tca_store::bytes_dense() const {
    uint64_t n = 0;
    for (const layer & l : layers) {
        if (l.k) {
            // the stock cache of latent attention holds keys alone
            const size_t row_v = model.hparams.is_mla() ? 0 : ggml_row_size(type_v, l.v->ne[0]);
            n += (ggml_row_size(type_k, l.k->ne[0]) + row_v)*plan_full->n_head_kv()*n_ctx;
        }
    }
    return n;
}

uint64_t llama_tca_store::fingerprint() const {
    uint64_t hash = TCA_HASH_START;
    const auto add = [&hash](const auto * data, size_t n) { hash = tca_hash(hash, data, n*sizeof(*data)); };

    const tca_budgets_data & b = plan_full->budgets;
    const uint32_t numbers[] = { b.block_size, b.group_size, b.window, b.sinks, b.n_layer, b.n_head_kv, b.n_probe,
        (uint32_t) type_k, (uint32_t) type_v };
    add(numbers, std::size(numbers));
    add(b.metric.data(), b.metric.size());
    add(b.keep_counts.data(), b.keep_counts.size());
    add(b.probe.data(), b.probe.size());
    for (uint32_t il = 0; il < b.n_layer; ++il) {
        for (uint32_t h = 0; h < b.n_head_kv; ++h) {
            const int32_t config = plan_full->config(il, h);
            add(&config, 1);
            if (config >= 0) {  // rows by what they say: files may number them differently
                add(&b.configs[config*b.keep_counts.size()], b.keep_counts.size());
            }
        }
        const int64_t dims[] = { layers[il].k ? layers[il].k->ne[0] : 0, layers[il].v ? layers[il].v->ne[0] : 0 };
        add(dims, 2);
    }
    return hash;
}

std::map<ggml_backend_buffer_type_t, size_t> llama_tca_store::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> res;
    for (const auto & [ctx, buf] : ctxs_bufs) {
        ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(buf.get());
        res[buft] += model.hparams.no_alloc ?
            ggml_backend_alloc_ctx_tensors_from_buft_size(ctx.get(), buft) : ggml_backend_buffer_get_size(buf.get());
    }
    tables.breakdown(res);
    return res;
}

void llama_tca_store::clear_data() {
    for (auto & [_, buf] : ctxs_bufs) {
        ggml_backend_buffer_clear(buf.get(), 0);
    }
}

//
// rooms
//

int64_t llama_tca_store_slots(const tca_plan & plan, uint32_t il, uint32_t n_ctx, uint32_t n_seqs, bool shared) {
    if (!shared) {
        return plan.slots(il)*n_seqs;
    }
    int64_t n = 0;
    for (uint32_t h = 0; h < plan.n_head_kv() && plan.layer_stored(il); ++h) {
        n += tca_plan_shared_capacity_for(plan.budgets.view(), plan.kept(il, h), n_ctx, n_seqs);
    }
    return n;
}

// One stream's part behind the other. A plan is made anew only for a room of another size.
std::vector<llama_tca_store::room> llama_tca_store::lay_out(const std::vector<uint32_t> & n_tokens) const {
    std::vector<room>    res(n_tokens.size());
    std::vector<int64_t> next(plan_full->n_layer(), 0);
    for (size_t s = 0; s < res.size(); ++s) {
        const bool same = rooms[s].plan && rooms[s].plan->n_ctx_seq == n_tokens[s];
        res[s].plan  = n_tokens[s] == plan_full->n_ctx_seq ? plan_full : same ? rooms[s].plan : std::make_shared<tca_plan>(*plan_full, n_tokens[s]);
        res[s].first = next;
        for (size_t il = 0; il < next.size(); ++il) {
            next[il] += res[s].plan->slots(il);
        }
    }
    return res;
}

bool llama_tca_store::overflows(const std::vector<room> & wanted) const {
    for (size_t il = 0; il < n_slots.size(); ++il) {
        if (wanted.back().first[il] + wanted.back().plan->slots(il) > n_slots[il]) {
            return true;
        }
    }
    return false;
}

bool llama_tca_store::fits(const std::vector<uint32_t> & n_tokens) const {
    const auto too_long = [this](uint32_t n) { return n > plan_full->n_ctx_seq; };
    return std::none_of(n_tokens.begin(), n_tokens.end(), too_long) && (!shared || !overflows(lay_out(n_tokens)));
}

bool llama_tca_store::has_room(const std::vector<uint32_t> & n_tokens) const {
    for (size_t s = 0; s < rooms.size(); ++s) {
        if (n_tokens[s] > rooms[s].plan->n_ctx_seq) {
            return false;
        }
    }
    return true;
}

bool llama_tca_store::stash_holds(const tca_seq_state & state) const {
    const tca_plan & p = *plan_full;
    return state.n_groups > 0 && (shared ? state.n_tokens - p.n_fixed(state) <= p.budgets.rollback : p.stash_holds(state));
}

// A run of slots of one region, by way of the host.
namespace {
struct run {
    const llama_tca_store::layer * l;
    int64_t slot;
    int64_t n;
};

void get_rows(const run & r, std::vector<uint8_t> & rows) {
    for (const ggml_tensor * t : { r.l->k, r.l->v, r.l->pos }) {
        const size_t size = t == r.l->pos ? t->nb[0] : t->nb[1];
        rows.resize(rows.size() + r.n*size);
        ggml_backend_tensor_get(t, rows.data() + rows.size() - r.n*size, r.slot*size, r.n*size);
    }
}

const uint8_t * set_rows(const run & r, const uint8_t * rows) {
    for (ggml_tensor * t : { r.l->k, r.l->v, r.l->pos }) {
        const size_t size = t == r.l->pos ? t->nb[0] : t->nb[1];
        ggml_backend_tensor_set(t, rows, r.slot*size, r.n*size);
        rows += r.n*size;
    }
    return rows;
}

// The runs that hold `held` in a room: every region of the layer, and its stash.
std::vector<run> runs_of(const llama_tca_store::layer & l, uint32_t il, const tca_plan & plan, int64_t first, const llama_tca_store::rows & held) {
    std::vector<run> runs;
    for (uint32_t h = 0; h < plan.n_head_kv(); ++h) {
        const int64_t at = first + plan.offset(il, h), freed = (int64_t) plan.budgets.group_size - plan.kept(il, h);
        runs.push_back({ &l, at, plan.length(il, h, held.state) });
        if (held.stash && freed > 0) {
            runs.push_back({ &l, at + plan.stash(il, h), freed });
        }
    }
    return runs;
}
}  // namespace

void llama_tca_store::make_room(const std::vector<uint32_t> & n_tokens, const std::vector<rows> & held) {
    GGML_ASSERT(shared);

    // the most that can be given to every stream in use beyond what it needs
    const auto with = [&](uint32_t extra) {
        std::vector<uint32_t> wanted = n_tokens;
        for (uint32_t & n : wanted) {
            n = n == 0 ? 0 : std::min<uint64_t>((uint64_t) n + extra, plan_full->n_ctx_seq);
        }
        return lay_out(wanted);
    };
    uint32_t least = 0, most = plan_full->n_ctx_seq;
    while (least < most) {
        const uint32_t middle = least + (most - least + 1)/2;
        if (overflows(with(middle))) {
            most = middle - 1;
        } else {
            least = middle;
        }
    }
    std::vector<room> wanted = with(least);
    GGML_ASSERT(!overflows(wanted));

    std::vector<uint8_t> buffer;
    for (uint32_t il = 0; il < plan_full->n_layer(); ++il) {
        if (!plan_full->layer_stored(il)) {
            continue;
        }
        buffer.clear();
        std::vector<run> to;
        for (size_t s = 0; s < rooms.size(); ++s) {
            if (held[s].state.n_tokens == 0) {
                continue;
            }
            for (const run & r : runs_of(layers[il], il, *rooms[s].plan, rooms[s].first[il], held[s])) {
                get_rows(r, buffer);
            }
            const std::vector<run> more = runs_of(layers[il], il, *wanted[s].plan, wanted[s].first[il], held[s]);
            to.insert(to.end(), more.begin(), more.end());
        }
        const uint8_t * next = buffer.data();
        for (const run & r : to) {
            next = set_rows(r, next);
        }
    }
    rooms = std::move(wanted);
}

//
// rows
//

void llama_tca_store::copy(uint32_t from, uint32_t to, const rows & held) {
    std::vector<uint8_t> buffer;
    for (uint32_t il = 0; il < plan_full->n_layer(); ++il) {
        if (!plan_full->layer_stored(il)) {
            continue;
        }
        const std::vector<run> source = runs_of(layers[il], il, plan(from), first_slot(from, il), held);
        const std::vector<run> target = runs_of(layers[il], il, plan(to),   first_slot(to, il),   held);
        for (size_t i = 0; i < source.size(); ++i) {
            buffer.clear();
            get_rows(source[i], buffer);
            set_rows(target[i], buffer.data());
        }
    }
}

void llama_tca_store::undo_compaction(uint32_t s, const tca_seq_state & state, uint32_t n_tokens) {
    const tca_plan & p       = plan(s);
    const uint32_t   n_group = p.budgets.group_size;
    const tca_seq_state before = { n_tokens, state.n_groups - 1 };  // of that compaction

    std::vector<uint8_t> kept, dropped, merged;
    for (uint32_t il = 0; il < p.n_layer(); ++il) {
        for (uint32_t h = 0; h < p.n_head_kv() && p.layer_compacts(il); ++h) {
            const int64_t n_kept = p.kept(il, h), n_dropped = n_group - n_kept;
            const layer & l     = layers[il];
            const int64_t at    = first_slot(s, il) + p.offset(il, h);
            const int64_t group = p.next_group_slot(il, h, before);
            const int64_t n     = p.length(il, h, before) - group;  // rows from the group on that shall be there
            if (n_dropped == 0 || n <= 0) {
                continue;
            }
            const int64_t n_old = n_kept + std::max<int64_t>(0, n - n_group);
            const run old_run = { &l, at + group, n_old }, stash = { &l, at + p.stash(il, h), n_dropped }, new_run = { &l, at + group, n };
            kept.clear();
            dropped.clear();
            get_rows(old_run, kept);
            get_rows(stash, dropped);

            const auto rows_of = [](const run & r, std::vector<uint8_t> & rows, const ggml_tensor * t) {
                const size_t before_v = r.n*r.l->k->nb[1], before_pos = before_v + r.n*r.l->v->nb[1];
                return rows.data() + (t == r.l->k ? 0 : t == r.l->v ? before_v : before_pos);
            };
            const auto * pos_kept    = (const int32_t *) rows_of(old_run, kept, l.pos);
            const auto * pos_dropped = (const int32_t *) rows_of(stash, dropped, l.pos);

            merged.resize(n*(l.k->nb[1] + l.v->nb[1] + l.pos->nb[0]));
            int64_t i = 0, j = 0;
            for (int64_t to = 0; to < n; ++to) {
                // the group's rows by position, then those behind it
                const bool    from_stash = j < n_dropped && (i >= n_kept || pos_dropped[j] < pos_kept[i]);
                const int64_t row        = from_stash ? j++ : i++;
                for (ggml_tensor * t : { l.k, l.v, l.pos }) {
                    const size_t size = t == l.pos ? t->nb[0] : t->nb[1];
                    memcpy(rows_of(new_run, merged, t) + to*size, (from_stash ? rows_of(stash, dropped, t) : rows_of(old_run, kept, t)) + row*size, size);
                }
            }
            set_rows(new_run, merged.data());
        }
    }
}
