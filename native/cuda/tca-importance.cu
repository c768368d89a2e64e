// How important each token of a group is, as native/metrics has it on the CPU: keys before RoPE (a block a token) where the
// metric looks at them, then a warp a token.
#include "tca-compact.cuh"

#include "metrics/tca-metric.h"

#include <cfloat>

struct importance_args {
    tca_store       s;
    const int32_t * pos;
    tca_select_args p;
    int             dim;
    const double  * keys;   // [n_seqs*n_head_kv, group_size, dim] before RoPE, for metrics with TCA_NEEDS_KEYS
    const double  * means;  // [n_seqs*n_head_kv, dim + 1] mean key of the group and its length, for key-diff
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

// A token to a warp. The metrics return its importance in every lane.
struct token {
    const double * key;       // [dim] before RoPE, for metrics with TCA_NEEDS_KEYS
    const double * mean;      // [dim + 1], for key-diff
    const char   * value;     // row of the store
    int            position;
    int            head;
    int            lane;
};

struct key_diff {
    static __device__ double of(const importance_args & a, const token & x) {
        double dot = 0.0, norm = 0.0;
        for (int i = x.lane; i < a.dim; i += 32) {
            dot  += x.key[i]*x.mean[i];
            norm += x.key[i]*x.key[i];
        }
        dot  = warp_sum(dot);
        norm = warp_sum(norm);
        const double denominator = sqrt(norm)*x.mean[a.dim];
        const double value       = denominator > 0.0 ? 1.0 - dot/denominator : 1.0;
        return isfinite(value) ? value : 0.0;
    }
};

struct key_probe {
    static __device__ double of(const importance_args & a, const token & x) {
        double dot = 0.0;
        for (int i = x.lane; i < a.dim; i += 32) {
            dot += x.key[i]*a.p.probe[x.head*a.dim + i];
        }
        dot = warp_sum(dot);
        return fabs(dot) <= FLT_MAX ? dot : -FLT_MAX;
    }
};

struct key_norm {
    static __device__ double of(const importance_args & a, const token & x) {
        double norm = 0.0;
        for (int i = x.lane; i < a.dim; i += 32) {
            norm += x.key[i]*x.key[i];
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
                const float scale = tca_load8_scaled<decltype(tag)::value>(x.value, i, y);
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

constexpr int WARPS = 8;  // of a block, a token each

// grid (group_size/WARPS rounded up, n_head_kv, n_seqs)
template <typename metric>
static __global__ void __launch_bounds__(32*WARPS) importance_kernel(const importance_args a, double * importance) {
    const int32_t * d = tca_region(a.s, blockIdx.z, blockIdx.y);
    const int t = blockIdx.x*WARPS + threadIdx.x/32;
    if (!tca_compacts(d) || t >= a.p.group_size) {
        return;
    }
    const size_t  unit = blockIdx.z*a.s.n_head_kv + blockIdx.y;
    const size_t  at   = unit*a.p.group_size + t;
    const int64_t slot = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_GROUP] + t;
    const token   x    = { a.keys + at*a.dim, a.means + unit*(a.dim + 1), a.s.v + slot*a.s.nb_v, a.pos[slot], (int) blockIdx.y,
        (int) threadIdx.x % 32 };
    const double value = metric::of(a, x);
    if (x.lane == 0) {
        importance[at] = value;
    }
}

using importance_kernel_fn = void (*)(const importance_args, double *);

// The metrics that CUDA has; NULL: not this one.
static importance_kernel_fn kernel_of(const tca_metric & metric) {
    switch (metric.id) {
        case TCA_METRIC_KEY_DIFF:   return importance_kernel<key_diff>;
        case TCA_METRIC_KEY_PROBE:  return importance_kernel<key_probe>;
        case TCA_METRIC_KEY_NORM:   return importance_kernel<key_norm>;
        case TCA_METRIC_VALUE_NORM: return importance_kernel<value_norm>;
        case TCA_METRIC_STREAMING:  return importance_kernel<streaming>;
        case TCA_METRIC_RANDOM:     return importance_kernel<random_hash>;
    }
    return nullptr;
}

bool tca_cuda_has_metric(const tca_metric & metric) {
    return kernel_of(metric) != nullptr;
}

void tca_cuda_importance(ggml_backend_cuda_context & ctx, const tca_store & s, const int32_t * pos, const tca_select_args & p,
        const tca_metric & metric, int head_dim, double * importance) {
    const size_t n_units = (size_t) s.n_seqs*s.n_head_kv;
    ggml_cuda_pool_alloc<double> keys (ctx.pool());
    ggml_cuda_pool_alloc<double> means(ctx.pool());
    if (metric.needs & TCA_NEEDS_KEYS) {
        keys.alloc(n_units*p.group_size*head_dim);
        keys_kernel<<<dim3(p.group_size, s.n_head_kv, s.n_seqs), 128, head_dim*sizeof(double), ctx.stream()>>>(s, pos, p, keys.get(), head_dim);
    }
    if (metric.id == TCA_METRIC_KEY_DIFF) {
        means.alloc(n_units*(head_dim + 1));
        mean_kernel<<<dim3(s.n_head_kv, s.n_seqs), MEAN_THREADS, 0, ctx.stream()>>>(s, p, keys.get(), means.get(), head_dim);
    }
    const dim3 grid((p.group_size + WARPS - 1)/WARPS, s.n_head_kv, s.n_seqs);
    kernel_of(metric)<<<grid, 32*WARPS, 0, ctx.stream()>>>({ s, pos, p, head_dim, keys.get(), means.get() }, importance);
}
