// The CUDA ops against the CPU's, in one ggml graph each: stored rows, positions and kept slots bit by bit, attention by the
// error of every single query row (a lost key must not drown in a mean). `bench` as first argument: timings instead of tests.
// Without a GPU every test says that it was skipped.
#include "check.h"

#include "metrics/tca-metric.h"
#include "ops/tca-ops.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>

static ggml_backend_t cpu_backend() {
    static ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr) };
    return backend.get();
}

static ggml_backend_t gpu_backend() {
    static ggml_backend_ptr backend { ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_GPU, nullptr) };
    return backend.get();
}

#define NEED_GPU()                                        \
    if (gpu_backend() == nullptr) {                       \
        printf("skip   %s: no GPU\n", __func__);          \
        return;                                           \
    }

struct op_case {
    ggml_type type_k = GGML_TYPE_F16, type_v = GGML_TYPE_F16;
    int dim = 128, n_head_kv = 2, gqa = 4, n_seqs = 1;
    int n_tokens = 1;                 // of each sequence
    std::vector<int> past;            // [n_seqs, n_head_kv]
    int   split   = -1;               // -1: as the runtime chooses
    float softcap = 0.0f;
    bool  compact = false;
    int   group   = 512, block = 16;
    int   rope    = TCA_ROPE_NEOX, n_rot = 128, hadamard = 0;
    bool  ties    = false;            // some tokens are equal
    bool  broken  = false;            // some stored elements are NaN or infinite
    const char * metric = "key-diff";

    std::string name() const {
        return text_of("K %s V %s dim %d heads %dx%d seqs %d tokens %d past %d.. split %d softcap %g compact %d by %s rope %d hadamard %d ties %d broken %d",
                ggml_type_name(type_k), ggml_type_name(type_v), dim, n_head_kv, gqa, n_seqs, n_tokens, past[0], split, softcap,
                compact, metric, rope, hadamard, ties, broken);
    }
};

struct op_result {
    std::vector<uint8_t> k, v;
    std::vector<int32_t> pos;
    std::vector<float>   out;
};

static std::vector<uint8_t> to_type(ggml_type type, const std::vector<float> & x, int dim) {
    std::vector<uint8_t> y(ggml_row_size(type, dim)*(x.size()/dim));
    if (type == GGML_TYPE_F32) {
        memcpy(y.data(), x.data(), y.size());
    } else {
        ggml_get_type_traits_cpu(type)->from_float(x.data(), y.data(), x.size());
    }
    return y;
}

// Data of a case, the same for both backends.
struct op_data {
    int64_t n_slots = 0;
    int     longest = 0;
    std::vector<int32_t> desc, pos;
    std::vector<float>   q, k_cur, v_cur;
    std::vector<uint8_t> k, v;
    std::vector<int32_t> keep_counts = { 0, 1, 2, 4, 8, 16 }, configs;
    std::vector<float>   freqs, probe;
    tca_select_params    select = {};

    int kept_of(int32_t config) const {
        int n = 0;
        for (size_t j = 0; j < keep_counts.size(); ++j) {
            n += keep_counts[j]*configs[config*keep_counts.size() + j];
        }
        return n;
    }

