#include "tca-importance.h"

tca_importance_fn tca_importance_of(int32_t metric) {
    switch ((tca_metric_id) metric) {
        case TCA_METRIC_KEY_DIFF:          return tca_metric_key_diff;
        case TCA_METRIC_KEY_PROBE:         return tca_metric_key_probe;
        case TCA_METRIC_KEY_NORM:          return tca_metric_key_norm;
        case TCA_METRIC_VALUE_NORM:        return tca_metric_value_norm;
        case TCA_METRIC_STREAMING:         return tca_metric_streaming;
        case TCA_METRIC_RANDOM:            return tca_metric_random;
        case TCA_METRIC_OBSERVED_ATTN:     return tca_metric_observed_attn;
        case TCA_METRIC_KEY_DIFF_OBSERVED: return tca_metric_key_diff_observed;
    }
    return nullptr;
}
