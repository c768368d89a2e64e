// How important each token of a group is, as native/metrics has it on the CPU: first what the metric looks at (keys before RoPE,
// their mean, the softmax of the last queries), then a warp a token.
#include "tca-compact.cuh"

#include "tca-cuda-metrics.h"

#include <cfloat>

struct importance_args {
    tca_store       s;
    const int32_t * pos;
    tca_select_args p;
    int             dim;
    tca_queries     queries;
    const double  * keys;       // [n_seqs*n_head_kv, group_size, dim] before RoPE, for metrics with TCA_NEEDS_KEYS
    const double  * means;      // [n_seqs*n_head_kv, dim + 1] mean key of the group and its length, for key-diff
    const double2 * softmax;    // [n_seqs*n_head_kv, gqa*TCA_OBSERVED_QUERIES] maximum and sum, for metrics with TCA_NEEDS_QUERIES
    const double  * ranked[2];  // [n_seqs*n_head_kv, group_size] importance, for the metric that adds ranks
};

// keys [n_seqs*n_head_kv, group_size, head_dim] out. grid (group_size, n_head_kv, n_seqs), a block of 128 threads a token
static __global__ void keys_kernel(const tca_store s, const int32_t * pos, const tca_select_args p, double * keys, int dim) {
    extern __shared__ double x[];  // [dim]
    const int32_t * d = tca_region(s, blockIdx.z, blockIdx.y);
    if (!tca_compacts(d)) {
        return;
    }
    const int     t    = blockIdx.x;
    const int64_t slot = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_GROUP] + t;
    const char  * row  = s.k + slot*s.nb_k;
    tca_with_type(s.type_k, [&](auto tag) {
        for (int i = threadIdx.x; i < dim/8; i += blockDim.x) {
            float y[8];
            const float scale = tca_load8_scaled<decltype(tag)::value>(row, i, y);
            for (int e = 0; e < 8; ++e) {
                x[8*i + e] = __fmul_rn(scale, y[e]);  // the f32 value that the CPU starts from
            }
        }
    });
    __syncthreads();

    if (p.hadamard > 0) {
        const int n = p.hadamard, used = dim/n*n;
        for (int h = 1; h < n; h *= 2) {
            for (int i = threadIdx.x; i < used/2; i += blockDim.x) {
                const int j = i/h*2*h + i % h;
                const double a = x[j], b = x[j + h];
                x[j]     = a + b;
                x[j + h] = a - b;
            }
            __syncthreads();
        }
        const double norm = 1.0/sqrt((double) n);
        for (int i = threadIdx.x; i < used; i += blockDim.x) {
            x[i] *= norm;
        }
        __syncthreads();
    }
    if (p.rope_type != TCA_ROPE_NONE) {
        const int    n_half   = p.n_rot/2;
        const double scale    = 1.0/p.rope_scale;
        const int    position = pos[slot];
        for (int i = threadIdx.x; i < n_half; i += blockDim.x) {
            const int ia = p.rope_type == TCA_ROPE_NORM ? 2*i     : i;
            const int ib = p.rope_type == TCA_ROPE_NORM ? 2*i + 1 : i + n_half;
            double sine, cosine;
            sincos((double) position*p.freqs[i], &sine, &cosine);
            const double c = cosine*scale, v = sine*scale;
            const double a = x[ia], b = x[ib];
            x[ia] = a*c + b*v;
            x[ib] = b*c - a*v;
        }
        __syncthreads();
    }
    double * out = keys + ((size_t) (blockIdx.z*s.n_head_kv + blockIdx.y)*p.group_size + t)*dim;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        out[i] = x[i];
    }
}

static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, o);
    }
    return x;
}

constexpr int MEAN_THREADS = 1024;