    op_data(const op_case & c, uint64_t seed) {
        random_t rng(seed);
        const int n_regions = c.n_seqs*c.n_head_kv, total = c.n_seqs*c.n_tokens;
        const int n_blocks = c.group/c.block;
        for (int i = 0; i < 4; ++i) {  // four configurations
            std::vector<int32_t> row(keep_counts.size());
            for (int b = 0; b < n_blocks; ++b) {
                ++row[rng.below(i == 0 ? 1 : row.size())];
            }
            configs.insert(configs.end(), row.begin(), row.end());
        }
        for (int i = 0; i < c.n_rot/2; ++i) {
            freqs.push_back(std::pow(10000.0f, -2.0f*i/c.n_rot));
        }
        select.block_size  = c.block;
        select.group_size  = c.group;
        select.n_keep      = keep_counts.size();
        select.n_configs   = 4;
        select.keep_counts = keep_counts.data();
        select.configs     = configs.data();
        select.rope        = { c.rope, c.rope == TCA_ROPE_NONE ? 0 : c.n_rot, 1.0f, freqs.data() };
        select.hadamard    = c.hadamard;
        select.layer       = 5;
        select.metric      = tca_metric_find(c.metric);

        std::vector<int64_t> offset(n_regions);
        n_slots = 3;
        for (int i = 0; i < n_regions; ++i) {
            offset[i] = n_slots;
            n_slots  += c.past[i] + c.n_tokens + rng.below(5);
            longest   = std::max(longest, c.past[i] + c.n_tokens);
        }
        std::vector<float> kf(n_slots*c.dim), vf(n_slots*c.dim);
        for (float & x : kf) { x = rng.normal(); }
        for (float & x : vf) { x = rng.normal(); }
        if (c.ties) {
            for (int64_t s = 0; s < n_slots; ++s) {
                if (rng.below(2)) {
                    const int64_t from = s/7*7;
                    std::copy_n(kf.begin() + from*c.dim, c.dim, kf.begin() + s*c.dim);
                    std::copy_n(vf.begin() + from*c.dim, c.dim, vf.begin() + s*c.dim);
                }
            }
        }
        if (c.broken) {
            for (std::vector<float> * x : { &kf, &vf }) {
                for (int i = 0; i < 3; ++i) {
                    (*x)[rng.below(x->size())] = rng.pick<float>({ NAN, INFINITY, -INFINITY });
                }
            }
        }
        k_cur.resize((size_t) total*c.n_head_kv*c.dim);
        v_cur.resize(k_cur.size());
        for (float & x : k_cur) { x = rng.normal(); }
        for (float & x : v_cur) { x = rng.normal(); }
        q.resize((size_t) total*c.n_head_kv*c.gqa*c.dim);
        for (float & x : q) { x = rng.normal(); }

        pos.resize(n_slots);
        for (int64_t s = 0; s < n_slots; ++s) { pos[s] = s; }
        desc.resize((size_t) n_regions*TCA_DESC_SIZE);
        for (int s = 0; s < c.n_seqs; ++s) {
            for (int h = 0; h < c.n_head_kv; ++h) {
                const int i = s*c.n_head_kv + h, past = c.past[i];
                tca_desc d;
                d.offset = offset[i];
                d.past   = past;
                d.token  = s*c.n_tokens;
                d.count  = c.n_tokens;
                d.pos    = 100000 + s;
                d.group  = c.compact && past + c.n_tokens >= c.group ? rng.below(past + c.n_tokens - c.group + 1) : -1;
                d.config = rng.below(6) == 0 ? TCA_HEAD_DENSE : rng.below(4);
                if (d.group >= 0 && d.config >= 0 && rng.below(4) > 0) {
                    d.stash = past + c.n_tokens - c.group + kept_of(d.config);  // the end of the region, where rows were that moved
                }
                d.write(&desc[(size_t) i*TCA_DESC_SIZE]);

                // needles: rows of the query that look for one slot, on both sides of every boundary
                const std::vector<int> edges = { 0, past - 1, past, 31, 32, 63, 64, 127, 128, 511, 512, past/2, past + c.n_tokens - 1 };
                for (int t = 0; t < c.n_tokens; ++t) {
                    for (int g = 0; g < c.gqa; ++g) {
                        const int slot = rng.below(4) == 0 ? past + t + (int) rng.below(2) : rng.pick(edges);
                        if (slot < 0 || slot >= past + c.n_tokens || rng.below(4) == 0) {
                            continue;
                        }
                        const float * key = slot < past ? &kf[(offset[i] + slot)*c.dim] :
                            &k_cur[((size_t) (s*c.n_tokens + slot - past)*c.n_head_kv + h)*c.dim];
                        float norm = 0.0f;
                        for (int e = 0; e < c.dim; ++e) { norm += key[e]*key[e]; }
                        float * to = &q[(((size_t) (s*c.n_tokens + t)*c.n_head_kv + h)*c.gqa + g)*c.dim];
                        for (int e = 0; e < c.dim; ++e) { to[e] = key[e]*30.0f*std::sqrt((float) c.dim)/norm; }
                    }
                }
            }
        }
        for (int i = 0; i < c.n_head_kv*c.dim; ++i) {
            probe.push_back(rng.normal());
        }
        select.probe = probe.data();
        k = to_type(c.type_k, kf, c.dim);
        v = to_type(c.type_v, vf, c.dim);
    }
};

