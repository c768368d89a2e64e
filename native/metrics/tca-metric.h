// Selection metrics: how much each token of a group matters to the head that may forget it. A metric is one function in one
// file of this folder, an id, and one line in tca-metric.cpp. CONTRIBUTING says how to add one.
#pragma once

#include "tca.h"

#include <string>

// What other backends switch on (native/cuda/tca-importance.cu); files name a metric by its name.
enum tca_metric_id : int {
    TCA_METRIC_KEY_DIFF,
    TCA_METRIC_KEY_PROBE,
    TCA_METRIC_KEY_NORM,
    TCA_METRIC_VALUE_NORM,
    TCA_METRIC_STREAMING,
    TCA_METRIC_RANDOM,
    TCA_METRIC_OBSERVED_ATTN,
    TCA_METRIC_KEY_DIFF_OBSERVED,
};

enum tca_metric_needs {
    TCA_NEEDS_KEYS    = 1,  // tca_metric_input::keys
    TCA_NEEDS_VALUES  = 2,  // tca_metric_input::values
    TCA_NEEDS_PROBE   = 4,  // tca_metric_input::probe: the budgets must carry one
    TCA_NEEDS_QUERIES = 8,  // tca_metric_input::observed: only a running model has it; nothing to calibrate with
};

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

struct tca_metric {
    tca_metric_id     id;
    const char *      name;   // value of tca.metric
    unsigned          needs;  // of enum tca_metric_needs
    tca_importance_fn importance;
};

// NULL for an unknown name, or NULL.
const tca_metric * tca_metric_find(const char * name);

// The i-th metric; NULL past the last.
const tca_metric * tca_metric_at(int i);

// "key-diff, streaming, ...", for messages.
std::string tca_metric_names();

void tca_metric_key_diff         (const tca_metric_input & in, double * importance);
void tca_metric_key_probe        (const tca_metric_input & in, double * importance);
void tca_metric_key_norm         (const tca_metric_input & in, double * importance);
void tca_metric_value_norm       (const tca_metric_input & in, double * importance);
void tca_metric_streaming        (const tca_metric_input & in, double * importance);
void tca_metric_random           (const tca_metric_input & in, double * importance);
void tca_metric_observed_attn    (const tca_metric_input & in, double * importance);
void tca_metric_key_diff_observed(const tca_metric_input & in, double * importance);
