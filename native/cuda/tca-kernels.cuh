// Shared by the CUDA kernels: what a node holds, rows of the store, limits.
#pragma once

#include "ops/tca-ops.h"

#include "ggml-cuda/common.cuh"

#include <type_traits>

// Instructions of compute capability 8.0 and newer. Upstream's default list of architectures has older ones, too: their code must
// compile, and never runs (TCA_CUDA_MIN_CC).
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#    define TCA_ASM(...) __trap()
#else
#    define TCA_ASM(...) asm volatile(__VA_ARGS__)
#endif

// Calls launch(std::integral_constant<int, D>()) for the head size D that a kernel is made for (tca_cuda_supports).
template <typename Launch>
static void tca_with_head_dim(int head_dim, Launch launch) {
    switch (head_dim) {
        case 64:  launch(std::integral_constant<int,  64>()); break;
        case 80:  launch(std::integral_constant<int,  80>()); break;
        case 96:  launch(std::integral_constant<int,  96>()); break;
        case 128: launch(std::integral_constant<int, 128>()); break;
        case 256: launch(std::integral_constant<int, 256>()); break;
        default:  GGML_ABORT("tca: head size %d", head_dim);
    }
}

// Tensors of a store and its descriptor, by value into kernels.
struct tca_store {
    char          * k;
    char          * v;
    size_t          nb_k;     // bytes a slot
    size_t          nb_v;
    int             type_k;   // enum ggml_type
    int             type_v;
    const char    * k_end;    // end of the tensor: nothing behind it may be read
    const char    * v_end;
    const int32_t * desc;     // row of the descriptor, [TCA_DESC_SIZE, n_head_kv, n_seqs]
    int             n_head_kv;
    int             n_seqs;
    int64_t         n_slots;  // of all regions
};

static inline tca_store tca_store_of(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * desc, int row) {
    return { (char *) k->data, (char *) v->data, k->nb[1], v->nb[1], k->type, v->type,
        (const char *) k->data + ggml_nbytes(k), (const char *) v->data + ggml_nbytes(v),
        (const int32_t *) ((const char *) desc->data + row*desc->nb[3]), (int) desc->ne[1], (int) desc->ne[2], k->ne[1] };
}

static __device__ __forceinline__ const int32_t * tca_region(const tca_store & s, int seq, int head) {
    return s.desc + ((size_t) seq*s.n_head_kv + head)*TCA_DESC_SIZE;
}

// How the decode kernels for a node's types, head size and number of rows cut the regions (tca-decode.cuh).
struct tca_decode_limits {
    int at_once;    // thread blocks that the GPU holds at once; 0: too many rows for these kernels
    int chunk_min;  // slots of a thread block at least
    int chunk_max;  // slots of a thread block at most
};

// Queries and destination of an attention node.
struct tca_queries {
    const float * q;
    float       * dst;
    size_t        q_head, q_token;      // strides in floats
    size_t        dst_head, dst_token;
    int           gqa;                  // query heads per KV head
    int           n_tokens;             // of the whole micro-batch
    float         scale;
    float         softcap;
    // PARTIAL only: dst is [head_dim + 2, n_chunks, n_head, n_tokens]
    int               n_chunks;
    tca_decode_limits limits;
};

constexpr float TCA_NO_MAX = -1e29f;  // running maximum before the first visible slot, as on the CPU

static __device__ __forceinline__ float tca_softcap(float s, float cap) {
    // tanh without the approximate instruction that -use_fast_math would pick (2^-11)
    return cap*(1.0f - 2.0f/(1.0f + __expf(2.0f*s/cap)));
}

// 8 bytes from an address that is a multiple of 2, as rows of q8_0 and q4_0 have it.
static __device__ __forceinline__ void tca_load8_bytes(const char * p, uint32_t * w) {
    const uint32_t * aligned = (const uint32_t *) ((uintptr_t) p & ~(uintptr_t) 3);
    if ((uintptr_t) p & 2) {
        const uint32_t a = aligned[0], b = aligned[1], c = ((const uint16_t *) aligned)[4];
        w[0] = __funnelshift_r(a, b, 16);
        w[1] = __funnelshift_r(b, c, 16);
    } else {
        w[0] = aligned[0];
        w[1] = aligned[1];
    }
}