static op_result run(ggml_backend_t backend, const op_case & c, const op_data & data) {
    const ggml_context_ptr ctx { ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_context * x = ctx.get();
    const int total = c.n_seqs*c.n_tokens;
    ggml_tensor * k    = ggml_new_tensor_2d(x, c.type_k, c.dim, data.n_slots);
    ggml_tensor * v    = ggml_new_tensor_2d(x, c.type_v, c.dim, data.n_slots);
    ggml_tensor * pos  = ggml_new_tensor_1d(x, GGML_TYPE_I32, data.n_slots);
    ggml_tensor * desc = ggml_new_tensor_4d(x, GGML_TYPE_I32, TCA_DESC_SIZE, c.n_head_kv, c.n_seqs, 1);
    ggml_tensor * q    = ggml_new_tensor_3d(x, GGML_TYPE_F32, c.dim, c.n_head_kv*c.gqa, total);
    ggml_tensor * kc   = ggml_new_tensor_3d(x, GGML_TYPE_F32, c.dim, c.n_head_kv, total);
    ggml_tensor * vc   = ggml_new_tensor_3d(x, GGML_TYPE_F32, c.dim, c.n_head_kv, total);

    const float scale = 1.0f/std::sqrt((float) c.dim);
    const bool  split = c.split >= 0 ? c.split : tca_attn_splits(c.n_tokens, c.gqa, 1);
    ggml_tensor * kv  = tca_build_append(x, k, v, pos, kc, vc, desc, 0);
    ggml_tensor * out = split ?
        tca_build_attn_split(x, q, kv, v, desc, 0, scale, c.softcap, tca_attn_n_chunks(data.longest), nullptr) :
        tca_build_attn      (x, q, kv, v, desc, 0, scale, c.softcap, nullptr);
    ggml_cgraph * gf = ggml_new_graph(x);
    ggml_build_forward_expand(gf, kv);
    ggml_build_forward_expand(gf, out);
    tca_tables tables;
    if (c.compact) {
        tables = tca_tables_new(x, data.select, c.dim, c.n_head_kv, nullptr);
        ggml_build_forward_expand(gf, tca_build_compact(x, kv, v, pos, desc, 0, tables, q, scale, c.softcap));
    }
    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        CHECK(ggml_backend_supports_op(backend, ggml_graph_node(gf, i)), "node %d: %s", i, c.name().c_str());
    }
    const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(x, backend) };
    CHECK(buffer != nullptr, "out of memory");
    ggml_backend_buffer_clear(buffer.get(), 0xff);  // NaN wherever nothing was written
    ggml_backend_tensor_set(k,    data.k.data(),     0, ggml_nbytes(k));
    ggml_backend_tensor_set(v,    data.v.data(),     0, ggml_nbytes(v));
    ggml_backend_tensor_set(pos,  data.pos.data(),   0, ggml_nbytes(pos));
    ggml_backend_tensor_set(desc, data.desc.data(),  0, ggml_nbytes(desc));
    ggml_backend_tensor_set(q,    data.q.data(),     0, ggml_nbytes(q));
    ggml_backend_tensor_set(kc,   data.k_cur.data(), 0, ggml_nbytes(kc));
    ggml_backend_tensor_set(vc,   data.v_cur.data(), 0, ggml_nbytes(vc));
    if (c.compact) {
        tca_tables_set(tables, data.select);
    }
    CHECK(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS, "%s", c.name().c_str());

    op_result r;
    r.k.resize(ggml_nbytes(k));
    r.v.resize(ggml_nbytes(v));
    r.pos.resize(data.n_slots);
    r.out.resize(ggml_nelements(out));
    ggml_backend_tensor_get(k,   r.k.data(),   0, ggml_nbytes(k));
    ggml_backend_tensor_get(v,   r.v.data(),   0, ggml_nbytes(v));
    ggml_backend_tensor_get(pos, r.pos.data(), 0, ggml_nbytes(pos));
    ggml_backend_tensor_get(out, r.out.data(), 0, ggml_nbytes(out));
    return r;
}

