// What the attention kernels share. Two of them, chosen by the number of query rows, a row being one (query token, query head
// of the GQA group): tca-attn-rows.h for many, tca-attn-dims.h for the few of decode.
#pragma once

#include "tca-kernels.h"

#include <cstdint>

constexpr float TCA_MASKED = -1e30f;  // score of a slot that a row must not see
constexpr float TCA_NO_MAX = -1e29f;  // running maximum before the first visible slot: exp(TCA_MASKED - TCA_NO_MAX) == 0

// An attention node and the rows of its queries. Rows of a (sequence, KV head): row r is query token r/gqa, query head r%gqa of the
// group.
struct tca_attn_args : tca_attn_node {
    explicit tca_attn_args(const ggml_tensor * node) : tca_attn_node(tca_attn_node::of(node)) {}

    const int32_t * region(int64_t s, int64_t h) const { return tca_desc_of(desc, row, s, h); }

    // Row r of a region's queries, [head_dim_k].
    const float * query(const int32_t * d, int64_t head, int64_t r) const {
        return (const float *) ((const char *) q->data + (head*gqa + r%gqa)*q->nb[1] + (d[TCA_DESC_TOKEN] + r/gqa)*q->nb[2]);
    }

    // Slots of the region that row r sees.
    int64_t visible(const int32_t * d, int64_t r) const {
        return d[TCA_DESC_PAST] + r/gqa + 1;
    }
};
