// What the three decode kernels share: which slots a thread block takes, the ring of tiles that brings them, softmax, and how the
// warps put their results together.
//
// Regions are cut in chunks of equal length, a thread block each, numbered without gaps over all regions: thread blocks that find
// nothing to do come last. The chunks fill as few whole rounds of what the GPU holds at once as their greatest length allows: on an
// H100 800 chunks in rounds of 396 took three rounds' time (2.02 needed). The grid has the rounds of a full store, no more: on an
// H100 1,200 thread blocks without work took 5 us.
// Only these kernels and combine_kernel agree on that length (the CPU's chunks are TCA_ATTN_CHUNK slots): the two nodes of a split
// attention must run on the same device. They are neighbours in the graph and supported by one predicate, so they do.
#pragma once

#include "tca-kernels.cuh"

constexpr int DECODE_WARPS  = 8;
constexpr int DECODE_WARPS_HALF = 4;  // of f16 and bf16: more and smaller thread blocks with as many bytes on their way
constexpr int DECODE_STAGES = 3;
constexpr int DECODE_STAGE  = 128*136 + 16;  // 128 rows of q8_0 x 128, and room to align the start down to 16 bytes
constexpr int DECODE_CHUNK_MIN = 128;   // shortest chunk; below it what a thread block takes to start counts more than its work
constexpr int DECODE_CHUNK_MIN_HALF = 64;
constexpr int DECODE_CHUNK_MAX = 1344;  // longest: three thread blocks of scores for 4 rows fit a multiprocessor (228 KB)
constexpr int DECODE_CHUNK_MAX_QUANTIZED = 4096;  // these hold no scores
constexpr int DECODE_CHUNK_MAX_HALF      = 1 << 20;

// Thread blocks a multiprocessor that the kernels are compiled for.
constexpr __host__ __device__ int tca_decode_per_sm(int head_dim, int rows) {
    return head_dim <= 128 && rows <= 4 ? 3 : 2;
}
constexpr __host__ __device__ int tca_decode_per_sm_quantized(int head_dim) {
    return head_dim <= 128 ? 2 : 1;  // two have the registers that they need; three of them were 3 to 20% slower on an H100
}
constexpr __host__ __device__ int tca_decode_per_sm_half(int head_dim) {
    return head_dim <= 80 ? 3 : head_dim <= 128 ? 2 : 1;  // as many rings as the shared memory holds
}

// Shared memory of a thread block beside its static memory, by the architecture that code is compiled for.
constexpr __host__ __device__ int tca_decode_memory(int arch) {
    return 1024*(arch >= 900 && arch < 1200 ? 216 : arch == 800 || arch == 870 ? 152 : 88);
}

// A step of all warps' rings: a tile of 16 slots of K and one of V each. Of f16 rows, 16 bytes apart; of q8_0 rows, with 16 bytes to
// align the start of a tile.
constexpr __host__ __device__ int tca_decode_step_half     (int head_dim) { return DECODE_WARPS_HALF*2*16*(2*head_dim + 16); }
constexpr __host__ __device__ int tca_decode_step_quantized(int head_dim) { return DECODE_WARPS*2*(16*(head_dim/32*34) + 16); }

// Steps of the rings: 3, or what fits.
constexpr __host__ __device__ int tca_decode_steps(int step, int arch) {
    return tca_decode_memory(arch)/step < 3 ? tca_decode_memory(arch)/step : 3;
}

#ifdef __CUDA_ARCH__
constexpr int DECODE_ARCH = __CUDA_ARCH__;
#else
constexpr int DECODE_ARCH = 900;  // the host asks tca_decode_arch()
#endif

// of the code that runs on a device
static inline int tca_decode_arch(int device) {
    return ggml_cuda_highest_compiled_arch(ggml_cuda_info().devices[device].cc);
}

static __device__ __forceinline__ int tca_used(const int32_t * desc, int n_units, int u) {
    const int32_t * d = desc + (size_t) u*TCA_DESC_SIZE;
    return u < n_units && d[TCA_DESC_COUNT] > 0 ? d[TCA_DESC_USED] : 0;
}

