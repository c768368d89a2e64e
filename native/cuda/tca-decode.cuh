// What the two decode kernels share: which slots a thread block takes, the ring of tiles that brings them, softmax, and how the
// thread blocks of a cluster put their results together.
//
// A chunk of TCA_ATTN_CHUNK slots is shared by the thread blocks of a cluster (Hopper), so that few and short regions still
// keep every multiprocessor busy and the last chunks of a launch end early; the chunk's partial result is merged through
// distributed shared memory. Elsewhere a cluster is one thread block.
#pragma once

#include "tca-kernels.cuh"

#include <cooperative_groups.h>

constexpr int DECODE_WARPS  = 8;
constexpr int DECODE_STAGES = 3;
constexpr int DECODE_STAGE  = 128*136 + 16;  // 128 rows of q8_0 x 128, and room to align the start down to 16 bytes

struct tca_cluster {
    int size, rank;

    __device__ __forceinline__ tca_cluster() {
#if __CUDA_ARCH__ >= 900
        size = cooperative_groups::this_cluster().num_blocks();
        rank = cooperative_groups::this_cluster().block_rank();
#else
        size = 1;
        rank = 0;
#endif
    }

    __device__ __forceinline__ void sync() const {
#if __CUDA_ARCH__ >= 900
        if (size > 1) {
            cooperative_groups::this_cluster().sync();
            return;
        }
#endif
        __syncthreads();
    }

    // the same variable of another thread block of the cluster
    __device__ __forceinline__ const float * of(float * p, int other) const {
#if __CUDA_ARCH__ >= 900
        return size > 1 ? cooperative_groups::this_cluster().map_shared_rank(p, other) : p;
#else
        return p;
#endif
    }
};

// Slots of a thread block: n_slots of them from slot j0 of the region on; slot0 is their place in the store.
struct tca_decode_range {
    const int32_t * d;
    int     chunk;
    int     j0, n_slots;
    int64_t slot0;
    bool    empty;  // the whole cluster has nothing to do

    __device__ __forceinline__ tca_decode_range(const tca_store & s, const tca_cluster & cluster) {
        d = tca_region(s, blockIdx.z, blockIdx.y);
        chunk = blockIdx.x/cluster.size;
        const int used = d[TCA_DESC_USED];
        const int n    = min(TCA_ATTN_CHUNK, used - chunk*TCA_ATTN_CHUNK);
        const int part = (n + 16*cluster.size - 1)/(16*cluster.size)*16;
        empty   = d[TCA_DESC_COUNT] == 0 || n <= 0;
        j0      = chunk*TCA_ATTN_CHUNK + cluster.rank*part;
        n_slots = min(max(n - cluster.rank*part, 0), part);
        slot0   = (int64_t) d[TCA_DESC_OFFSET] + j0;
    }
};

// Tiles of rows, first of K, then of V, in a ring of stages.
struct tca_decode_ring {
    const tca_store & s;
    char *  stages;
    int64_t slot0;
    int     n_slots, rows_k, rows_v, tiles_k, tiles_v;

    // step: rows of a tile are a multiple of it
    __device__ __forceinline__ tca_decode_ring(const tca_store & s, char * stages, const tca_decode_range & range, int step) :
            s(s), stages(stages), slot0(range.slot0), n_slots(range.n_slots) {
        rows_k  = min(128, (DECODE_STAGE - 16)/(int) s.nb_k)/step*step;
        rows_v  = min(128, (DECODE_STAGE - 16)/(int) s.nb_v)/step*step;
        tiles_k = (n_slots + rows_k - 1)/rows_k;
        tiles_v = (n_slots + rows_v - 1)/rows_v;
    }

    __device__ __forceinline__ int rows(int i) const {
        return i < tiles_k ? min(rows_k, n_slots - i*rows_k) : min(rows_v, n_slots - (i - tiles_k)*rows_v);
    }

    __device__ __forceinline__ const char * source(int i) const {
        return i < tiles_k ? s.k + (slot0 + i*rows_k)*s.nb_k : s.v + (slot0 + (i - tiles_k)*rows_v)*s.nb_v;
    }

    __device__ __forceinline__ void issue(int i) const {
        if (i < tiles_k + tiles_v) {
            const char * start = source(i);
            const int    shift = (int) ((uintptr_t) start & 15);
            const char * end   = i < tiles_k ? s.k_end : s.v_end;
            const int    bytes = shift + rows(i)*(int) (i < tiles_k ? s.nb_k : s.nb_v);
            const uint32_t to  = tca_smem(stages + (i % DECODE_STAGES)*DECODE_STAGE);
            for (int b = threadIdx.x*16; b < bytes; b += 32*DECODE_WARPS*16) {
                const char * from = start - shift + b;
                tca_cp_async(to + b, from, (int) min((int64_t) 16, (int64_t) (end - from)));
            }
        }
        tca_cp_async_commit();
    }

    __device__ __forceinline__ void start() const {
        __syncthreads();  // the stages are free
#pragma unroll
        for (int i = 0; i < DECODE_STAGES - 1; ++i) {
            issue(i);
        }
    }

