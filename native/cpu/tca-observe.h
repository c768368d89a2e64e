// Attention that the tokens of a group get from the segment after which the group is compacted.
#pragma once

#include "ops/tca-ops.h"

#include <vector>

// Scratch that is reused from group to group.
struct tca_observe_scratch {
    std::vector<double> queries;  // [head_dim, TCA_OBSERVED_QUERIES]
    std::vector<double> scores;   // [slots in use, TCA_OBSERVED_QUERIES]
    std::vector<float>  key;      // [head_dim]
};

// Attention weights of the last TCA_OBSERVED_QUERIES queries of the segment (all of them if it has fewer), each a softmax over
// everything the query sees in the region, summed over these queries and over the query heads of the KV head. Double.
//   q [head_dim, n_head, n_tokens] f32, k the store's keys, both as the attention op has them; d the region's descriptor
//   observed [n] out, for the slots from d[TCA_DESC_GROUP] on; 0 where no query sees the slot, NaN if the input holds NaN or Inf
void tca_observe(const ggml_tensor * q, const ggml_tensor * k, const int32_t * d, int head_kv, int n_head_kv, float scale,
        float softcap, int n, tca_observe_scratch & scratch, double * observed);