// 8 consecutive elements of a row, from element 8*i on: x[] times the returned scale.
template <ggml_type type>
static __device__ __forceinline__ float tca_load8_scaled(const char * row, int i, float * x) {
    if constexpr (type == GGML_TYPE_F32) {
        const float4 a = ((const float4 *) row)[2*i], b = ((const float4 *) row)[2*i + 1];
        x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w;
        x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
        return 1.0f;
    } else if constexpr (type == GGML_TYPE_F16) {
        const uint4 a = ((const uint4 *) row)[i];
        const half2 * h = (const half2 *) &a;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = __half22float2(h[j]);
            x[2*j] = f.x; x[2*j + 1] = f.y;
        }
        return 1.0f;
    } else if constexpr (type == GGML_TYPE_BF16) {
        const uint4 a = ((const uint4 *) row)[i];
        const uint32_t * u = (const uint32_t *) &a;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            x[2*j]     = __uint_as_float(u[j] << 16);
            x[2*j + 1] = __uint_as_float(u[j] & 0xffff0000u);
        }
        return 1.0f;
    } else if constexpr (type == GGML_TYPE_Q8_0) {
        const char * block = row + (i/4)*sizeof(block_q8_0);
        uint32_t w[2];
        tca_load8_bytes(block + 2 + 8*(i%4), w);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            // 2^23 + (x + 128) as f32
            x[j] = __uint_as_float(__byte_perm(w[j/4] ^ 0x80808080u, 0x4b000000u, 0x7440 + j%4)) - 8388736.0f;
        }
        return __half2float(*(const half *) block);
    } else {
        static_assert(type == GGML_TYPE_Q4_0, "type");
        const char * block = row + (i/4)*sizeof(block_q4_0);
        uint32_t w[2];
        tca_load8_bytes(block + 2 + 8*(i%2), w);
        const int shift = i%4 < 2 ? 0 : 4;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[j] = __uint_as_float(__byte_perm((w[j/4] >> shift) & 0x0f0f0f0fu, 0x4b000000u, 0x7440 + j%4)) - 8388616.0f;
        }
        return __half2float(*(const half *) block);
    }
}

// Query rows of a KV head that the decode kernels take: of up to 8 (f16 and bf16: 16, with head sizes up to 128) they read K and V
// once, of more twice.
constexpr int TCA_DECODE_ROWS = 16;

// Which of the decode kernels takes a store. By name: they know these types and no other.
enum tca_decode_kind { TCA_DECODE_ANY, TCA_DECODE_HALF, TCA_DECODE_QUANTIZED };

static inline tca_decode_kind tca_decode_kind_of(ggml_type type_k, ggml_type type_v) {
    const auto is_quantized = [](ggml_type type) { return type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0; };
    if (is_quantized(type_k) && is_quantized(type_v)) {
        return TCA_DECODE_QUANTIZED;
    }
    return type_k == type_v && (type_k == GGML_TYPE_F16 || type_k == GGML_TYPE_BF16) ? TCA_DECODE_HALF : TCA_DECODE_ANY;
}

// Four bytes u0..u3, as halfs 1024 + u: (u0, u1) and (u2, u3).
static __device__ __forceinline__ half2 tca_bytes_lo(uint32_t w) {
    const uint32_t h = __byte_perm(w, 0x64646464u, 0x4140);
    return *(const half2 *) &h;
}

static __device__ __forceinline__ half2 tca_bytes_hi(uint32_t w) {
    const uint32_t h = __byte_perm(w, 0x64646464u, 0x4342);
    return *(const half2 *) &h;
}