// means [n_seqs*n_head_kv, dim + 1] out. grid (n_head_kv, n_seqs)
static __global__ void __launch_bounds__(MEAN_THREADS, 1) mean_kernel(const tca_store s, const tca_select_args p, const double * keys,
        double * means, int dim) {
    __shared__ double sums[MEAN_THREADS];
    const int32_t * d = tca_region(s, blockIdx.y, blockIdx.x);
    if (!tca_compacts(d)) {
        return;
    }
    const int unit = blockIdx.y*s.n_head_kv + blockIdx.x;
    const int n    = p.group_size;
    const int tid  = threadIdx.x;
    keys  += (size_t) unit*n*dim;
    means += (size_t) unit*(dim + 1);

    // parts of the tokens in parallel, then the parts in order
    const int n_parts = MEAN_THREADS/dim;
    if (tid < n_parts*dim) {
        const int part = tid/dim, i = tid % dim;
        double sum = 0.0;
#pragma unroll 8
        for (int t = n*part/n_parts; t < n*(part + 1)/n_parts; ++t) {
            sum += keys[(size_t) t*dim + i];
        }
        sums[tid] = sum;
    }
    __syncthreads();
    double mean = 0.0;
    if (tid < dim) {
        for (int part = 0; part < n_parts; ++part) {
            mean += sums[part*dim + tid];
        }
        mean /= n;
        means[tid] = mean;
    }
    __syncthreads();
    if (tid < dim) {
        sums[tid] = mean*mean;
    }
    __syncthreads();
    if (tid < 32) {
        double sum = 0.0;
        for (int i = tid; i < dim; i += 32) {
            sum += sums[i];
        }
        sum = warp_sum(sum);
        if (tid == 0) {
            means[dim] = sqrt(sum);
        }
    }
}

// The last queries of a segment as rows: row r is query r % n of the n, under query head r / n of the KV head.
static __device__ __forceinline__ int observing_rows(const importance_args & a, const int32_t * d) {
    return a.queries.gqa*min(d[TCA_DESC_COUNT], (int) TCA_OBSERVED_QUERIES);
}

struct observer {
    const float * q;       // [dim]
    int           n_seen;  // slots of the region, from the first
};

static __device__ __forceinline__ observer observer_of(const importance_args & a, const int32_t * d, int head_kv, int r) {
    const int n     = min(d[TCA_DESC_COUNT], (int) TCA_OBSERVED_QUERIES);
    const int token = d[TCA_DESC_TOKEN] + d[TCA_DESC_COUNT] - n + r % n;
    const int head  = head_kv*a.queries.gqa + r/n;
    return { a.queries.q + head*a.queries.q_head + token*a.queries.q_token, d[TCA_DESC_USED] - n + r % n + 1 };
}

static __device__ double attention_score(const importance_args & a, const char * key, const float * q) {
    double dot = 0.0;
    tca_with_type(a.s.type_k, [&](auto tag) {
        for (int i = 0; i < a.dim/8; ++i) {
            float x[8];
            const float scale = tca_load8_scaled<decltype(tag)::value>(key, i, x);
            for (int e = 0; e < 8; ++e) {
                dot += (double) __fmul_rn(scale, x[e])*q[8*i + e];
            }
        }
    });
    dot *= a.queries.scale;
    return a.queries.softcap != 0.0f ? a.queries.softcap*tanh(dot/a.queries.softcap) : dot;
}

constexpr int SOFTMAX_THREADS = 128;

// softmax out, see importance_args. grid (gqa*TCA_OBSERVED_QUERIES, n_head_kv, n_seqs)
static __global__ void __launch_bounds__(SOFTMAX_THREADS) softmax_kernel(const importance_args a, double2 * softmax) {
    __shared__ double maxima[SOFTMAX_THREADS], sums[SOFTMAX_THREADS];
    const int32_t * d = tca_region(a.s, blockIdx.z, blockIdx.y);
    if (!tca_compacts(d) || blockIdx.x >= observing_rows(a, d)) {
        return;
    }
    const observer o = observer_of(a, d, blockIdx.y, blockIdx.x);
    double max = -DBL_MAX, sum = 0.0;
    for (int slot = threadIdx.x; slot < o.n_seen; slot += SOFTMAX_THREADS) {
        const double score = attention_score(a, a.s.k + ((int64_t) d[TCA_DESC_OFFSET] + slot)*a.s.nb_k, o.q);
        if (score > max) {
            sum *= exp(max - score);
            max  = score;
        }
        sum += exp(score - max);
    }
    maxima[threadIdx.x] = max;
    sums  [threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < SOFTMAX_THREADS; ++i) {
            max = fmax(max, maxima[i]);
        }
        sum = 0.0;
        for (int i = 0; i < SOFTMAX_THREADS; ++i) {
            sum += sums[i]*exp(maxima[i] - max);
        }
        softmax[((size_t) blockIdx.z*a.s.n_head_kv + blockIdx.y)*a.queries.gqa*TCA_OBSERVED_QUERIES + blockIdx.x] = make_double2(max, sum);
    }
}

