#include "tca-metric.h"

#include <cstring>
#include <iterator>

static const tca_metric METRICS[] = {
    { TCA_METRIC_KEY_DIFF,          "key-diff",          TCA_NEEDS_KEYS },
    { TCA_METRIC_KEY_PROBE,         "key-probe",         TCA_NEEDS_KEYS | TCA_NEEDS_PROBE },
    { TCA_METRIC_KEY_NORM,          "key-norm",          TCA_NEEDS_KEYS },
    { TCA_METRIC_VALUE_NORM,        "value-norm",        TCA_NEEDS_VALUES },
    { TCA_METRIC_STREAMING,         "streaming",         0 },
    { TCA_METRIC_RANDOM,            "random",            0 },
    { TCA_METRIC_OBSERVED_ATTN,     "observed-attn",     TCA_NEEDS_QUERIES },
    { TCA_METRIC_KEY_DIFF_OBSERVED, "key-diff+observed", TCA_NEEDS_KEYS | TCA_NEEDS_QUERIES },
};

const tca_metric * tca_metric_find(const char * name) {
    for (const tca_metric & metric : METRICS) {
        if (name != nullptr && strcmp(name, metric.name) == 0) {
            return &metric;
        }
    }
    return nullptr;
}

const tca_metric * tca_metric_by_id(int32_t id) {
    for (const tca_metric & metric : METRICS) {
        if (metric.id == id) {
            return &metric;
        }
    }
    return nullptr;
}

const tca_metric * tca_metric_at(int i) {
    return i >= 0 && i < (int) std::size(METRICS) ? &METRICS[i] : nullptr;
}

std::string tca_metric_names() {
    std::string names;
    for (const tca_metric & metric : METRICS) {
        names += (names.empty() ? "" : ", ") + std::string(metric.name);
    }
    return names;
}
