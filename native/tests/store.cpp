#include "store.h"

#include "reference/tca-reference.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

bool fits(ggml_type type, int n) {
    return n % ggml_blck_size(type) == 0;
}

std::string store_shape::name() const {
    return text_of("K %s x %d, V %s x %d, %d KV heads x %d", ggml_type_name(type_k), dk, ggml_type_name(type_v), dv, n_head_kv, gqa);
}

static std::vector<float> to_f32(ggml_type type, const uint8_t * rows, int64_t n) {
    std::vector<float> res(n);
    if (type == GGML_TYPE_F32) {
        memcpy(res.data(), rows, n*sizeof(float));
    } else if (n > 0) {
        ggml_get_type_traits(type)->to_float(rows, res.data(), n);
    }
    return res;
}

void micro_batch::fill(const store_shape & s, int n, random_t & rng) {
    n_tokens = n;
    q.resize((size_t) n*s.n_head_kv*s.gqa*s.dk);
    k.resize((size_t) n*s.n_head_kv*s.dk);
    v.resize((size_t) n*s.n_head_kv*s.dv);
    for (auto * x : { &q, &k, &v }) {
        for (float & value : *x) {
            value = rng.normal();
        }
    }
}

test_store::test_store(const store_shape & s, uint64_t seed) : shape(s),
        row_k(ggml_row_size(s.type_k, s.dk)), row_v(ggml_row_size(s.type_v, s.dv)) {
    ggml_cpu_init();  // tables that the f16 conversions need
    n_slots = s.guard;
    for (const auto & stream : s.capacity) {
        regions.emplace_back();
        for (const int64_t capacity : stream) {
            region_t r;
            r.offset   = n_slots;
            r.capacity = capacity;
            regions.back().push_back(r);
            n_slots += capacity + s.guard;
        }
    }
    // 0xff.. is a NaN in f32, f16 and bf16, and a NaN scale in q8_0 and q4_0: reading a slot that is not in use shows
    k.assign(n_slots*row_k, 0xff);
    v.assign(n_slots*row_v, 0xff);
    pos.resize(n_slots);
    random_t rng(seed);
    for (int32_t & p : pos) {
        p = -1000 - rng.below(1000);
    }
    k0 = k; v0 = v; pos0 = pos;
}

void test_store::expect_append(region_t & r, const float * k_row, const float * v_row, int32_t position) {
    CHECK((int64_t) r.pos.size() < r.capacity, "the test overfills a region of %lld", (long long) r.capacity);
    r.k.resize(r.k.size() + row_k);
    r.v.resize(r.v.size() + row_v);
    ggml_get_type_traits_cpu(shape.type_k)->from_float(k_row, r.k.data() + r.k.size() - row_k, shape.dk);
    ggml_get_type_traits_cpu(shape.type_v)->from_float(v_row, r.v.data() + r.v.size() - row_v, shape.dv);
    r.pos.push_back(position);
    if ((int64_t) r.pos.size() > r.stash_at) {
        r.stash_at = -1;  // grown into, and lost for good
    }
}

void test_store::append(region_t & r, const float * k_row, const float * v_row, int32_t position) {
    expect_append(r, k_row, v_row, position);
    const int64_t slot = r.offset + r.pos.size() - 1;
    memcpy(&k[slot*row_k], &r.k[r.k.size() - row_k], row_k);
    memcpy(&v[slot*row_v], &r.v[r.v.size() - row_v], row_v);
    pos[slot] = position;
}

void test_store::fill(int stream, int head, int64_t n, int32_t first_pos, random_t & rng) {
    std::vector<float> kr(shape.dk), vr(shape.dv);
    for (int64_t i = 0; i < n; ++i) {
        for (float & x : kr) {
            x = rng.normal();
        }
        for (float & x : vr) {
            x = rng.normal();
        }
        append(regions[stream][head], kr.data(), vr.data(), first_pos + i);
    }
}

void test_store::cut(region_t & r, int64_t n) {
    r.k.resize(n*row_k);
    r.v.resize(n*row_v);
    r.pos.resize(n);
}

