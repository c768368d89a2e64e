// Compaction: which tokens of a group stay, as native/cpu/tca-select.cpp decides it, then rows move down in place.
//
// Three launches: keys before RoPE in double (many blocks), importance and selection (a block a region), moves (a block a
// region and tensor). Double throughout: selection is a ranking, and the CPU must get the same one. Sums differ from the
// CPU's in their order, hence in the last bits; tokens with equal keys get bitwise equal importance, as there, so that ties
// go to the newer one on both.
#include "tca-kernels.cuh"

#include <map>
#include <mutex>
#include <string>

// A copy of tca_select_params on the device.
struct select_args {
    int             block_size, group_size, n_keep, hadamard;
    int             rope_type, n_rot;
    float           rope_scale;
    const float   * freqs;
    const int32_t * keep_counts;
    const int32_t * configs;
};

// The tables are kept for the life of the process, one copy for equal content: a captured CUDA graph may refer to them.
static select_args tables_on_device(int device, const tca_select_params & p) {
    static std::mutex mutex;
    static std::map<std::pair<int, std::string>, char *> tables;

    const size_t n_freqs   = p.rope.type == TCA_ROPE_NONE ? 0 : p.rope.n_rot/2*sizeof(float);
    const size_t n_keep    = p.n_keep*sizeof(int32_t);
    const size_t n_configs = (size_t) p.n_configs*p.n_keep*sizeof(int32_t);
    std::string content;
    content.append((const char *) p.rope.freqs,  n_freqs);
    content.append((const char *) p.keep_counts, n_keep);
    content.append((const char *) p.configs,     n_configs);

    const std::lock_guard<std::mutex> lock(mutex);
    const auto [it, fresh] = tables.emplace(std::make_pair(device, content), nullptr);
    if (fresh) {
        // on a stream of its own: the caller's may be capturing (in relaxed mode)
        cudaStream_t stream;
        CUDA_CHECK(cudaMalloc(&it->second, content.size()));
        CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
        CUDA_CHECK(cudaMemcpyAsync(it->second, content.data(), content.size(), cudaMemcpyHostToDevice, stream));
        CUDA_CHECK(cudaStreamSynchronize(stream));
        CUDA_CHECK(cudaStreamDestroy(stream));
    }
    const char * data = it->second;
    return { p.block_size, p.group_size, p.n_keep, p.hadamard, p.rope.type, p.rope.n_rot, p.rope.scale,
        (const float *) data, (const int32_t *) (data + n_freqs), (const int32_t *) (data + n_freqs + n_keep) };
}

static __device__ __forceinline__ bool compacts(const int32_t * d) {
    return d[TCA_DESC_COUNT] > 0 && d[TCA_DESC_GROUP] >= 0 && d[TCA_DESC_CONFIG] != TCA_HEAD_DENSE;
}

// keys [n_seqs*n_head_kv, group_size, head_dim] out. grid (group_size, n_head_kv, n_seqs), a block of 128 threads a token
static __global__ void keys_kernel(const tca_store s, const int32_t * pos, const select_args p, double * keys, int dim) {
    extern __shared__ double x[];  // [dim]
    const int32_t * d = tca_region(s, blockIdx.z, blockIdx.y);
    if (!compacts(d)) {
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

// value of i beats that of j: larger, or equal and newer
static __device__ __forceinline__ bool beats(double vi, int i, double vj, int j) {
    return vi > vj || (vi == vj && i > j);
}

static __device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        x += __shfl_xor_sync(0xffffffff, x, o);
    }
    return x;
}

constexpr int SELECT_THREADS = 1024;

