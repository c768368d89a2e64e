// Rows of the store to and from f32.
#pragma once

#include "ggml-cpu.h"
#include "ggml.h"

static inline void tca_rows_to_f32(ggml_type type, const void * src, float * dst, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  ggml_cpu_fp32_to_fp32((const float       *) src, dst, n); break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, dst, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, dst, n); break;
        default:             ggml_get_type_traits(type)->to_float(src, dst, n);        break;
    }
}

static inline void tca_rows_from_f32(ggml_type type, const float * src, void * dst, int64_t n) {
    ggml_get_type_traits_cpu(type)->from_float(src, dst, n);
}
