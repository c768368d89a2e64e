// observed-attn: the attention that the token gets from the last queries of the segment after which its group is compacted. The
// baseline of methods that look at attention (SnapKV, Li et al. 2024, arXiv 2404.14469, has the queries at the prompt's end).
#include "tca-importance.h"

#include <cmath>

void tca_metric_observed_attn(const tca_metric_input & in, double * importance) {
    for (int t = 0; t < in.n_tokens; ++t) {
        importance[t] = std::isfinite(in.observed[t]) ? in.observed[t] : 0.0;
    }
}