// Largest error of a query row, relative to the row's length.
static double worst_row(const std::vector<float> & a, const std::vector<float> & b, int dim) {
    double worst = 0.0;
    for (size_t r = 0; r < a.size()/dim; ++r) {
        double e = 0.0, n = 0.0;
        for (int i = 0; i < dim; ++i) {
            e += (a[r*dim + i] - b[r*dim + i])*(double) (a[r*dim + i] - b[r*dim + i]);
            n += b[r*dim + i]*(double) b[r*dim + i];
        }
        const double x = std::sqrt(e/n);
        worst = x >= worst ? x : x == x ? worst : INFINITY;
    }
    return worst;
}

static double compare(const op_case & c, uint64_t seed) {
    const op_data   data(c, seed);
    const op_result want = run(cpu_backend(), c, data);
    const op_result got  = run(gpu_backend(), c, data);
    // what lies behind the end of a compacted region is nobody's: stale rows there may differ
    size_t n_bad_pos = 0, n_bad_k = 0, n_bad_v = 0;
    const size_t row_k = ggml_row_size(c.type_k, c.dim), row_v = ggml_row_size(c.type_v, c.dim);
    for (size_t i = 0; i < data.desc.size(); i += TCA_DESC_SIZE) {
        const int32_t * d = &data.desc[i];
        int64_t used = d[TCA_DESC_USED];
        if (d[TCA_DESC_GROUP] >= 0 && d[TCA_DESC_CONFIG] >= 0 && d[TCA_DESC_STASH] < 0) {
            used -= c.group - data.kept_of(d[TCA_DESC_CONFIG]);
        }
        for (int64_t s = d[TCA_DESC_OFFSET]; s < d[TCA_DESC_OFFSET] + used; ++s) {
            n_bad_pos += want.pos[s] != got.pos[s];
            n_bad_k   += memcmp(&want.k[s*row_k], &got.k[s*row_k], row_k) != 0;
            n_bad_v   += memcmp(&want.v[s*row_v], &got.v[s*row_v], row_v) != 0;
        }
    }
    CHECK(n_bad_pos + n_bad_k + n_bad_v == 0, "%zu positions, %zu K rows, %zu V rows differ: %s", n_bad_pos, n_bad_k, n_bad_v, c.name().c_str());
    if (c.broken) {
        return 0.0;  // and so is the output
    }
    const double error = worst_row(got.out, want.out, c.dim);
    CHECK(error < 4e-3, "error of a query row %g: %s", error, c.name().c_str());
    return error;
}

static const std::vector<ggml_type> TYPES = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_BF16, GGML_TYPE_F32 };

static bool fits(ggml_type type, int dim) { return dim % ggml_blck_size(type) == 0; }

TEST(cuda_types_and_head_sizes) {
    NEED_GPU();
    uint64_t seed = 1;
    for (ggml_type type : TYPES) {
        double worst[2] = { 0.0, 0.0 };
        for (int dim : { 64, 80, 96, 128, 256 }) {
            for (int n_tokens : { 1, 11, 150 }) {
                if (!fits(type, dim)) {
                    continue;
                }
                op_case c;
                c.type_k = c.type_v = type;
                c.dim = dim;
                c.n_tokens = n_tokens;
                c.past = { 1017, 64 };
                double & w = worst[n_tokens > 1];
                w = std::max(w, compare(c, seed++));
            }
        }
        printf("       %s: worst row error decode %.2e, prefill %.2e\n", ggml_type_name(type), worst[0], worst[1]);
    }
}

TEST(cuda_awkward_shapes) {
    NEED_GPU();
    random_t rng(7);
    for (int i = 0; i < 120; ++i) {
        op_case c;
        do {
            c.dim    = rng.pick<int>({ 64, 80, 96, 128, 128, 256 });
            c.type_k = rng.pick(TYPES);
            c.type_v = rng.pick(TYPES);
        } while (!fits(c.type_k, c.dim) || !fits(c.type_v, c.dim));
        c.gqa       = rng.range(1, 16);
        c.n_head_kv = rng.range(1, 5);
        c.n_seqs    = rng.range(1, 3);
        c.n_tokens  = rng.pick<int>({ 1, 1, 2, 3, 5, 7, 13, 16, 17, 31, 33, 65, 127, 200 });
        c.softcap   = rng.below(4) == 0 ? 30.0f : 0.0f;
        for (int r = 0; r < c.n_seqs*c.n_head_kv; ++r) {
            c.past.push_back(rng.pick<int>({ 0, 1, 31, 63, 64, 65, 127, 511, 512, 513, 1023, 1500, (int) rng.below(3000) }));
        }
        if (c.gqa*c.n_tokens <= 64) {
            c.split = rng.below(3) ? -1 : 0;
        }
        compare(c, 1000 + i);
    }
}