// Rounds of limits.at_once thread blocks, and their chunk length, for so many slots in n_units regions. There are at most
// total/chunk + n_units chunks. More slots never need fewer rounds.
struct tca_decode_rounds {
    int rounds, chunk;

    __host__ __device__ tca_decode_rounds(int64_t total, int n_units, tca_decode_limits limits) {
        const int at_once = limits.at_once;
        rounds = (int) (total/((int64_t) limits.chunk_max*at_once)) + 1;
        rounds = max(rounds, 2*n_units/at_once + 1);  // with many regions most chunks are the last of theirs
        chunk  = fit(total, n_units, at_once);
        if (chunk > limits.chunk_max) {
            ++rounds;
            chunk = fit(total, n_units, at_once);
        }
    }
    __host__ __device__ int fit(int64_t total, int n_units, int at_once) const {
        const int n = rounds*at_once - n_units;
        return (int) ((total + n - 1)/n + 15)/16*16;
    }
};

// Slots a chunk; TCA_ATTN_CHUNK where the decode kernels do not run (limits.at_once 0). n_chunks: chunks of a region that dst has
// room for. Called by whole warps.
static __device__ __forceinline__ int tca_decode_chunk(const int32_t * desc, int n_units, tca_decode_limits limits, int n_chunks) {
    if (limits.at_once == 0) {
        return TCA_ATTN_CHUNK;
    }
    int total = 0, longest = 0;
    for (int u = threadIdx.x % 32; u < n_units; u += 32) {
        const int used = tca_used(desc, n_units, u);
        total  += used;
        longest = max(longest, used);
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        total  += __shfl_xor_sync(0xffffffff, total, o);
        longest = max(longest, __shfl_xor_sync(0xffffffff, longest, o));
    }
    const int least = ((longest + n_chunks - 1)/n_chunks + 15)/16*16;
    return max(max(tca_decode_rounds(total, n_units, limits).chunk, least), limits.chunk_min);
}

// Slots of a thread block: n_slots of them from slot j0 of the region on; slot0 is their place in the store.
struct tca_decode_range {
    const int32_t * d;
    int     head, chunk;
    int     j0, n_slots;
    int64_t slot0;
    bool    empty;

    // by one warp; the struct is in shared memory
    __device__ __forceinline__ void set(const tca_store & s, const tca_queries & q) {
        const int n_units = s.n_head_kv*s.n_seqs, lane = threadIdx.x % 32;
        const int length  = tca_decode_chunk(s.desc, n_units, q.limits, q.n_chunks);
        int before = 0, unit = -1, at = 0;
        for (int u0 = 0; u0 < n_units && unit < 0; u0 += 32) {
            const int n = (tca_used(s.desc, n_units, u0 + lane) + length - 1)/length;
            int sum = n;
#pragma unroll
            for (int o = 1; o < 32; o *= 2) {
                const int other = __shfl_up_sync(0xffffffff, sum, o);
                sum += lane >= o ? other : 0;
            }
            const uint32_t found = __ballot_sync(0xffffffff, (int) blockIdx.x < before + sum);
            if (found) {
                const int l = __ffs(found) - 1;
                unit  = u0 + l;
                at    = blockIdx.x - before - __shfl_sync(0xffffffff, sum - n, l);
            }
            before += __shfl_sync(0xffffffff, sum, 31);
        }
        if (lane == 0) {
            empty = unit < 0;
            d     = s.desc + (size_t) max(unit, 0)*TCA_DESC_SIZE;
            head  = unit % s.n_head_kv;
            chunk = at;
            j0    = at*length;
            slot0 = (int64_t) d[TCA_DESC_OFFSET] + j0;
            n_slots = min(length, d[TCA_DESC_USED] - j0);
        }
    }
};

// Tiles of rows, first of K, then of V, in a ring of stages.
struct tca_decode_ring {  // in shared memory
    int64_t slot0;
    int     n_slots, rows_k, rows_v, tiles_k, tiles;

