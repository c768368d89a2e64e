// The few vector operations the kernels need, on top of ggml's own abstraction (simd-mappings.h, vec.h). One lane is one query
// row. tca_full is the widest vector, tca_half the one to use for at most tca_half::lanes rows (the same type where a narrower
// one saves nothing). Without a fixed-size vector type (no SIMD, SVE, RVV) a "vector" is one float and the same code is the
// fallback.
#pragma once

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic) && \
    (defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__)) || (defined(__ARM_NEON) && defined(__aarch64__)))

struct tca_full {
    typedef GGML_F32_VEC type;
    static constexpr int lanes = GGML_F32_EPR;

    static inline type load (const float * p)                { return GGML_F32_VEC_LOAD(p); }
    static inline void store(float * p, type x)              { GGML_F32_VEC_STORE(p, x); }
    static inline type set1 (float x)                        { return GGML_F32_VEC_SET1(x); }
    static inline type mul  (type a, type b)                 { return GGML_F32_VEC_MUL(a, b); }
    static inline type add  (type a, type b)                 { return GGML_F32_VEC_ADD(a, b); }
    static inline type fma  (type acc, type a, type b)       { return GGML_F32_VEC_FMA(acc, a, b); }
    static inline type exp  (type x)                         { return ggml_v_expf(x); }
#    if defined(__AVX512F__)
#        define TCA_SIMD_NAME "avx512"
    static inline type max  (type a, type b)                 { return _mm512_max_ps(a, b); }
    static inline type sub  (type a, type b)                 { return _mm512_sub_ps(a, b); }
#    elif defined(__AVX2__)
#        define TCA_SIMD_NAME "avx2"
    static inline type max  (type a, type b)                 { return _mm256_max_ps(a, b); }
    static inline type sub  (type a, type b)                 { return _mm256_sub_ps(a, b); }
#    else
#        define TCA_SIMD_NAME "neon"
    static inline type max  (type a, type b)                 { return vmaxq_f32(a, b); }
    static inline type sub  (type a, type b)                 { return vsubq_f32(a, b); }
#    endif
};

#    if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int TCA_TILE_M = 4, TCA_TILE_N = 3;  // 12 accumulators of 16 registers
#    else
constexpr int TCA_TILE_M = 8, TCA_TILE_N = 3;  // 24 accumulators of 32 registers
#    endif

#    if defined(__AVX512F__) && defined(__AVX512VL__)
// Cores that split 512-bit operations in two gain a factor of two from the narrow one when eight lanes are enough.
struct tca_half {
    typedef __m256 type;
    static constexpr int lanes = 8;

    static inline type load (const float * p)                { return _mm256_loadu_ps(p); }
    static inline void store(float * p, type x)              { _mm256_storeu_ps(p, x); }
    static inline type set1 (float x)                        { return _mm256_set1_ps(x); }
    static inline type mul  (type a, type b)                 { return _mm256_mul_ps(a, b); }
    static inline type add  (type a, type b)                 { return _mm256_add_ps(a, b); }
    static inline type sub  (type a, type b)                 { return _mm256_sub_ps(a, b); }
    static inline type max  (type a, type b)                 { return _mm256_max_ps(a, b); }
    static inline type fma  (type acc, type a, type b)       { return _mm256_fmadd_ps(a, b, acc); }

    // exp for x <= 0 (all that a softmax needs): 2^n * e^r with |r| <= ln(2)/2, Taylor to r^6 (relative error below 2e-7).
    // Below -87, where f32 would leave the normal range, it stays at e^-87, which no sum of a softmax notices.
    static inline type exp(type x) {
        x = _mm256_max_ps(x, set1(-87.0f));
        const type n = _mm256_roundscale_ps(_mm256_mul_ps(x, set1(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        type r = _mm256_fnmadd_ps(n, set1(0.693145752f), x);
        r      = _mm256_fnmadd_ps(n, set1(1.42860677e-6f), r);
        type p = set1(1.0f/720);
        p = _mm256_fmadd_ps(p, r, set1(1.0f/120));
        p = _mm256_fmadd_ps(p, r, set1(1.0f/24));
        p = _mm256_fmadd_ps(p, r, set1(1.0f/6));
        p = _mm256_fmadd_ps(p, r, set1(0.5f));
        p = _mm256_fmadd_ps(p, r, set1(1.0f));
        p = _mm256_fmadd_ps(p, r, set1(1.0f));
        return _mm256_scalef_ps(p, n);
    }
};
#    else
typedef tca_full tca_half;
#    endif

#else

#    define TCA_SIMD_NAME "generic"

struct tca_full {
    typedef float type;
    static constexpr int lanes = 1;

    static inline type load (const float * p)                { return *p; }
    static inline void store(float * p, type x)              { *p = x; }
    static inline type set1 (float x)                        { return x; }
    static inline type mul  (type a, type b)                 { return a*b; }
    static inline type add  (type a, type b)                 { return a + b; }
    static inline type sub  (type a, type b)                 { return a - b; }
    static inline type max  (type a, type b)                 { return a > b ? a : b; }
    static inline type fma  (type acc, type a, type b)       { return acc + a*b; }
    static inline type exp  (type x)                         { return expf(x); }
};
typedef tca_full tca_half;
constexpr int TCA_TILE_M = 4, TCA_TILE_N = 3;

#endif