// kept [n_seqs*n_head_kv, group_size + 1] out: number of kept tokens, then their indices in the group, increasing
// grid (n_head_kv, n_seqs)
static __global__ void __launch_bounds__(SELECT_THREADS, 1) select_kernel(const tca_store s, const select_args p, const double * keys,
        int32_t * kept, int dim) {
    extern __shared__ double importance[];           // [group_size], then blocks [group_size/block_size], then mean [dim]
    double * blocks = importance + p.group_size;
    double * mean   = blocks + p.group_size/p.block_size;
    __shared__ double sums[SELECT_THREADS];
    __shared__ int    counts[SELECT_THREADS/32];
    __shared__ double norm_shared;

    const int32_t * d = tca_region(s, blockIdx.y, blockIdx.x);
    if (!compacts(d)) {
        return;
    }
    const int unit = blockIdx.y*s.n_head_kv + blockIdx.x;
    const int n    = p.group_size;
    const int tid  = threadIdx.x, lane = tid % 32, warp = tid / 32;
    keys += (size_t) unit*n*dim;
    kept += (size_t) unit*(n + 1);

    // mean: parts of the tokens in parallel, then the parts in order
    const int n_parts = SELECT_THREADS/dim;
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
    if (tid < dim) {
        double sum = 0.0;
        for (int part = 0; part < n_parts; ++part) {
            sum += sums[part*dim + tid];
        }
        mean[tid] = sum/n;
    }
    __syncthreads();
    if (warp == 0) {
        double sum = 0.0;
        for (int i = lane; i < dim; i += 32) {
            sum += mean[i]*mean[i];
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            norm_shared = sqrt(sum);
        }
    }
    __syncthreads();
    const double mean_norm = norm_shared;

    for (int t = warp; t < n; t += SELECT_THREADS/32) {
        double dot = 0.0, norm = 0.0;
        for (int i = lane; i < dim; i += 32) {
            const double x = keys[(size_t) t*dim + i];
            dot  += x*mean[i];
            norm += x*x;
        }
        dot  = warp_sum(dot);
        norm = warp_sum(norm);
        if (lane == 0) {
            const double denominator = sqrt(norm)*mean_norm;
            const double value       = denominator > 0.0 ? 1.0 - dot/denominator : 1.0;
            importance[t] = isfinite(value) ? value : 0.0;
        }
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
        if (stays) {
            kept[1 + before + __popc(ballot & ((1u << lane) - 1))] = t;
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

// grid (n_head_kv, n_seqs, 3): K, V, positions
static __global__ void __launch_bounds__(1024, 1) move_kernel(const tca_store s, int32_t * pos, const int32_t * kept, int group_size) {
    const int32_t * d = tca_region(s, blockIdx.y, blockIdx.x);
    if (!compacts(d)) {
        return;
    }
    kept += (size_t) (blockIdx.y*s.n_head_kv + blockIdx.x)*(group_size + 1);
    const int64_t first    = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_GROUP];
    const int64_t n_behind = (int64_t) d[TCA_DESC_USED] - d[TCA_DESC_GROUP] - group_size;
    if (blockIdx.z == 2) {
        move_rows(pos + first, 1, kept, group_size, n_behind);
        return;
    }
    char * rows = blockIdx.z == 0 ? s.k : s.v;
    const int size = blockIdx.z == 0 ? s.nb_k : s.nb_v;
    rows += first*size;
    if (size % 16 == 0) {
        move_rows((uint4    *) rows, size/16, kept, group_size, n_behind);
    } else if (size % 8 == 0) {
        move_rows((uint2    *) rows, size/8,  kept, group_size, n_behind);
    } else if (size % 4 == 0) {
        move_rows((uint32_t *) rows, size/4,  kept, group_size, n_behind);
    } else {
        move_rows((uint16_t *) rows, size/2,  kept, group_size, n_behind);
    }
}

// src: k, v, pos, desc
void tca_cuda_compact(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[0];
    int32_t * pos = (int32_t *) dst->src[2]->data;

    const tca_store   s    = tca_store_of(k, dst->src[1], dst->src[3], tca_op_get_params(dst).row);
    const select_args p    = tables_on_device(ctx.device, *tca_op_select_params(dst));
    const int         dim  = k->ne[0];
    const size_t      n    = (size_t) s.n_seqs*s.n_head_kv;

    ggml_cuda_pool_alloc<double>  keys(ctx.pool(), n*p.group_size*dim);
    ggml_cuda_pool_alloc<int32_t> kept(ctx.pool(), n*(p.group_size + 1));

    const int smem = (p.group_size + p.group_size/p.block_size + dim)*sizeof(double);
    CUDA_CHECK(cudaFuncSetAttribute(select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::max(smem, 48*1024)));

    keys_kernel  <<<dim3(p.group_size, s.n_head_kv, s.n_seqs), 128, dim*sizeof(double), ctx.stream()>>>(s, pos, p, keys.get(), dim);
    select_kernel<<<dim3(s.n_head_kv, s.n_seqs), SELECT_THREADS, smem, ctx.stream()>>>(s, p, keys.get(), kept.get(), dim);
    move_kernel  <<<dim3(s.n_head_kv, s.n_seqs, 3), 1024, 0, ctx.stream()>>>(s, pos, kept.get(), p.group_size);
}
