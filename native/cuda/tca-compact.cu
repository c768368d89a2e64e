// Compaction: which tokens of a group stay, as native/cpu/tca-select.cpp decides it, then rows move down in place.
//
// After the importance of the tokens (tca-importance.cu): selection (a block a region) and moves (a block a region and tensor).
#include "tca-compact.cuh"

#include "metrics/tca-metric.h"

// value of i beats that of j: larger, or equal and newer
static __device__ __forceinline__ bool beats(double vi, int i, double vj, int j) {
    return vi > vj || (vi == vj && i > j);
}

constexpr int SELECT_THREADS = 1024;

// kept [n_seqs*n_head_kv, group_size + 1] out: number of kept tokens, then their indices in the group, increasing, and from the
// end on backwards those of the dropped ones
// grid (n_head_kv, n_seqs)
static __global__ void __launch_bounds__(SELECT_THREADS, 1) select_kernel(const tca_store s, const tca_select_args p,
        const double * importance_all, int32_t * kept) {
    extern __shared__ double importance[];           // [group_size], then blocks [group_size/block_size]
    double * blocks = importance + p.group_size;
    __shared__ int counts[SELECT_THREADS/32];

    const int32_t * d = tca_region(s, blockIdx.y, blockIdx.x);
    if (!tca_compacts(d)) {
        return;
    }
    const size_t unit = blockIdx.y*s.n_head_kv + blockIdx.x;
    const int    n    = p.group_size;
    const int    tid  = threadIdx.x, lane = tid % 32, warp = tid / 32;
    kept += unit*(n + 1);

    for (int t = tid; t < n; t += SELECT_THREADS) {
        importance[t] = importance_all[unit*n + t];
    }
    __syncthreads();

    const int n_blocks = n/p.block_size;
    for (int b = tid; b < n_blocks; b += SELECT_THREADS) {
        double sum = 0.0;
        for (int t = b*p.block_size; t < (b + 1)*p.block_size; ++t) {
            sum += importance[t];
        }
        blocks[b] = sum;
    }
    __syncthreads();

    const int32_t * blocks_per_keep = p.configs + (size_t) d[TCA_DESC_CONFIG]*p.n_keep;
    int total = 0;
    for (int t0 = 0; t0 < n; t0 += SELECT_THREADS) {
        const int t = t0 + tid;
        bool stays = false;
        if (t < n) {
            const int b = t/p.block_size;
            int rank_block = 0, rank_token = 0;
            for (int o = 0; o < n_blocks; ++o) {
                rank_block += beats(blocks[o], o, blocks[b], b);
            }
            for (int o = b*p.block_size; o < (b + 1)*p.block_size; ++o) {
                rank_token += beats(importance[o], o, importance[t], t);
            }
            int keep = 0;
            for (int j = p.n_keep - 1, upto = 0; j >= 0; --j) {
                upto += blocks_per_keep[j];
                if (rank_block < upto) {
                    keep = p.keep_counts[j];
                    break;
                }
            }
            stays = rank_token < keep;
        }
        const uint32_t ballot = __ballot_sync(0xffffffff, stays);
        if (lane == 0) {
            counts[warp] = __popc(ballot);
        }
        __syncthreads();
        int before = total;
        for (int w = 0; w < SELECT_THREADS/32; ++w) {
            before += w < warp ? counts[w] : 0;
            total  += counts[w];
        }
        before += __popc(ballot & ((1u << lane) - 1));  // tokens before t that stay
        if (stays) {
            kept[1 + before] = t;
        } else if (t < n) {
            kept[n - (t - before)] = t;  // from the end, backwards
        }
        __syncthreads();
    }
    if (tid == 0) {
        kept[0] = total;
    }
}

// Rows of `units` units of type T. Every batch of rows is read before any of them is written, and a row never moves up: what a
// later batch reads is still there.
template <typename T>
static __device__ void move_rows(T * rows, int units, const int32_t * kept, int group_size, int64_t n_behind) {
    constexpr int BATCH = 4;
    const int     n_kept = kept[0];
    const int64_t total  = (n_kept + n_behind)*units;
    for (int64_t base = 0; base < total; base += (int64_t) BATCH*blockDim.x) {
        T value[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int64_t at = base + i*blockDim.x + threadIdx.x;
            if (at < total) {
                const int row  = at/units;
                const int from = row < n_kept ? kept[1 + row] : group_size + row - n_kept;
                value[i] = rows[(int64_t) from*units + at % units];
            }
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int64_t at = base + i*blockDim.x + threadIdx.x;
            if (at < total) {
                rows[at] = value[i];
            }
        }
        __syncthreads();
    }
}

// The dropped rows, last first as `kept` has them, from the group to memory of their own or from there to the stash.
template <typename T>
static __device__ void copy_dropped(T * to, const T * from, int units, const int32_t * kept, int group_size, bool gather) {
    const int n = (group_size - kept[0])*units;
    for (int at = threadIdx.x; at < n; at += blockDim.x) {
        const int i = at/units, row = gather ? kept[group_size - i] : i;
        to[at] = from[(int64_t) row*units + at % units];
    }
    __syncthreads();
}