TEST(cuda_takes_every_metric_and_no_other) {
    NEED_GPU();
    const ggml_context_ptr ctx { ggml_init({ 64*ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor * k    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 128, 64);
    ggml_tensor * v    = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 128, 64);
    ggml_tensor * pos  = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 64);
    ggml_tensor * desc = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I32, TCA_DESC_SIZE, 1, 1, 1);
    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, 128, 4, 1);
    const int32_t keep[] = { 1, 2 };
    tca_select_params select = {};
    select.n_keep = 2;
    select.keep_counts = keep;
    for (int i = 0; tca_metric_at(i) != nullptr; ++i) {
        select.metric = tca_metric_at(i);
        const tca_tables tables = tca_tables_new(ctx.get(), select, 128, 1, nullptr);
        CHECK(ggml_backend_supports_op(gpu_backend(), tca_build_compact(ctx.get(), k, v, pos, desc, 0, tables, q, 1.0f, 0.0f)), "%s is refused", select.metric->name);
    }
    tca_metric unknown = *tca_metric_at(0);
    unknown.id    = (tca_metric_id) 1000;
    select.metric = &unknown;
    const tca_tables tables = tca_tables_new(ctx.get(), select, 128, 1, nullptr);
    CHECK(!ggml_backend_supports_op(gpu_backend(), tca_build_compact(ctx.get(), k, v, pos, desc, 0, tables, q, 1.0f, 0.0f)), "an unknown metric is taken");
}

// Every case by key-diff and by one of the other metrics in turn.
TEST(cuda_keeps_the_same_slots) {
    NEED_GPU();
    random_t rng(11);
    int n_metrics = 0;
    while (tca_metric_at(n_metrics) != nullptr) {
        ++n_metrics;
    }
    for (int i = 0; i < 1000; ++i) {
        op_case c;
        c.compact   = true;
        c.dim       = rng.pick<int>({ 64, 64, 96, 128, 128 });
        c.type_k    = c.type_v = rng.pick<ggml_type>({ GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F32 });
        c.gqa       = 1;
        c.n_head_kv = rng.range(1, 3);
        c.n_tokens  = rng.range(1, 3);
        c.group     = rng.pick<int>({ 64, 128, 256, 512 });
        c.block     = rng.pick<int>({ 16, 32 });
        c.rope      = rng.below(3);
        c.n_rot     = rng.below(3) ? c.dim : c.dim/2;
        c.hadamard  = ggml_is_quantized(c.type_k) && c.dim % 64 == 0 ? (c.dim == 128 ? 128 : 64) : 0;
        c.ties      = c.rope == TCA_ROPE_NONE && rng.below(2);
        for (int r = 0; r < c.n_head_kv; ++r) {
            c.past.push_back(c.group + rng.below(700));
        }
        c.broken = !ggml_is_quantized(c.type_k) && rng.below(8) == 0;
        compare(c, 5000 + i);
        const tca_metric & metric = *tca_metric_at(1 + i % (n_metrics - 1));
        c.metric = metric.name;
        if (metric.needs & TCA_NEEDS_QUERIES) {
            c.gqa      = rng.range(1, 7);
            c.n_tokens = rng.pick<int>({ 1, 2, 31, 32, 33, 70 });
            c.softcap  = rng.below(4) == 0 ? 30.0f : 0.0f;
        }
        compare(c, 5000 + i);
    }
}

