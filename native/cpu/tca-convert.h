// Rows of the store to and from f32: whole rows, and vectors of a row for kernels that read each row once.
#pragma once

#include "tca-simd.h"

#include "ggml-cpu.h"
#include "ggml-cpu-impl.h"
#include "ggml.h"
#include "quants.h"
#include "simd-mappings.h"

// q8_0 and q4_0 are unpacked here because ggml-base, where the generic dequantisation lives, is built without the CPU's own
// vector extensions; these loops vectorise.
static inline void tca_q8_0_to_f32(const block_q8_0 * src, float * dst, int64_t n) {
    for (int64_t b = 0; b < n/QK8_0; ++b) {
        const float d = GGML_CPU_FP16_TO_FP32(src[b].d);
        for (int i = 0; i < QK8_0; ++i) {
            dst[b*QK8_0 + i] = d*src[b].qs[i];
        }
    }
}

static inline void tca_q4_0_to_f32(const block_q4_0 * src, float * dst, int64_t n) {
    for (int64_t b = 0; b < n/QK4_0; ++b) {
        const float d = GGML_CPU_FP16_TO_FP32(src[b].d);
        for (int i = 0; i < QK4_0/2; ++i) {
            dst[b*QK4_0 + i]           = d*((src[b].qs[i] & 0x0f) - 8);
            dst[b*QK4_0 + i + QK4_0/2] = d*((src[b].qs[i] >>   4) - 8);
        }
    }
}

static inline void tca_rows_to_f32(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  ggml_cpu_fp32_to_fp32((const float       *) src, dst, n); break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n); break;
        case GGML_TYPE_Q8_0: tca_q8_0_to_f32      ((const block_q8_0  *) src, dst, n); break;
        case GGML_TYPE_Q4_0: tca_q4_0_to_f32      ((const block_q4_0  *) src, dst, n); break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n);        break;
    }
}

static inline void tca_rows_from_f32(ggml_type type, const float * src, void * dst, int64_t n) {
    ggml_get_type_traits_cpu(type)->from_float(src, dst, n);
}

// Reads rows in registers: load<N>(row, i, x) is elements [i, i + N*tca_full::lanes) of a row, i a multiple of that. `step` is the
// N to read a row with where registers allow it. f32 everywhere; the other types where TCA_READS_ROWS is defined, else
// tca_rows_to_f32 unpacks them first.
template <ggml_type type> struct tca_row_reader;

template <> struct tca_row_reader<GGML_TYPE_F32> {
    static constexpr int step = 1;

    template <int N> static inline void load(const char * row, int64_t i, tca_full::type x[N]) {
        for (int n = 0; n < N; ++n) {
            x[n] = tca_full::load((const float *) row + i + n*tca_full::lanes);
        }
    }
};

// The same of tca_dims::keys rows, split among them (tca_dims::split).
template <int N, typename READER>
static inline void tca_load_keys(READER, const char * const rows[tca_dims::keys], int64_t i, tca_dims::type y[N][tca_dims::keys]) {
    tca_full::type x[tca_dims::keys][N];
    for (int h = 0; h < tca_dims::keys; ++h) {
        READER::template load<N>(rows[h], i, x[h]);
    }
    for (int n = 0; n < N; ++n) {
        tca_full::type keys[tca_dims::keys];
        for (int h = 0; h < tca_dims::keys; ++h) {
            keys[h] = x[h][n];
        }
        tca_dims::split(keys, y[n]);
    }
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
#    define TCA_READS_ROWS

template <> struct tca_row_reader<GGML_TYPE_F16> {
    static constexpr int step = 1;

    template <int N> static inline void load(const char * row, int64_t i, __m512 x[N]) {
        for (int n = 0; n < N; ++n) {
            x[n] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (row + 2*i) + n));
        }
    }
};

// Halves are put together before they are converted: cheaper than two shuffles afterwards.
template <int N>
static inline void tca_load_keys(tca_row_reader<GGML_TYPE_F16>, const char * const rows[2], int64_t i, __m512 y[N][2]) {
    const __m128i * a = (const __m128i *) (rows[0] + 2*i), * b = (const __m128i *) (rows[1] + 2*i);
    for (int n = 0; n < 2*N; ++n) {
        y[n/2][n%2] = _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(a + n)), _mm_loadu_si128(b + n), 1));
    }
}

template <> struct tca_row_reader<GGML_TYPE_BF16> {
    static constexpr int step = 1;

    template <int N> static inline void load(const char * row, int64_t i, __m512 x[N]) {
        for (int n = 0; n < N; ++n) {
            const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *) (row + 2*i) + n));
            x[n] = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        }
    }
};

// Blocks of 32 make two vectors, which share the scale. half(b, h): the integers of vector h.
template <typename BLOCK> struct tca_block_reader {
    static constexpr int step = 2;

    template <int N> static inline void load(const char * row, int64_t i, __m512 x[N]) {
        const BLOCK * b = (const BLOCK *) row + i/32;
        for (int n = 0; n < N; n += 2) {
            const __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16(b[n/2].d));
            x[n] = _mm512_mul_ps(half(b[n/2], N == 1 ? i%32/16 : 0), scale);
            if constexpr (N > 1) {
                x[n + 1] = _mm512_mul_ps(half(b[n/2], 1), scale);
            }
        }
    }
    static inline __m512 half(const block_q8_0 & b, int h) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) b.qs + h)));
    }
    static inline __m512 half(const block_q4_0 & b, int h) {  // the low nibbles are the first 16 elements
        const __m128i x = _mm_srl_epi16(_mm_loadu_si128((const __m128i *) b.qs), _mm_cvtsi32_si128(4*h));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_sub_epi8(_mm_and_si128(x, _mm_set1_epi8(0x0f)), _mm_set1_epi8(8))));
    }
};
template <> struct tca_row_reader<GGML_TYPE_Q8_0> : tca_block_reader<block_q8_0> {};
template <> struct tca_row_reader<GGML_TYPE_Q4_0> : tca_block_reader<block_q4_0> {};

// As with f16.
template <int N>
static inline void tca_load_keys(tca_row_reader<GGML_TYPE_Q8_0>, const char * const rows[2], int64_t i, __m512 y[N][2]) {
    static_assert(N == 2, "one block");
    const block_q8_0 & a = ((const block_q8_0 *) rows[0])[i/QK8_0], & b = ((const block_q8_0 *) rows[1])[i/QK8_0];
    const __m512 scale = _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_set1_epi16(a.d)), _mm_set1_epi16(b.d), 1));
    for (int n = 0; n < 4; ++n) {
        const __m128i x = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i *) (a.qs + 8*n)), _mm_loadl_epi64((const __m128i *) (b.qs + 8*n)));
        y[n/2][n%2] = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x)), scale);
    }
}
#endif