// rows: of the region. Rows that are dropped wait in `dropped` until those behind the group have moved: the stash may lie there.
template <typename T>
static __device__ void compact_rows(T * rows, int units, const int32_t * d, const int32_t * kept, int group_size, T * dropped) {
    const int64_t n_behind = (int64_t) d[TCA_DESC_USED] - d[TCA_DESC_GROUP] - group_size;
    T * group = rows + (int64_t) d[TCA_DESC_GROUP]*units;
    if (d[TCA_DESC_STASH] >= 0) {
        copy_dropped(dropped, group, units, kept, group_size, true);
    }
    move_rows(group, units, kept, group_size, n_behind);
    if (d[TCA_DESC_STASH] >= 0) {
        copy_dropped(rows + (int64_t) d[TCA_DESC_STASH]*units, dropped, units, kept, group_size, false);
    }
}

// Bytes of K, V and position of one slot, rounded up so that a group of any of them starts at a multiple of 16.
static __host__ __device__ size_t tca_slot_bytes(const tca_store & s) {
    return (s.nb_k + s.nb_v + sizeof(int32_t) + 15)/16*16;
}

// grid (n_head_kv, n_seqs, 3): K, V, positions. dropped: room for a group of rows each
static __global__ void __launch_bounds__(1024, 1) move_kernel(const tca_store s, int32_t * pos, const int32_t * kept, int group_size, char * dropped) {
    const int32_t * d = tca_region(s, blockIdx.y, blockIdx.x);
    if (!tca_compacts(d)) {
        return;
    }
    const size_t unit = (size_t) blockIdx.y*s.n_head_kv + blockIdx.x;
    kept    += unit*(group_size + 1);
    dropped += unit*group_size*tca_slot_bytes(s) + (blockIdx.z == 0 ? 0 : blockIdx.z == 1 ? s.nb_k : s.nb_k + s.nb_v)*group_size;
    if (blockIdx.z == 2) {
        compact_rows(pos + d[TCA_DESC_OFFSET], 1, d, kept, group_size, (int32_t *) dropped);
        return;
    }
    const int size = blockIdx.z == 0 ? s.nb_k : s.nb_v;
    char * rows = (blockIdx.z == 0 ? s.k : s.v) + (int64_t) d[TCA_DESC_OFFSET]*size;
    if (size % 16 == 0) {
        compact_rows((uint4    *) rows, size/16, d, kept, group_size, (uint4    *) dropped);
    } else if (size % 8 == 0) {
        compact_rows((uint2    *) rows, size/8,  d, kept, group_size, (uint2    *) dropped);
    } else if (size % 4 == 0) {
        compact_rows((uint32_t *) rows, size/4,  d, kept, group_size, (uint32_t *) dropped);
    } else {
        compact_rows((uint16_t *) rows, size/2,  d, kept, group_size, (uint16_t *) dropped);
    }
}

static tca_select_args select_args(const tca_tables & t) {
    const int n_keep = t.configs->ne[0];
    const int32_t * keep_counts = (const int32_t *) t.configs->data;
    return { t.n.block_size, t.n.group_size, n_keep, t.n.hadamard, t.n.layer, t.n.rope_type, t.freqs ? (int) (2*t.freqs->ne[0]) : 0, t.n.rope_scale,
        t.freqs ? (const float *) t.freqs->data : nullptr, keep_counts, keep_counts + n_keep,
        t.probe ? (const float *) t.probe->data : nullptr };
}

void tca_cuda_compact(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const tca_compact_node a      = tca_compact_node::of(dst);
    const tca_metric     & metric = *tca_metric_by_id(a.tables.n.metric);
    const tca_select_args  p      = select_args(a.tables);
    const tca_store        s      = tca_store_of(a.k, a.v, a.desc, a.row);
    const size_t           n      = (size_t) s.n_seqs*s.n_head_kv;
    const int              dim    = a.k->ne[0];
    int32_t              * pos    = (int32_t *) a.pos->data;

    tca_queries queries = {};
    if (metric.needs & TCA_NEEDS_QUERIES) {
        queries.q       = (const float *) a.q->data;
        queries.q_head  = a.q->nb[1]/sizeof(float);
        queries.q_token = a.q->nb[2]/sizeof(float);
        queries.gqa     = a.q->ne[1]/s.n_head_kv;
        queries.scale   = a.scale;
        queries.softcap = a.softcap;
    }

    ggml_cuda_pool_alloc<int32_t> kept      (ctx.pool(), n*(p.group_size + 1));
    ggml_cuda_pool_alloc<double>  importance(ctx.pool(), n*p.group_size);
    tca_cuda_importance(ctx, s, pos, p, queries, metric, dim, importance.get());

    const int smem = (p.group_size + p.group_size/p.block_size)*sizeof(double);
    CUDA_CHECK(cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::max(smem, 48*1024)));
    select_kernel<<<dim3(s.n_head_kv, s.n_seqs), SELECT_THREADS, smem, ctx.stream()>>>(s, p, importance.get(), kept.get());
    ggml_cuda_pool_alloc<char> dropped(ctx.pool(), n*p.group_size*tca_slot_bytes(s));
    move_kernel  <<<dim3(s.n_head_kv, s.n_seqs, 3), 1024, 0, ctx.stream()>>>(s, pos, kept.get(), p.group_size, dropped.get());
}