    // step: rows of a tile are a multiple of it
    __device__ __forceinline__ void set(const tca_store & s, const tca_decode_range & range, int step) {
        slot0   = range.slot0;
        n_slots = range.n_slots;
        rows_k  = min(128, (DECODE_STAGE - 16)/(int) s.nb_k)/step*step;
        rows_v  = min(128, (DECODE_STAGE - 16)/(int) s.nb_v)/step*step;
        tiles_k = (n_slots + rows_k - 1)/rows_k;
        tiles   = tiles_k + (n_slots + rows_v - 1)/rows_v;
    }

    __device__ __forceinline__ int rows(int i) const {
        return i < tiles_k ? min(rows_k, n_slots - i*rows_k) : min(rows_v, n_slots - (i - tiles_k)*rows_v);
    }

    __device__ __forceinline__ const char * source(const tca_store & s, int i) const {
        return i < tiles_k ? s.k + (slot0 + i*rows_k)*s.nb_k : s.v + (slot0 + (i - tiles_k)*rows_v)*s.nb_v;
    }

    __device__ __forceinline__ void issue(const tca_store & s, char * stages, int i) const {
        if (i < tiles) {
            const char * start = source(s, i);
            const int    shift = (int) ((uintptr_t) start & 15);
            const int    limit = (int) min((int64_t) 1 << 20, (int64_t) ((i < tiles_k ? s.k_end : s.v_end) - start) + shift);
            const int    bytes = shift + rows(i)*(int) (i < tiles_k ? s.nb_k : s.nb_v);
            const uint32_t to  = tca_smem(stages + (i % DECODE_STAGES)*DECODE_STAGE);
            for (int b = threadIdx.x*16; b < bytes; b += 32*DECODE_WARPS*16) {
                tca_cp_async(to + b, start - shift + b, min(16, limit - b));
            }
        }
        tca_cp_async_commit();
    }

    __device__ __forceinline__ void start(const tca_store & s, char * stages) const {
        __syncthreads();  // the stages are free
        for (int i = 0; i < DECODE_STAGES - 1; ++i) {
            issue(s, stages, i);
        }
    }

    // Waits for tile i, sends for a later one, returns the first row of tile i.
    __device__ __forceinline__ const char * next(const tca_store & s, char * stages, int i) const {
        tca_cp_async_wait<DECODE_STAGES - 2>();
        __syncthreads();
        issue(s, stages, i + DECODE_STAGES - 1);
        return stages + (i % DECODE_STAGES)*DECODE_STAGE + ((uintptr_t) source(s, i) & 15);
    }

    __device__ __forceinline__ void finish() const {
        tca_cp_async_wait<0>();
        __syncthreads();
    }
};

// Result of a chunk.
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

// The chunk's partial result of the rows r0 to r0 + n_rows.
template <int D, int ROWS>
static __device__ __forceinline__ void tca_decode_write(const tca_queries & a, const tca_decode_range & range,
        const tca_decode_result<D, ROWS> & result, int r0, int n_rows) {
    const int token0 = range.d[TCA_DESC_TOKEN];
    for (int i = threadIdx.x; i < n_rows*D; i += 32*DECODE_WARPS) {
        const int r = i/D;
        float * out = a.dst + (size_t) range.chunk*(D + 2) + (range.head*a.gqa + (r0 + r) % a.gqa)*a.dst_head + (token0 + (r0 + r)/a.gqa)*a.dst_token;
        out[i % D] = result.o[i];
        if (i % D == 0) {
            out[D]     = result.m[r] == TCA_NO_MAX ? TCA_NO_MAX : result.m[r]*0.69314718f;
            out[D + 1] = result.l[r];
        }
    }
    __syncthreads();
}

// smem: bytes of shared memory beside the kernel's static ones
template <int warps, typename Kernel>
static void tca_decode_launch(Kernel kernel, int smem, const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    const int n_units = store.n_head_kv*store.n_seqs;
    const int n_blocks = tca_decode_rounds(store.n_slots, n_units, q.limits).rounds*q.limits.at_once;
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(dim3(std::min(n_blocks, q.n_chunks*n_units)), dim3(32*warps), smem, stream),
        store, q);
}