// A token to a warp. The metrics return its importance in every lane.
struct token {
    const int32_t * d;         // descriptor of the region
    size_t          unit;      // number of the region among all
    int             head;      // KV head
    int             t;         // in the group
    int             position;
    const char    * key_row;   // of the store
    const char    * value_row;
    int             lane;
};

struct key_diff {
    static __device__ double of(const importance_args & a, const token & x) {
        const double * key  = a.keys + (x.unit*a.p.group_size + x.t)*a.dim;
        const double * mean = a.means + x.unit*(a.dim + 1);
        double dot = 0.0, norm = 0.0;
        for (int i = x.lane; i < a.dim; i += 32) {
            dot  += key[i]*mean[i];
            norm += key[i]*key[i];
        }
        dot  = warp_sum(dot);
        norm = warp_sum(norm);
        const double denominator = sqrt(norm)*mean[a.dim];
        const double value       = denominator > 0.0 ? 1.0 - dot/denominator : 1.0;
        return isfinite(value) ? value : 0.0;
    }
};

struct key_probe {
    static __device__ double of(const importance_args & a, const token & x) {
        const double * key   = a.keys + (x.unit*a.p.group_size + x.t)*a.dim;
        const float  * probe = a.p.probe + x.head*a.dim;
        double dot = 0.0;
        for (int i = x.lane; i < a.dim; i += 32) {
            dot += key[i]*probe[i];
        }
        dot = warp_sum(dot);
        return fabs(dot) <= FLT_MAX ? dot : -FLT_MAX;
    }
};

struct key_norm {
    static __device__ double of(const importance_args & a, const token & x) {
        const double * key = a.keys + (x.unit*a.p.group_size + x.t)*a.dim;
        double norm = 0.0;
        for (int i = x.lane; i < a.dim; i += 32) {
            norm += key[i]*key[i];
        }
        norm = warp_sum(norm);
        return isfinite(norm) ? -sqrt(norm) : -FLT_MAX;
    }
};

struct value_norm {
    static __device__ double of(const importance_args & a, const token & x) {
        double norm = 0.0;
        tca_with_type(a.s.type_v, [&](auto tag) {
            for (int i = x.lane; i < a.dim/8; i += 32) {
                float y[8];
                const float scale = tca_load8_scaled<decltype(tag)::value>(x.value_row, i, y);
                for (int e = 0; e < 8; ++e) {
                    const double v = __fmul_rn(scale, y[e]);  // the f32 value that the CPU starts from
                    norm += v*v;
                }
            }
        });
        norm = warp_sum(norm);
        return isfinite(norm) ? sqrt(norm) : 0.0;
    }
};

struct streaming {
    static __device__ double of(const importance_args &, const token & x) {
        return x.position;
    }
};

struct random_hash {
    static __device__ double of(const importance_args & a, const token & x) {
        uint64_t z = ((uint64_t) (uint32_t) x.position << 32) | ((uint64_t) (uint16_t) a.p.layer << 16) | (uint16_t) x.head;
        z += 0x9e3779b97f4a7c15u;
        z  = (z ^ (z >> 30))*0xbf58476d1ce4e5b9u;
        z  = (z ^ (z >> 27))*0x94d049bb133111ebu;
        return ((z ^ (z >> 31)) >> 11)*0x1p-53;
    }
};

struct observed_attn {
    static __device__ double of(const importance_args & a, const token & x) {
        const double2 * softmax = a.softmax + x.unit*a.queries.gqa*TCA_OBSERVED_QUERIES;
        const int       n_rows  = observing_rows(a, x.d);
        double weight = 0.0;
        for (int r = x.lane; r < n_rows; r += 32) {
            const observer o = observer_of(a, x.d, x.head, r);
            if (x.d[TCA_DESC_GROUP] + x.t < o.n_seen) {
                weight += exp(attention_score(a, x.key_row, o.q) - softmax[r].x)/softmax[r].y;
            }
        }
        weight = warp_sum(weight);
        return isfinite(weight) ? weight : 0.0;
    }
};