// The same as stock attention on the same data: all regions of one length, as upstream's kernel needs it.
TEST(cuda_error_against_upstream) {
    NEED_GPU();
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int n_tokens : { 1, 128 }) {
            op_case c;
            c.type_k = c.type_v = type;
            c.n_tokens = n_tokens;
            c.n_head_kv = 1;
            c.past = { 4096 - n_tokens };
            const op_data   data(c, 3);
            const op_result want = run(cpu_backend(), c, data);
            const op_result ours = run(gpu_backend(), c, data);

            const ggml_context_ptr ctx { ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
            ggml_tensor * k = ggml_new_tensor_3d(ctx.get(), type, c.dim, 4096, 1);
            ggml_tensor * v = ggml_new_tensor_3d(ctx.get(), type, c.dim, 4096, 1);
            ggml_tensor * q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.dim, c.gqa, n_tokens);
            ggml_tensor * m = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, 4096, n_tokens);
            ggml_tensor * o = ggml_flash_attn_ext(ctx.get(), ggml_permute(ctx.get(), q, 0, 2, 1, 3), k, v, m, 1.0f/std::sqrt(128.0f), 0.0f, 0.0f);
            ggml_prec_set_acc(o, GGML_PREC_F32);
            ggml_cgraph * gf = ggml_new_graph(ctx.get());
            ggml_build_forward_expand(gf, o);
            const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), gpu_backend()) };
            std::vector<ggml_fp16_t> mask((size_t) 4096*n_tokens);
            for (int t = 0; t < n_tokens; ++t) {
                for (int j = 0; j < 4096; ++j) {
                    mask[(size_t) t*4096 + j] = ggml_fp32_to_fp16(j <= 4096 - n_tokens + t ? 0.0f : -INFINITY);
                }
            }
            const size_t first = data.desc[TCA_DESC_OFFSET]*ggml_row_size(type, c.dim);
            ggml_backend_tensor_set(k, want.k.data() + first, 0, ggml_nbytes(k));
            ggml_backend_tensor_set(v, want.v.data() + first, 0, ggml_nbytes(v));
            ggml_backend_tensor_set(q, data.q.data(), 0, ggml_nbytes(q));
            ggml_backend_tensor_set(m, mask.data(), 0, ggml_nbytes(m));
            ggml_backend_graph_compute(gpu_backend(), gf);
            std::vector<float> theirs(ggml_nelements(o));
            ggml_backend_tensor_get(o, theirs.data(), 0, ggml_nbytes(o));

            const double e_ours = worst_row(ours.out, want.out, c.dim), e_theirs = worst_row(theirs, want.out, c.dim);
            printf("       %s, %d tokens: worst row error ours %.2e, upstream's %.2e\n", ggml_type_name(type), n_tokens, e_ours, e_theirs);
            CHECK(e_ours <= 2.0*e_theirs, "%g against %g", e_ours, e_theirs);
        }
    }
}

// ---- timings -----------------------------------------------------------------------------------------------------------

static double time_ms(ggml_cgraph * gf, int n_nodes) {
    std::vector<double> ms;
    for (int i = 0; i < 13; ++i) {
        ggml_backend_synchronize(gpu_backend());
        const auto start = std::chrono::steady_clock::now();
        ggml_backend_graph_compute(gpu_backend(), gf);
        ggml_backend_synchronize(gpu_backend());
        if (i >= 3) {
            ms.push_back(1e3*std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()/n_nodes);
        }
    }
    std::sort(ms.begin(), ms.end());
    return ms[ms.size()/2];
}

static std::string bench_filter;  // second argument: "decode q8_0 51200" runs that one alone

// Bytes of K and V that the nodes of one graph read in all, at least: far more than any L2 cache, as the layers of a model do.
constexpr size_t BENCH_BYTES = (size_t) 640 << 20;