// The last slots of the region, over rows that move if it is full; every third region goes without.
int64_t test_store::stash_slot(const region_t & r, const tca_select_params & p, int32_t config) const {
    int64_t dropped = p.group_size;
    for (int j = 0; j < p.n_keep; ++j) {
        dropped -= p.keep_counts[j]*p.configs[config*p.n_keep + j];
    }
    return r.offset % 3 == 0 ? -1 : r.capacity - dropped;
}

void test_store::expect_compact(region_t & r, int head, const test_segment & seg, const micro_batch & mb, const tca_select_params & p) {
    const int64_t group = seg.group[head];
    const std::vector<float> keys   = to_f32(shape.type_k, r.k.data() + group*row_k, (int64_t) p.group_size*shape.dk);
    const std::vector<float> values = to_f32(shape.type_v, r.v.data() + group*row_v, (int64_t) p.group_size*shape.dv);
    std::vector<int32_t> kept(p.group_size);
    std::vector<float>   scores(p.group_size);
    const tca_group g = { p.group_size, shape.dk, shape.dv, p.layer, head, keys.data(), values.data(), r.pos.data() + group, &p.rope,
        p.probe ? p.probe + (size_t) head*shape.dk : nullptr };
    const int64_t used   = r.pos.size();
    const int     newest = std::min(seg.count, (int) TCA_OBSERVED_QUERIES), n_head = shape.n_head_kv*shape.gqa;
    std::vector<double> observed(used);
    tca_reference_observe(&mb.q[(size_t) (seg.token + seg.count - newest)*n_head*shape.dk], to_f32(shape.type_k, r.k.data(), used*shape.dk).data(),
            newest, n_head, head*shape.gqa, shape.gqa, shape.dk, used, shape.scale, shape.softcap, observed.data());
    const int n = tca_reference_select(p.metric->name, g, p.hadamard, observed.data() + group, p.block_size, p.n_keep, p.keep_counts,
            p.configs + (size_t) seg.config[head]*p.n_keep, kept.data(), scores.data());
    region_t res = r;
    cut(res, group);
    res.stash_at = stash_slot(r, p, seg.config[head]);
    res.stash_k.clear();
    res.stash_v.clear();
    res.stash_pos.clear();
    for (int64_t i = 0; i < (int64_t) r.pos.size() - group; ++i) {
        const bool    dropped = i < p.group_size && !std::binary_search(kept.begin(), kept.begin() + n, (int32_t) i);
        const int64_t at      = group + i;
        auto & to_k = dropped ? res.stash_k : res.k;
        auto & to_v = dropped ? res.stash_v : res.v;
        to_k.insert(to_k.end(), r.k.begin() + at*row_k, r.k.begin() + (at + 1)*row_k);
        to_v.insert(to_v.end(), r.v.begin() + at*row_v, r.v.begin() + (at + 1)*row_v);
        (dropped ? res.stash_pos : res.pos).push_back(r.pos[at]);
    }
    r = res;
}

void test_store::check_memory() const {
    std::vector<bool> inside(n_slots, false);
    for (size_t s = 0; s < regions.size(); ++s) {
        for (size_t h = 0; h < regions[s].size(); ++h) {
            const region_t & r = regions[s][h];
            for (int64_t i = 0; i < (int64_t) r.pos.size(); ++i) {
                const int64_t slot = r.offset + i;
                CHECK(pos[slot] == r.pos[i], "%s: stream %zu head %zu slot %lld has position %d, not %d", shape.name().c_str(), s, h,
                        (long long) i, pos[slot], r.pos[i]);
                CHECK(memcmp(&k[slot*row_k], &r.k[i*row_k], row_k) == 0, "%s: stream %zu head %zu slot %lld: key", shape.name().c_str(), s, h, (long long) i);
                CHECK(memcmp(&v[slot*row_v], &r.v[i*row_v], row_v) == 0, "%s: stream %zu head %zu slot %lld: value", shape.name().c_str(), s, h, (long long) i);
            }
            for (int64_t i = 0; r.stash_at >= 0 && i < (int64_t) r.stash_pos.size(); ++i) {
                const int64_t slot = r.offset + r.stash_at + i;
                CHECK(pos[slot] == r.stash_pos[i] && memcmp(&k[slot*row_k], &r.stash_k[i*row_k], row_k) == 0 &&
                        memcmp(&v[slot*row_v], &r.stash_v[i*row_v], row_v) == 0, "%s: stream %zu head %zu: row %lld of the stash", shape.name().c_str(),
                        s, h, (long long) i);
            }
            std::fill(inside.begin() + r.offset, inside.begin() + r.offset + r.capacity, true);
        }
    }
    for (int64_t slot = 0; slot < n_slots; ++slot) {
        CHECK(inside[slot] || (pos[slot] == pos0[slot] && memcmp(&k[slot*row_k], &k0[slot*row_k], row_k) == 0 &&
                memcmp(&v[slot*row_v], &v0[slot*row_v], row_v) == 0), "%s: guard slot %lld was written", shape.name().c_str(), (long long) slot);
    }
}

