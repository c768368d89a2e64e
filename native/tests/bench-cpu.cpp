// Speed of the CPU attention kernels against the machine's own limits, with stock FlashAttention beside them.
//
//   tca-bench-cpu [HEADS/KV_HEADS/HEAD_DIM] [f16|q8_0|...] [LENGTH] [THREADS] [UBATCH]      default: 14/2/64 f16 16384 2 512
//
// Limits: see cpu/tca-limits.cpp. Decode: one token over as many layers as make
// the store several times larger than the caches, then over a short region that stays in them, which leaves the arithmetic;
// GB/s are stored bytes of K and V, each counted once. Prefill: a micro-batch
// at the end of one layer's regions; GFLOP/s count 4 operations for each (query head, visible slot, dimension) and no softmax.
// Compaction: one group of 512 tokens of every KV head, key-diff, 39% stay; every layer for itself, as in the runtime.
// Figures are the best of several runs: the kernel's speed, not that of its neighbours on the machine.
#include "check.h"

#include "cpu/tca-kernels.h"
#include "cpu/tca-pages.h"
#include "metrics/tca-metric.h"
#include "ops/tca-ops.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Best of the runs that fit into `seconds`, at least three.
static double best_of(double seconds, const std::function<void()> & run) {
    double best = INFINITY;
    const double start = now();
    for (int i = 0; i < 3 || now() - start < seconds; ++i) {
        const double before = now();
        run();
        best = std::min(best, now() - before);
    }
    return best;
}

struct bench_case {
    int       n_head = 14, n_head_kv = 2, dim = 64;
    ggml_type type = GGML_TYPE_F16;
    int64_t   length = 16384;  // slots of every region, micro-batch included
    int       n_threads = 2;
    int       n_tokens = 1, n_layers = 1;
};

static void compute(ggml_backend_t backend, ggml_cgraph * gf) {
    if (ggml_backend_graph_compute(backend, gf) != GGML_STATUS_SUCCESS) {
        fprintf(stderr, "ggml_backend_graph_compute failed\n");
        exit(1);
    }
}

// Attention nodes of all layers in one graph; seconds a run.
static double attention(const bench_case & c, bool stock) {
    const ggml_backend_ptr backend { ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), c.n_threads);
    const ggml_context_ptr ctx { ggml_init({ (size_t) (16*c.n_layers + 16)*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };

    ggml_cgraph * gf   = ggml_new_graph(ctx.get());
    ggml_tensor * q    = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, c.dim, c.n_head, c.n_tokens);
    ggml_tensor * desc = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I32, TCA_DESC_SIZE, c.n_head_kv, 1, 1);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F16, c.length, c.n_tokens);
    std::vector<ggml_tensor *> store;
    const float scale = 1.0f/std::sqrt((float) c.dim);
    const bool  split = tca_attn_splits(c.n_tokens, c.n_head, c.n_head_kv);
    for (int il = 0; il < c.n_layers; ++il) {
        // the same rows twice: the ragged store is [dim, slots], the stock cache of one layer [dim, heads, cells]
        ggml_tensor * k = ggml_new_tensor_2d(ctx.get(), c.type, c.dim, c.length*c.n_head_kv);
        ggml_tensor * v = ggml_new_tensor_2d(ctx.get(), c.type, c.dim, c.length*c.n_head_kv);
        store.push_back(k);
        store.push_back(v);
        ggml_tensor * out;
        if (stock) {
            const auto view = [&](ggml_tensor * t) {
                return ggml_view_3d(ctx.get(), t, c.dim, c.length, c.n_head_kv, c.n_head_kv*t->nb[1], t->nb[1], 0);
            };
            out = ggml_flash_attn_ext(ctx.get(), ggml_permute(ctx.get(), q, 0, 2, 1, 3), view(k), view(v), mask, scale, 0.0f, 0.0f);
        } else if (split) {
            out = tca_build_attn_split(ctx.get(), q, k, v, desc, 0, scale, 0.0f, tca_attn_n_chunks(c.length), nullptr);
        } else {
            out = tca_build_attn(ctx.get(), q, k, v, desc, 0, scale, 0.0f, nullptr);
        }
        ggml_build_forward_expand(gf, out);
    }
    const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    tca_prefer_large_pages(ggml_backend_buffer_get_base(buffer.get()), ggml_backend_buffer_get_size(buffer.get()));  // as the cache does

    random_t rng(1);
    std::vector<float> noise(1 << 16);
    for (float & x : noise) {
        x = rng.normal();
    }
    for (int64_t i = 0; i < ggml_nelements(q); ++i) {
        ((float *) q->data)[i] = noise[i % noise.size()];
    }
    for (ggml_tensor * t : store) {
        const int64_t chunk = 8*c.dim;
        for (int64_t i = 0; i < ggml_nelements(t); i += chunk) {
            const int64_t n = std::min(chunk, ggml_nelements(t) - i);
            ggml_get_type_traits_cpu(c.type)->from_float(&noise[rng.below((noise.size() - n)/32)*32],
                    (char *) t->data + ggml_row_size(c.type, i), n);
        }
    }
    const int64_t past = c.length - c.n_tokens;
    for (int h = 0; h < c.n_head_kv; ++h) {
        tca_desc d;
        d.offset = h*c.length;
        d.past   = past;
        d.count  = c.n_tokens;
        d.pos    = past;
        d.write((int32_t *) desc->data + h*TCA_DESC_SIZE);
    }
    for (int t = 0; t < c.n_tokens; ++t) {
        for (int64_t j = 0; j < c.length; ++j) {
            ((ggml_fp16_t *) mask->data)[t*c.length + j] = ggml_fp32_to_fp16(j <= past + t ? 0.0f : -INFINITY);
        }
    }
    return best_of(stock ? 0.5 : 1.0, [&] { compute(backend.get(), gf); });
}