// One layer of an 8B shape; 8 regions with the given mean length, even or from a tenth of it to nearly twice it. Every node of the
// graph has K and V of its own. stock: FLASH_ATTN_EXT over even regions.
static void bench_case(const char * what, ggml_type type, int n_tokens, int mean, bool even, bool stock) {
    if (text_of("%s %s %d%s", what, ggml_type_name(type), mean, stock ? " stock" : "").find(bench_filter) == std::string::npos) {
        return;
    }
    const int hkv = 8, gqa = 4, dim = 128;
    int64_t slots = 0;
    std::vector<int32_t> desc;
    int longest = 0;
    for (int h = 0; h < hkv; ++h) {
        const int n = std::max(n_tokens, even ? mean : (int) (mean*(0.1 + 1.8*h/(hkv - 1))));
        tca_desc row;
        row.offset = slots;
        row.past   = n - n_tokens;
        row.count  = n_tokens;
        desc.resize(desc.size() + TCA_DESC_SIZE);
        row.write(&desc[desc.size() - TCA_DESC_SIZE]);
        slots += n;
        longest = std::max(longest, n);
    }
    const size_t bytes  = 2*slots*ggml_row_size(type, dim);
    const int    n_sets = n_tokens > 1 ? 2 : std::clamp<int>((BENCH_BYTES + bytes - 1)/bytes, 2, 400);
    const int    repeat = std::max(n_sets, n_tokens > 1 ? 2 : 20);
    const ggml_context_ptr ctx { ggml_init({ (size_t) (16*repeat + 64)*ggml_tensor_overhead() + 2*ggml_graph_overhead(), nullptr, true }) };
    ggml_context * x = ctx.get();
    ggml_tensor * d = ggml_new_tensor_4d(x, GGML_TYPE_I32, TCA_DESC_SIZE, hkv, 1, 1);
    ggml_tensor * q = ggml_new_tensor_3d(x, GGML_TYPE_F32, dim, hkv*gqa, n_tokens);
    ggml_tensor * m = ggml_new_tensor_2d(x, GGML_TYPE_F16, mean, n_tokens);
    std::vector<ggml_tensor *> rows;
    for (int i = 0; i < 2*n_sets; ++i) {
        rows.push_back(stock ? ggml_new_tensor_3d(x, type, dim, mean, hkv) : ggml_new_tensor_2d(x, type, dim, slots));
    }
    ggml_cgraph * gf = ggml_new_graph(x);
    for (int i = 0; i < repeat; ++i) {
        ggml_tensor * k = rows[i % n_sets*2], * v = rows[i % n_sets*2 + 1];
        if (stock) {
            ggml_tensor * o = ggml_flash_attn_ext(x, ggml_permute(x, q, 0, 2, 1, 3), k, v, m, 0.088f, 0.0f, 0.0f);
            ggml_prec_set_acc(o, GGML_PREC_F32);
            ggml_build_forward_expand(gf, o);
        } else {
            ggml_build_forward_expand(gf, tca_attn_splits(n_tokens, gqa, 1) ?
                tca_build_attn_split(x, q, k, v, d, 0, 0.088f, 0.0f, tca_attn_n_chunks(longest), nullptr) :
                tca_build_attn(x, q, k, v, d, 0, 0.088f, 0.0f, nullptr));
        }
    }
    const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(x, gpu_backend()) };
    std::vector<float> r((size_t) 1 << 20);
    random_t rng(5);
    for (float & f : r) { f = rng.normal(); }
    const std::vector<uint8_t> random_rows = to_type(type, r, dim);
    for (ggml_tensor * t : rows) {
        for (size_t at = 0; at < ggml_nbytes(t); at += random_rows.size()) {
            ggml_backend_tensor_set(t, random_rows.data(), at, std::min(random_rows.size(), ggml_nbytes(t) - at));
        }
    }
    for (size_t at = 0; at < ggml_nbytes(q); at += r.size()*4) {
        ggml_backend_tensor_set(q, r.data(), at, std::min(r.size()*4, ggml_nbytes(q) - at));
    }
    const std::vector<uint8_t> zeros(ggml_nbytes(m));
    ggml_backend_tensor_set(m, zeros.data(), 0, zeros.size());
    ggml_backend_tensor_set(d, desc.data(), 0, ggml_nbytes(d));
    const double ms = time_ms(gf, repeat);
    const double tflop = 4.0*dim*hkv*gqa*n_tokens*(mean - (stock ? 0.0 : 0.5*n_tokens))/1e12;  // stock computes what its mask hides, too
    const char * who = stock ? "stock" : even ? "even" : "uneven";
    if (n_tokens == 1) {
        printf("%-10s %-5s %-7s mean %6d: %8.4f ms  %5.2f TB/s\n", what, ggml_type_name(type), who, mean, ms, bytes/1e9/ms);
    } else {
        printf("%-10s %-5s %-7s mean %6d tokens %4d: %8.4f ms  %5.0f TFLOP/s\n", what, ggml_type_name(type), who, mean, n_tokens, ms, tflop/ms*1e3);
    }
    fflush(stdout);
}