// key-diff+observed: in how many comparisons with another token of the group it wins, by either
struct rank_sum {
    static __device__ double of(const importance_args & a, const token & x) {
        int wins = 0;
        for (const double * all : a.ranked) {
            const double * importance = all + x.unit*a.p.group_size;
            for (int o = x.lane; o < a.p.group_size; o += 32) {
                wins += importance[o] < importance[x.t];
            }
        }
        return warp_sum(wins);
    }
};

constexpr int WARPS = 8;  // of a block, a token each

// grid (group_size/WARPS rounded up, n_head_kv, n_seqs)
template <typename metric>
static __global__ void __launch_bounds__(32*WARPS) importance_kernel(const importance_args a, double * importance) {
    const int32_t * d = tca_region(a.s, blockIdx.z, blockIdx.y);
    const int t = blockIdx.x*WARPS + threadIdx.x/32;
    if (!tca_compacts(d) || t >= a.p.group_size) {
        return;
    }
    const size_t  unit = (size_t) blockIdx.z*a.s.n_head_kv + blockIdx.y;
    const int64_t slot = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_GROUP] + t;
    const token   x    = { d, unit, (int) blockIdx.y, t, a.pos[slot], a.s.k + slot*a.s.nb_k, a.s.v + slot*a.s.nb_v, (int) threadIdx.x % 32 };
    const double value = metric::of(a, x);
    if (x.lane == 0) {
        importance[unit*a.p.group_size + t] = value;
    }
}

using importance_kernel_fn = void (*)(const importance_args, double *);

static importance_kernel_fn kernel_of(const tca_metric & metric) {
    switch (metric.id) {
#define CASE(id, kernel) case TCA_METRIC_##id: return importance_kernel<kernel>;
        TCA_CUDA_METRICS(CASE)
#undef CASE
    }
    GGML_ABORT("tca: metric %s", metric.name);
}

void tca_cuda_importance(ggml_backend_cuda_context & ctx, const tca_store & s, const int32_t * pos, const tca_select_args & p,
        const tca_queries & queries, const tca_metric & metric, int head_dim, double * importance) {
    const size_t n_units = (size_t) s.n_seqs*s.n_head_kv;
    const bool   ranks   = metric.id == TCA_METRIC_KEY_DIFF_OBSERVED;
    const dim3   grid((p.group_size + WARPS - 1)/WARPS, s.n_head_kv, s.n_seqs);

    ggml_cuda_pool_alloc<double>  keys   (ctx.pool());
    ggml_cuda_pool_alloc<double>  means  (ctx.pool());
    ggml_cuda_pool_alloc<double2> softmax(ctx.pool());
    ggml_cuda_pool_alloc<double>  ranked (ctx.pool());
    importance_args a = { s, pos, p, head_dim, queries, nullptr, nullptr, nullptr, { nullptr, nullptr } };
    if (metric.needs & TCA_NEEDS_KEYS) {
        a.keys = keys.alloc(n_units*p.group_size*head_dim);
        keys_kernel<<<dim3(p.group_size, s.n_head_kv, s.n_seqs), 128, head_dim*sizeof(double), ctx.stream()>>>(s, pos, p, keys.get(), head_dim);
    }
    if (metric.id == TCA_METRIC_KEY_DIFF || ranks) {
        a.means = means.alloc(n_units*(head_dim + 1));
        mean_kernel<<<dim3(s.n_head_kv, s.n_seqs), MEAN_THREADS, 0, ctx.stream()>>>(s, p, keys.get(), means.get(), head_dim);
    }
    if (metric.needs & TCA_NEEDS_QUERIES) {
        const int n_rows = queries.gqa*TCA_OBSERVED_QUERIES;
        a.softmax = softmax.alloc(n_units*n_rows);
        softmax_kernel<<<dim3(n_rows, s.n_head_kv, s.n_seqs), SOFTMAX_THREADS, 0, ctx.stream()>>>(a, softmax.get());
    }
    if (ranks) {
        ranked.alloc(2*n_units*p.group_size);
        double * const parts[] = { ranked.get(), ranked.get() + n_units*p.group_size };
        importance_kernel<key_diff>     <<<grid, 32*WARPS, 0, ctx.stream()>>>(a, parts[0]);
        importance_kernel<observed_attn><<<grid, 32*WARPS, 0, ctx.stream()>>>(a, parts[1]);
        a.ranked[0] = parts[0];
        a.ranked[1] = parts[1];
    }
    kernel_of(metric)<<<grid, 32*WARPS, 0, ctx.stream()>>>(a, importance);
}