    // Waits for tile i, sends for the next one, returns the first row of tile i.
    __device__ __forceinline__ const char * next(int i) const {
        tca_cp_async_wait<DECODE_STAGES - 2>();
        __syncthreads();
        issue(i + DECODE_STAGES - 1);
        return stages + (i % DECODE_STAGES)*DECODE_STAGE + ((uintptr_t) source(i) & 15);
    }

    __device__ __forceinline__ void finish() const {
        tca_cp_async_wait<0>();
        __syncthreads();
    }
};

// Result of a thread block, for the others of its cluster.
template <int D, int ROWS>
struct tca_decode_result {
    float m[ROWS], l[ROWS];  // maximum (log2 units) and sum
    float o[ROWS*D];         // unnormalised output
};

// scores [n_slots, ROWS] in log2 units -> probabilities; one warp a row
template <int D, int ROWS>
static __device__ __forceinline__ void tca_decode_softmax(float * scores, int n_slots, tca_decode_result<D, ROWS> & result) {
    const int lane = threadIdx.x % 32;
    for (int r = threadIdx.x/32; r < ROWS; r += DECODE_WARPS) {
        float m = TCA_NO_MAX;
        for (int j = lane; j < n_slots; j += 32) {
            m = fmaxf(m, scores[j*ROWS + r]);
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, o));
        }
        float l = 0.0f;
        for (int j = lane; j < n_slots; j += 32) {
            const float p = exp2f(scores[j*ROWS + r] - m);
            scores[j*ROWS + r] = p;
            l += p;
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            l += __shfl_xor_sync(0xffffffff, l, o);
        }
        if (lane == 0) {
            result.m[r] = m;
            result.l[r] = l;
        }
    }
}

// Rows that fit the stages at once when every warp has its own output.
template <int D, int ROWS> constexpr int tca_decode_part = ROWS*DECODE_WARPS*D*4 <= DECODE_STAGES*DECODE_STAGE ? ROWS : ROWS/2;

// sums [DECODE_WARPS, part, D] of the rows from `first` on -> result.o
template <int D, int ROWS>
static __device__ __forceinline__ void tca_decode_gather(const float * sums, int first, tca_decode_result<D, ROWS> & result) {
    constexpr int PART = tca_decode_part<D, ROWS>;
    static_assert(PART*DECODE_WARPS*D*4 <= DECODE_STAGES*DECODE_STAGE, "shared memory");
    __syncthreads();
    for (int i = threadIdx.x; i < PART*D; i += 32*DECODE_WARPS) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; ++w) {
            x += sums[w*PART*D + i];
        }
        result.o[first*D + i] = x;
    }
    __syncthreads();
}

// Merges the cluster's results into the chunk's partial result of the rows r0 to r0 + n_rows.
template <int D, int ROWS>
static __device__ __forceinline__ void tca_decode_write(const tca_queries & a, const tca_decode_range & range, const tca_cluster & cluster,
        tca_decode_result<D, ROWS> & result, int r0, int n_rows) {
    cluster.sync();
    const int head = blockIdx.y, token0 = range.d[TCA_DESC_TOKEN];
    for (int i = cluster.rank*32*DECODE_WARPS + threadIdx.x; i < n_rows*D; i += cluster.size*32*DECODE_WARPS) {
        const int r = i/D;
        float m = TCA_NO_MAX;
        for (int c = 0; c < cluster.size; ++c) {
            m = fmaxf(m, cluster.of(result.m, c)[r]);
        }
        float x = 0.0f, l = 0.0f;
        for (int c = 0; c < cluster.size; ++c) {
            const float weight = exp2f(cluster.of(result.m, c)[r] - m);
            x = fmaf(weight, cluster.of(result.o, c)[i], x);
            l = fmaf(weight, cluster.of(result.l, c)[r], l);
        }
        float * out = a.dst + (size_t) range.chunk*(D + 2) + (head*a.gqa + (r0 + r) % a.gqa)*a.dst_head + (token0 + (r0 + r)/a.gqa)*a.dst_token;
        out[i % D] = x;
        if (i % D == 0) {
            out[D]     = m == TCA_NO_MAX ? m : m*0.69314718f;
            out[D + 1] = l;
        }
    }
    cluster.sync();  // nobody's results are read any more
}

// Launches kernel(store, q) with grid (n_chunks*cluster, n_head_kv, n_seqs).
template <typename Kernel>
static void tca_decode_launch(Kernel kernel, int rows, const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    constexpr int cluster = 1;  // measured on an H100: 2 and 4 are slower from 16K slots a region on, and hardly faster before
    const int smem    = DECODE_STAGES*DECODE_STAGE + TCA_ATTN_CHUNK/cluster*rows*(int) sizeof(float);
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = { (unsigned) cluster, 1, 1 };
    cudaLaunchConfig_t config = {};
    config.gridDim  = dim3(q.n_chunks*cluster, store.n_head_kv, store.n_seqs);
    config.blockDim = dim3(32*DECODE_WARPS);
    config.dynamicSmemBytes = smem;
    config.stream   = stream;
    config.attrs    = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, store, q));
}
