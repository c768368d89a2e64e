// Selection metrics: how much each token of a group matters to the head that may forget it. Here is what every backend knows of
// them, their table; how a metric is computed stands in tca-importance.h for the CPU. CONTRIBUTING says how to add one.
#pragma once

#include "tca.h"

#include <string>

// What nodes hold and backends switch on: a number never changes its meaning. Files name a metric by its name.
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
    TCA_NEEDS_KEYS    = 1,
    TCA_NEEDS_VALUES  = 2,
    TCA_NEEDS_PROBE   = 4,  // the budgets must carry one
    TCA_NEEDS_QUERIES = 8,  // only a running model has them; nothing to calibrate with
};

struct tca_metric {
    tca_metric_id id;
    const char *  name;   // value of tca.metric
    unsigned      needs;  // of enum tca_metric_needs
};

// NULL for an unknown name, or NULL.
const tca_metric * tca_metric_find(const char * name);

// NULL for an unknown id, which a node from elsewhere may hold.
const tca_metric * tca_metric_by_id(int32_t id);

// The i-th metric; NULL past the last.
const tca_metric * tca_metric_at(int i);

// "key-diff, streaming, ...", for messages.
std::string tca_metric_names();
