// Rows of the store to and from f32.
#pragma once

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
