// Plain scalar versions of the ops, written from the definitions and sharing no code with the kernels. Tests compare with them.
#pragma once

#include "tca.h"

#include <cstdint>

// See tca_select() in tca.h; `scores` must not be NULL. hadamard: size of the matrices the keys were multiplied with, 0: none.
// `metric` must be one of tca_metric_name(). observed [n_tokens]: see below, NULL unless the metric looks at queries.
int32_t tca_reference_select(const char * metric, const tca_group & group, int32_t hadamard, const double * observed,
        int32_t block_size, int32_t n_keep, const int32_t * keep_counts, const int32_t * counts, int32_t * kept, float * scores);

// Attention weights summed over the newest n_queries tokens of a region and the gqa query heads of its KV head: one value a slot.
//   q [n_queries, n_head, head_dim_k], of which heads first_head to first_head + gqa - 1 are meant; k [n_slots, head_dim_k]
//   observed [n_slots] out
void tca_reference_observe(const float * q, const float * k, int32_t n_queries, int32_t n_head, int32_t first_head, int32_t gqa,
        int32_t head_dim_k, int64_t n_slots, float scale, float softcap, double * observed);

// See tca_attention() in tca.h; k and v are f32 here, regions one after another. sinks [n_head], or NULL.
void tca_reference_attention(const float * q, const float * k, const float * v, int32_t n_tokens, int32_t n_head,
        int32_t n_head_kv, int32_t head_dim_k, int32_t head_dim_v, const int64_t * lengths, float scale, float softcap, const float * sinks,
        float * out);