// Attention of one query over n slots in the arithmetic of T.
template <typename T>
static void attend(const float * q, const float * keys, const float * values, int64_t n, int dk, int dv, T scale, T softcap, T * out) {
    std::vector<T> s(n);
    T max = -std::numeric_limits<T>::infinity(), sum = 0;
    for (int64_t j = 0; j < n; ++j) {
        T dot = 0;
        for (int i = 0; i < dk; ++i) {
            dot += (T) q[i]*(T) keys[j*dk + i];
        }
        s[j] = dot*scale;
        if (softcap != 0) {
            s[j] = softcap*std::tanh(s[j]/softcap);
        }
        max = std::max(max, s[j]);
    }
    std::fill_n(out, dv, (T) 0);
    for (int64_t j = 0; j < n; ++j) {
        const T p = std::exp(s[j] - max);
        sum += p;
        for (int i = 0; i < dv; ++i) {
            out[i] += p*(T) values[j*dv + i];
        }
    }
    for (int i = 0; i < dv; ++i) {
        out[i] /= sum;
    }
}

namespace {

// Memory of the graph's tensors: an allocation of its own each, so that a sanitizer sees the end of every tensor.
struct arena {
    std::vector<std::unique_ptr<uint8_t[]>> blocks;

    void * get(size_t n, uint8_t fill) {
        blocks.emplace_back(new uint8_t[n]);
        memset(blocks.back().get(), fill, n);
        return blocks.back().get();
    }
};

} // namespace