// Compaction nodes of all layers in one graph, keys and positions as after a prompt; seconds a run.
static double compaction(const bench_case & c) {
    constexpr int GROUP = 512, WINDOW = 512;
    const ggml_backend_ptr backend { ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), c.n_threads);
    const ggml_context_ptr ctx { ggml_init({ (size_t) (4*c.n_layers + 8)*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true }) };

    std::vector<float> freqs(c.dim/2);
    for (int i = 0; i < c.dim/2; ++i) {
        freqs[i] = std::pow(1e6, -2.0*i/c.dim);
    }
    const int32_t keep[] = { 1, 4, 16 }, config[] = { 12, 10, 10 };  // blocks of 16: 12 + 40 + 160 of 512 tokens
    tca_select_params params = {};
    params.metric      = tca_metric_find("key-diff");
    params.block_size  = 16;
    params.group_size  = GROUP;
    params.n_keep      = 3;
    params.n_configs   = 1;
    params.keep_counts = keep;
    params.configs     = config;
    params.rope        = { TCA_ROPE_NEOX, c.dim, 1.0f, freqs.data() };

    ggml_cgraph * gf   = ggml_new_graph(ctx.get());
    ggml_tensor * desc = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I32, TCA_DESC_SIZE, c.n_head_kv, 1, 1);
    const tca_tables tables = tca_tables_new(ctx.get(), params, c.dim, c.n_head_kv, nullptr);
    std::vector<ggml_tensor *> positions;
    for (int il = 0; il < c.n_layers; ++il) {
        ggml_tensor * k = ggml_new_tensor_2d(ctx.get(), c.type, c.dim, (GROUP + WINDOW)*c.n_head_kv);
        ggml_tensor * v = ggml_new_tensor_2d(ctx.get(), c.type, c.dim, (GROUP + WINDOW)*c.n_head_kv);
        positions.push_back(ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, (GROUP + WINDOW)*c.n_head_kv));
        ggml_build_forward_expand(gf, tca_build_compact(ctx.get(), k, v, positions.back(), desc, 0, tables, nullptr, 0.0f, 0.0f));
    }
    const ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    random_t rng(1);
    uint8_t * bytes = (uint8_t *) ggml_backend_buffer_get_base(buffer.get());
    std::generate_n(bytes, ggml_backend_buffer_get_size(buffer.get()), [&] { return (uint8_t) rng.range(0x20, 0x3f); });  // finite keys
    tca_tables_set(tables, params);
    for (int h = 0; h < c.n_head_kv; ++h) {
        tca_desc d;
        d.offset = h*(GROUP + WINDOW);
        d.past   = GROUP;
        d.count  = WINDOW;
        d.pos    = GROUP;
        d.group  = 0;
        d.config = 0;
        d.write((int32_t *) desc->data + h*TCA_DESC_SIZE);
    }
    int first = 0;
    return best_of(0.3, [&] {
        for (ggml_tensor * t : positions) {  // another group each time, as in a real sequence
            for (int i = 0; i < t->ne[0]; ++i) {
                ((int32_t *) t->data)[i] = first + i%(GROUP + WINDOW);
            }
        }
        first += GROUP;
        compute(backend.get(), gf);
    });
}

