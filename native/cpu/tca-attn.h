// What the attention kernels share. Two of them, chosen by the number of query rows, a row being one (query token, query head
// of the GQA group): tca-attn-rows.h for many, tca-attn-dims.h for the few of decode.
#pragma once

#include "ops/tca-ops.h"

#include <cstdint>

constexpr float TCA_MASKED = -1e30f;  // score of a slot that a row must not see
constexpr float TCA_NO_MAX = -1e29f;  // running maximum before the first visible slot: exp(TCA_MASKED - TCA_NO_MAX) == 0

// Tensors of an attention node. Rows of a (sequence, KV head): row r is query token r/gqa, query head r%gqa of the group.
struct tca_attn_args {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * desc;
    int     row;
    float   scale;
    float   softcap;
    int64_t gqa;

    explicit tca_attn_args(const ggml_tensor * dst) {
        const int first = dst->view_src ? 1 : 0;  // an in-place node carries its destination in src[0]
        const tca_op_params params = tca_op_get_params(dst);
        q       = dst->src[first + 0];
        k       = dst->src[first + 1];
        v       = dst->src[first + 2];
        desc    = dst->src[first + 3];
        row     = params.row;
        scale   = params.scale;
        softcap = params.softcap;
        gqa     = q->ne[1]/desc->ne[1];
    }

    const int32_t * region(int64_t s, int64_t h) const {
        return (const int32_t *) ((const char *) desc->data + h*desc->nb[1] + s*desc->nb[2] + row*desc->nb[3]);
    }

    // Row r of a region's queries, [head_dim_k].
    const float * query(const int32_t * d, int64_t head, int64_t r) const {
        return (const float *) ((const char *) q->data + (head*gqa + r%gqa)*q->nb[1] + (d[TCA_DESC_TOKEN] + r/gqa)*q->nb[2]);
    }

    // Slots of the region that row r sees.
    int64_t visible(const int32_t * d, int64_t r) const {
        return d[TCA_DESC_PAST] + r/gqa + 1;
    }
};