step_result test_store::run(const micro_batch & mb, const step_options & o) {
    const store_shape & s = shape;
    const int n_head   = s.n_head_kv*s.gqa;
    const int n_rows   = mb.segments.size();
    const int n_seqs   = mb.segments[0].size();
    const std::string where = s.name() + text_of(", %d tokens, %d segments, %d sequences, %d threads%s", mb.n_tokens, n_rows, n_seqs,
            o.n_threads, o.fused ? ", fused" : "");

    arena memory;
    const ggml_context_ptr ctx { ggml_init({ 256*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };

    // the store and the descriptor
    ggml_tensor * tk = ggml_new_tensor_2d(ctx.get(), s.type_k, s.dk, n_slots);
    ggml_tensor * tv = ggml_new_tensor_2d(ctx.get(), s.type_v, s.dv, n_slots);
    ggml_tensor * tp = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, n_slots);
    ggml_tensor * td = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I32, TCA_DESC_SIZE, s.n_head_kv, n_seqs, n_rows);
    tk->data = k.data();
    tv->data = v.data();
    tp->data = pos.data();
    td->data = memory.get(ggml_nbytes(td), 0);

    // q, k, v of the micro-batch
    ggml_tensor *q, *kc, *vc;
    if (o.fused) {
        const int64_t width = (int64_t) n_head*s.dk + s.n_head_kv*(s.dk + s.dv);
        const int64_t at_k = (int64_t) n_head*s.dk, at_v = at_k + s.n_head_kv*s.dk;
        ggml_tensor * qkv = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, width, mb.n_tokens);
        float * data = (float *) memory.get(ggml_nbytes(qkv), 0);
        qkv->data = data;
        for (int t = 0; t < mb.n_tokens; ++t) {
            std::copy_n(&mb.q[(size_t) t*at_k], at_k, data + t*width);
            std::copy_n(&mb.k[(size_t) t*s.n_head_kv*s.dk], s.n_head_kv*s.dk, data + t*width + at_k);
            std::copy_n(&mb.v[(size_t) t*s.n_head_kv*s.dv], s.n_head_kv*s.dv, data + t*width + at_v);
        }
        q  = ggml_view_3d(ctx.get(), qkv, s.dk, n_head,      mb.n_tokens, s.dk*4, width*4, 0);
        kc = ggml_view_3d(ctx.get(), qkv, s.dk, s.n_head_kv, mb.n_tokens, s.dk*4, width*4, at_k*4);
        vc = ggml_view_3d(ctx.get(), qkv, s.dv, s.n_head_kv, mb.n_tokens, s.dv*4, width*4, at_v*4);
    } else {
        q  = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, s.dk, n_head,      mb.n_tokens);
        kc = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, s.dk, s.n_head_kv, mb.n_tokens);
        vc = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, s.dv, s.n_head_kv, mb.n_tokens);
        for (const auto & [t, data] : { std::make_pair(q, &mb.q), std::make_pair(kc, &mb.k), std::make_pair(vc, &mb.v) }) {
            t->data = memory.get(ggml_nbytes(t), 0);
            memcpy(t->data, data->data(), ggml_nbytes(t));
        }
    }

    // what must come out, computed segment by segment while the descriptor is written
    step_result res;
    res.exact.assign((size_t) mb.n_tokens*n_head*s.dv, 0.0);
    std::vector<float> f32((size_t) mb.n_tokens*n_head*s.dv);
    std::vector<bool>  written(mb.n_tokens, false);
    int64_t longest = 1, max_count = 0;
    int32_t * d = (int32_t *) td->data;
    for (const auto & row : mb.segments) {
        for (const test_segment & seg : row) {
            for (int h = 0; h < s.n_head_kv; ++h, d += TCA_DESC_SIZE) {
                region_t & r = regions[seg.stream][h];
                const bool compacts = seg.count > 0 && !seg.group.empty() && seg.group[h] >= 0;
                const int64_t past = seg.count > 0 ? r.pos.size() : 0;
                tca_desc x;
                x.offset = r.offset;
                x.past   = past;
                x.token  = seg.token;
                x.count  = seg.count;
                x.pos    = seg.pos;
                x.group  = compacts ? seg.group[h] : -1;
                x.config = seg.config.empty() ? TCA_HEAD_DENSE : seg.config[h];
                x.stash  = compacts && x.config >= 0 ? stash_slot(r, *o.select, x.config) : -1;
                x.write(d);

                for (int t = seg.token; t < seg.token + seg.count; ++t) {
                    expect_append(r, &mb.k[((size_t) t*s.n_head_kv + h)*s.dk], &mb.v[((size_t) t*s.n_head_kv + h)*s.dv], seg.pos + t - seg.token);
                }
                const int64_t used = r.pos.size();
                longest = std::max(longest, used);
                const std::vector<float> keys = to_f32(s.type_k, r.k.data(), used*s.dk), values = to_f32(s.type_v, r.v.data(), used*s.dv);
                for (int t = 0; t < seg.count; ++t) {
                    for (int g = 0; g < s.gqa; ++g) {
                        const size_t at = ((size_t) (seg.token + t)*n_head + h*s.gqa + g);
                        attend<double>(&mb.q[at*s.dk], keys.data(), values.data(), past + t + 1, s.dk, s.dv, s.scale, s.softcap, &res.exact[at*s.dv]);
                        attend<float> (&mb.q[at*s.dk], keys.data(), values.data(), past + t + 1, s.dk, s.dv, s.scale, s.softcap, &f32[at*s.dv]);
                    }
                    written[seg.token + t] = true;
                }
                if (compacts && d[TCA_DESC_CONFIG] != TCA_HEAD_DENSE) {
                    expect_compact(r, h, seg, mb, *o.select);
                }
            }
            max_count = std::max<int64_t>(max_count, seg.count);
        }
    }

    // the runtime's nodes, in its order
    const int64_t per_seq = std::max<int64_t>(max_count, mb.n_tokens/n_seqs);
    const bool split = o.split < 0 ? tca_attn_splits(per_seq, n_head, s.n_head_kv) : o.split == 1;
    ggml_cgraph * gf  = ggml_new_graph(ctx.get());
    ggml_tensor * cur = nullptr;
    const auto give = [&](ggml_tensor * node) {
        if (node->view_src) {
            node->data = (char *) node->view_src->data + node->view_offs;
        } else if (node->data == nullptr) {
            node->data = memory.get(ggml_nbytes(node), 0xff);  // NaN: an output nobody wrote shows
        }
    };
    const ggml_backend_ptr backend { ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), o.n_threads);
    tca_tables tables;
    if (o.select) {
        tables = tca_tables_new(ctx.get(), *o.select, s.dk, s.n_head_kv, nullptr);
        for (ggml_tensor * t : { tables.configs, tables.freqs, tables.probe }) {
            if (t) {
                give(t);
            }
        }
        tca_tables_set(tables, *o.select);
    }
    ggml_tensor * store = tk;
    for (int row = 0; row < n_rows; ++row) {
        ggml_tensor * ka = tca_build_append(ctx.get(), store, tv, tp, kc, vc, td, row);
        give(ka);
        cur = split ?
            tca_build_attn_split(ctx.get(), q, ka, tv, td, row, s.scale, s.softcap, tca_attn_n_chunks(longest), cur) :
            tca_build_attn      (ctx.get(), q, ka, tv, td, row, s.scale, s.softcap, cur);
        if (split) {
            give(tca_combine_node::of(cur).partial);
        }
        give(cur);
        CHECK(ggml_backend_supports_op(backend.get(), ka) && ggml_backend_supports_op(backend.get(), cur), "the CPU backend refuses a node");
        ggml_build_forward_expand(gf, ka);
        ggml_build_forward_expand(gf, cur);
        if (o.select) {
            ka = tca_build_compact(ctx.get(), ka, tv, tp, td, row, tables, q, s.scale, s.softcap);
            give(ka);
            CHECK(ggml_backend_supports_op(backend.get(), ka), "the CPU backend refuses to compact");
            ggml_build_forward_expand(gf, ka);
        }
        store = ka;
    }
    CHECK(ggml_backend_graph_compute(backend.get(), gf) == GGML_STATUS_SUCCESS, "%s: graph", where.c_str());

    // NaN, Inf and unwritten first, then the error
    res.out.resize(res.exact.size());
    const char * out = (const char *) cur->data;
    const bool other_shape = cur->ne[0] != s.dv || cur->ne[1] != n_head || cur->ne[2] != mb.n_tokens;
    CHECK(!other_shape, "%s: shape of the output", where.c_str());
    double largest = 0.0;
    size_t worst_at = 0;
    for (int t = 0; t < mb.n_tokens; ++t) {
        for (int h = 0; h < n_head; ++h) {
            for (int i = 0; i < s.dv; ++i) {
                const size_t at = ((size_t) t*n_head + h)*s.dv + i;
                memcpy(&res.out[at], out + t*cur->nb[2] + h*cur->nb[1] + i*cur->nb[0], sizeof(float));
                if (!written[t]) {
                    CHECK(std::isnan(res.out[at]), "%s: token %d belongs to no segment and was written", where.c_str(), t);
                    continue;
                }
                CHECK(std::isfinite(res.out[at]), "%s: token %d head %d [%d] is %f", where.c_str(), t, h, i, res.out[at]);
                const double error = std::fabs(res.out[at] - res.exact[at]);
                if (error > res.worst) {
                    res.worst = error;
                    worst_at  = at;
                }
                res.worst_f32 = std::max(res.worst_f32, std::fabs(f32[at] - res.exact[at]));
                largest = std::max(largest, std::fabs(res.exact[at]));
            }
        }
    }
    // twice the error of the plain f32 sum; where that happens to be exact (one visible slot), a few units in the last place
    const double allowed = 2.0*res.worst_f32 + 8.0*std::numeric_limits<float>::epsilon()*largest;
    CHECK(res.worst <= allowed, "%s: error %.3g, plain f32 has %.3g; worst at token %zu head %zu [%zu]: %.9g, exact %.9g", where.c_str(),
            res.worst, res.worst_f32, worst_at/s.dv/n_head, worst_at/s.dv%n_head, worst_at%s.dv, res.out[worst_at], res.exact[worst_at]);

    check_memory();
    return res;
}