int main(int argc, char ** argv) {
    bench_case c;
    int n_ubatch = 512;
    bool ok = argc <= 6;
    if (argc > 1) {
        ok = ok && sscanf(argv[1], "%d/%d/%d", &c.n_head, &c.n_head_kv, &c.dim) == 3 && c.n_head_kv > 0 && c.n_head % c.n_head_kv == 0;
    }
    if (argc > 2) {
        c.type = GGML_TYPE_COUNT;
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            c.type = strcmp(argv[2], ggml_type_name(type)) == 0 ? type : c.type;
        }
        ok = ok && c.type != GGML_TYPE_COUNT && c.dim % ggml_blck_size(c.type) == 0;
    }
    c.length    = argc > 3 ? atoll(argv[3]) : c.length;
    c.n_threads = argc > 4 ? atoi(argv[4]) : c.n_threads;
    n_ubatch    = argc > 5 ? atoi(argv[5]) : n_ubatch;
    if (!ok || c.n_threads < 1 || n_ubatch < 1 || c.length < n_ubatch) {
        fprintf(stderr, "usage: %s [HEADS/KV_HEADS/HEAD_DIM] [f32|f16|bf16|q8_0|q4_0] [LENGTH] [THREADS] [UBATCH]\n", argv[0]);
        return 1;
    }

    const double read = tca_cpu_read_bandwidth(c.n_threads), fma = tca_cpu_fma_peak(c.n_threads);
    printf("%s, %d threads: memory reads at %.1f GB/s, f32 multiply-adds at %.0f GFLOP/s\n", tca_cpu_simd(), c.n_threads, read/1e9, fma/1e9);
    printf("%d heads, %d KV heads of %d, %s, %lld slots a region\n", c.n_head, c.n_head_kv, c.dim, ggml_type_name(c.type), (long long) c.length);

    const int64_t length = c.length;
    c.n_tokens = 1;
    for (const bool cached : { false, true }) {
        c.length = cached ? std::min<int64_t>(length, 2048) : length;
        const double bytes = 2.0*c.n_head_kv*c.length*ggml_row_size(c.type, c.dim);
        c.n_layers = cached ? 1 : std::clamp<int64_t>(192e6/bytes + 1, 1, 512);
        const double decode = attention(c, false)/c.n_layers, stock = attention(c, true)/c.n_layers;
        printf("%-8s %8.3f ms a layer  %6.2f GB/s (%3.0f%% of reads)      stock %8.3f ms, %.2fx\n", cached ? "cached" : "decode",
                decode*1e3, bytes/decode/1e9, 100.0*bytes/decode/read, stock*1e3, stock/decode);
        fflush(stdout);
    }

    c.length   = length;
    c.n_tokens = n_ubatch;
    c.n_layers = 1;
    const double flop = 4.0*c.n_head*c.dim*(n_ubatch*(double) (c.length - n_ubatch) + 0.5*n_ubatch*(n_ubatch + 1.0));
    const double prefill = attention(c, false), prefill_stock = attention(c, true);
    printf("prefill  %8.3f ms a layer  %6.1f GFLOP/s (%3.0f%% of peak)    stock %8.3f ms, %.2fx\n", prefill*1e3, flop/prefill/1e9,
            100.0*flop/prefill/fma, prefill_stock*1e3, prefill_stock/prefill);

    c.n_layers = 24;
    printf("compact  %8.3f ms a layer\n", compaction(c)/c.n_layers*1e3);
    return 0;
}
