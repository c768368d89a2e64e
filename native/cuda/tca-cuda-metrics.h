// The metrics that CUDA has: id, and the struct of tca-importance.cu whose `of` a warp calls for a token. Dispatch and the answer
// what a device supports both come from here.
#pragma once

#include "metrics/tca-metric.h"

#define TCA_CUDA_METRICS(X)              \
    X(KEY_DIFF,          key_diff)       \
    X(KEY_PROBE,         key_probe)      \
    X(KEY_NORM,          key_norm)       \
    X(VALUE_NORM,        value_norm)     \
    X(STREAMING,         streaming)      \
    X(RANDOM,            random_hash)    \
    X(OBSERVED_ATTN,     observed_attn)  \
    X(KEY_DIFF_OBSERVED, rank_sum)