static void bench_compact(ggml_type type) {
    if (!bench_filter.empty()) {
        return;
    }
    op_case c;
    c.compact = true;
    c.type_k = c.type_v = type;
    c.n_head_kv = 8;
    c.hadamard = ggml_is_quantized(type) ? 128 : 0;
    c.past.assign(8, 20000);
    const op_data data(c, 9);
    const ggml_context_ptr ctx { ggml_init({ 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };
    ggml_context * x = ctx.get();
    ggml_tensor * k = ggml_new_tensor_2d(x, type, 128, data.n_slots), * v = ggml_new_tensor_2d(x, type, 128, data.n_slots);
    ggml_tensor * pos = ggml_new_tensor_1d(x, GGML_TYPE_I32, data.n_slots);
    ggml_tensor * d = ggml_new_tensor_4d(x, GGML_TYPE_I32, TCA_DESC_SIZE, 8, 1, 1);
    ggml_cgraph * gf = ggml_new_graph(x);
    const tca_tables tables = tca_tables_new(x, data.select, 128, 8, nullptr);
    for (int i = 0; i < 10; ++i) {
        ggml_build_forward_expand(gf, tca_build_compact(x, k, v, pos, d, 0, tables, nullptr, 0.0f, 0.0f));
    }
    const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(x, gpu_backend()) };
    ggml_backend_tensor_set(k, data.k.data(), 0, ggml_nbytes(k));
    ggml_backend_tensor_set(v, data.v.data(), 0, ggml_nbytes(v));
    ggml_backend_tensor_set(pos, data.pos.data(), 0, ggml_nbytes(pos));
    std::vector<int32_t> desc = data.desc;
    for (int h = 0; h < 8; ++h) {
        desc[h*TCA_DESC_SIZE + TCA_DESC_GROUP]  = 20001 - 1008;
        desc[h*TCA_DESC_SIZE + TCA_DESC_CONFIG] = 1;
    }
    ggml_backend_tensor_set(d, desc.data(), 0, ggml_nbytes(d));
    tca_tables_set(tables, data.select);
    printf("compact    %-5s a group of 512, 8 heads: %.4f ms\n", ggml_type_name(type), time_ms(gf, 10));
}

static int bench() {
    if (gpu_backend() == nullptr) {
        printf("skip   bench: no GPU\n");
        return 0;
    }
    if (bench_filter.empty()) {
        // not in a graph: CUDA graphs copy at two thirds of the speed
        const ggml_context_ptr ctx { ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }) };
        ggml_tensor * a = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 512 << 20), * b = ggml_dup_tensor(ctx.get(), a);
        const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), gpu_backend()) };
        ggml_backend_buffer_clear(buffer.get(), 1);
        double best = INFINITY;
        for (int i = 0; i < 10; ++i) {
            const auto start = std::chrono::steady_clock::now();
            ggml_backend_tensor_copy(a, b);
            best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        printf("copy: %.2f TB/s, bytes read and written\n", 2*ggml_nbytes(a)/1e12/best);
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (int mean : { 256, 1024, 4096, 16384, 51200, 131072 }) {
            for (int who : { 0, 1, 2 }) {
                bench_case("decode", type, 1, mean, who > 0, who > 1);
            }
        }
    }
    for (ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        for (int who : { 0, 1, 2 }) {
            for (int mean : { 2048, 8192, 51200 }) {
                bench_case("prefill", type, 512, mean, who > 0, who > 1);
            }
            for (int mean : { 32768, 131072 }) {
                bench_case("prefill", type, 2048, mean, who > 0, who > 1);
            }
        }
        bench_compact(type);
    }
    return 0;
}

int main(int argc, char ** argv) {
    ggml_backend_load_all();
    if (argc > 1 && strcmp(argv[1], "bench") == 0) {
        bench_filter = argc > 2 ? argv[2] : "";
        return bench();
    }
    return run_tests(argc, argv);
}
