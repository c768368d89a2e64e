// Metrics on the CPU: a function each, in a file of this folder that carries the metric's name.
#pragma once

#include "tca-metric.h"

// One group of one KV head. What the metric does not need may be NULL.
struct tca_metric_input {
    int32_t         n_tokens;
    int32_t         head_dim_k;
    int32_t         head_dim_v;
    int32_t         layer;
    int32_t         head;
    const double  * keys;       // [n_tokens, head_dim_k] before RoPE
    const float   * values;     // [n_tokens, head_dim_v], in a quantized cache multiplied by a Hadamard matrix (an isometry)
    const int32_t * positions;  // [n_tokens], increasing
    const float   * probe;      // [head_dim_k], of this head
    const double  * observed;   // [n_tokens] attention that the last queries of the segment pay (cpu/tca-observe.h); NaN if the
                                // input holds what is no number
};

// importance [n_tokens] out: the larger, the longer the token stays; finite whatever the input holds, because it is sorted.
// Only the order matters, within blocks and, summed, among blocks. The same input must give the same bits on every run.
typedef void (*tca_importance_fn)(const tca_metric_input & in, double * importance);

// The function of a metric; NULL for an unknown id.
tca_importance_fn tca_importance_of(int32_t metric);

void tca_metric_key_diff         (const tca_metric_input & in, double * importance);
void tca_metric_key_probe        (const tca_metric_input & in, double * importance);
void tca_metric_key_norm         (const tca_metric_input & in, double * importance);
void tca_metric_value_norm       (const tca_metric_input & in, double * importance);
void tca_metric_streaming        (const tca_metric_input & in, double * importance);
void tca_metric_random           (const tca_metric_input & in, double * importance);
void tca_metric_observed_attn    (const tca_metric_input & in, double * importance);
void tca_metric_key_diff_observed(const tca_metric_input & in, double * importance);
