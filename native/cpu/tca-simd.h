// The few vector operations the kernels need, on top of ggml's own abstraction (simd-mappings.h, vec.h). tca_full is the widest
// vector, tca_half the one to use for at most tca_half::lanes elements (the same type where a narrower one saves nothing).
// Without a fixed-size vector type (no SIMD, SVE, RVV) a "vector" is one float and the same code is the fallback.
//
// tca_dims is for dot products of many keys with many queries: a tca_full holds `lanes` dimensions of `keys` keys.
//   split   `keys` vectors of consecutive dimensions, one a key -> `keys` vectors of `lanes` dimensions, each of all keys
//   keep    has a value that is used several times loaded into a register, instead of from memory at every use
//   reduce  of `lanes` accumulators a[r]: lane r of every key's part is the sum of that part of a[r]
#pragma once

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "vec.h"

#include <cmath>
#include <cstddef>
#include <new>
#include <vector>

#if defined(__GNUC__)
#    define TCA_INLINE static inline __attribute__((always_inline))
#else
#    define TCA_INLINE static inline
#endif

// Asks for `size` bytes to be brought into the cache of a level, 1 or 2. May point anywhere.
template <int LEVEL> static inline void tca_prefetch(const char * p, size_t size) {
#if defined(__GNUC__)
    for (size_t i = 0; i < size; i += 64) {
        __builtin_prefetch(p + i, 0, 4 - LEVEL);
    }
#else
    (void) p;
    (void) size;
#endif
}

// A std::vector whose data starts at a cache line: a vector load that crosses two lines costs twice.
template <typename T> struct tca_line_allocator {
    typedef T value_type;

    tca_line_allocator() = default;
    template <typename U> tca_line_allocator(const tca_line_allocator<U> &) {}

    T  * allocate  (size_t n)        { return (T *) ::operator new(n*sizeof(T), std::align_val_t(64)); }
    void deallocate(T * p, size_t)   { ::operator delete(p, std::align_val_t(64)); }
    bool operator==(const tca_line_allocator &) const { return true;  }
    bool operator!=(const tca_line_allocator &) const { return false; }
};
template <typename T> using tca_vector = std::vector<T, tca_line_allocator<T>>;

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
constexpr int TCA_REGISTERS = 16;
constexpr int TCA_TILE_M = 4, TCA_TILE_N = 3;  // 12 accumulators
#    else
constexpr int TCA_REGISTERS = 32;
constexpr int TCA_TILE_M = 8, TCA_TILE_N = 3;  // 24 accumulators
#    endif

#    if defined(__AVX512F__)
struct tca_dims : tca_full {
    static constexpr int keys = 2, lanes = 8;

    static inline void keep(type & x) {
#        if defined(__GNUC__)
        __asm__("" : "+v"(x));
#        else
        (void) x;
#        endif
    }

    static inline void split(const type x[keys], type y[keys]) {
        y[0] = _mm512_shuffle_f32x4(x[0], x[1], 0x44);
        y[1] = _mm512_shuffle_f32x4(x[0], x[1], 0xee);
    }
    // Each step adds neighbours at twice the distance; blends, which run on more ports, take the place of half the shuffles.
    TCA_INLINE type add1(type a, type b) {
        return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    TCA_INLINE type add2(type a, type b) {
        return add(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
    TCA_INLINE type add4(type a, type b) {
        const type x = _mm512_mask_blend_ps(0xf0f0, b, a);
        return add(_mm512_mask_blend_ps(0xf0f0, a, b), _mm512_shuffle_f32x4(x, x, 0xb1));
    }
    TCA_INLINE type reduce(const type a[lanes]) {
        return add4(add2(add1(a[0], a[1]), add1(a[2], a[3])), add2(add1(a[4], a[5]), add1(a[6], a[7])));
    }
};
#    elif defined(__AVX2__)
struct tca_dims : tca_full {
    static constexpr int keys = 1;

    static inline void keep (type &)                           {}
    static inline void split(const type x[keys], type y[keys]) { y[0] = x[0]; }
    TCA_INLINE type reduce(const type a[lanes]) {
        const type x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        const type y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        return add(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    }
};
#    else
struct tca_dims : tca_full {
    static constexpr int keys = 1;

    static inline void keep (type &)                           {}
    static inline void split(const type x[keys], type y[keys]) { y[0] = x[0]; }
    TCA_INLINE type reduce(const type a[lanes]) {
        return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3]));
    }
};
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
constexpr int TCA_REGISTERS = 16;
constexpr int TCA_TILE_M = 4, TCA_TILE_N = 3;

struct tca_dims : tca_full {
    static constexpr int keys = 1;

    static inline void keep (type &)                           {}
    static inline void split(const type x[keys], type y[keys]) { y[0] = x[0]; }
    TCA_INLINE type reduce(const type a[lanes])             { return a[0]; }
};

#endif