// 8 consecutive elements as f16, for the matrix units.
template <ggml_type type>
static __device__ __forceinline__ uint4 tca_load8_f16(const char * row, int i) {
    uint4 out;
    half2 * h = (half2 *) &out;
    if constexpr (type == GGML_TYPE_F16) {
        out = ((const uint4 *) row)[i];
    } else if constexpr (type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0) {
        constexpr bool q8 = type == GGML_TYPE_Q8_0;
        const char * block = row + (i/4)*(q8 ? sizeof(block_q8_0) : sizeof(block_q4_0));
        const half2  d     = __half2half2(*(const half *) block);
        const half2  zero  = __float2half2_rn(q8 ? 1024.0f + 128.0f : 1024.0f + 8.0f);
        uint32_t w[2];
        tca_load8_bytes(block + 2 + 8*(q8 ? i%4 : i%2), w);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const uint32_t u = q8 ? w[j] ^ 0x80808080u : (w[j] >> (i%4 < 2 ? 0 : 4)) & 0x0f0f0f0fu;
            h[2*j]     = __hmul2(__hsub2(tca_bytes_lo(u), zero), d);
            h[2*j + 1] = __hmul2(__hsub2(tca_bytes_hi(u), zero), d);
        }
    } else {
        float x[8];
        const float d = tca_load8_scaled<type>(row, i, x);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            h[j] = __floats2half2_rn(d*x[2*j], d*x[2*j + 1]);
        }
    }
    return out;
}

// c += a*b in f32, a and b f16, two an entry: c [16, 8], a [16, 16] row-major, b [16, 8] column-major
static __device__ __forceinline__ void tca_mma(float * c, const uint32_t * a, uint32_t b0, uint32_t b1) {
    TCA_ASM("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ uint32_t tca_smem(const void * p) {
    return (uint32_t) __cvta_generic_to_shared(p);
}

// 16 bytes, of which the first n come from src and the rest are zero.
static __device__ __forceinline__ void tca_cp_async(uint32_t dst, const void * src, int n) {
    TCA_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(dst), "l"(src), "r"(n) : "memory");
}

// The same for 16 bytes, or nothing, without a branch.
static __device__ __forceinline__ void tca_cp_async_if(bool condition, uint32_t dst, const void * src) {
    TCA_ASM("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }"
        :: "r"(dst), "l"(src), "r"((int) condition) : "memory");
}

static __device__ __forceinline__ void tca_cp_async_commit() {
    TCA_ASM("cp.async.commit_group;" ::: "memory");
}

template <int n>
static __device__ __forceinline__ void tca_cp_async_wait() {
    TCA_ASM("cp.async.wait_group %0;" :: "n"(n) : "memory");
}

// Calls f with the type as a compile-time constant: decltype(tag)::value.
template <typename F>
static __device__ __forceinline__ void tca_with_type(int type, F && f) {
    switch (type) {
        case GGML_TYPE_F32:  f(std::integral_constant<ggml_type, GGML_TYPE_F32>());  break;
        case GGML_TYPE_F16:  f(std::integral_constant<ggml_type, GGML_TYPE_F16>());  break;
        case GGML_TYPE_BF16: f(std::integral_constant<ggml_type, GGML_TYPE_BF16>()); break;
        case GGML_TYPE_Q8_0: f(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>()); break;
        case GGML_TYPE_Q4_0: f(std::integral_constant<ggml_type, GGML_TYPE_Q4_0>()); break;
        default: break;
    }
}

// One file each.
void tca_cuda_append (ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void tca_cuda_compact(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
// TCA_DECODE_ANY, _HALF and _QUANTIZED
void tca_cuda_decode (const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream);
void tca_cuda_decode_half     (const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream);
void tca_cuda_decode_quantized(const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream);
tca_decode_limits tca_cuda_decode_limits(int device, const ggml_tensor * partial);
void tca_cuda_combine(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
void tca_cuda_prefill(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q, int head_dim, bool partial);
// head sizes 64, 128 and 256 on compute capability 9.0; false: not this device or not this build
bool tca_cuda_prefill_hopper(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q, int head_dim);
