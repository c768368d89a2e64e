// value-norm: the length of the value, the most that a token can add to the output.
#include "tca-importance.h"

#include <cmath>

void tca_metric_value_norm(const tca_metric_input & in, double * importance) {
    for (int t = 0; t < in.n_tokens; ++t) {
        const float * x = in.values + (size_t) t*in.head_dim_v;
        double norm = 0.0;
        for (int d = 0; d < in.head_dim_v; ++d) {
            norm += (double) x[d]*x[d];
        }
        importance[t] = std::isfinite(norm) ? std::sqrt(norm) : 0.0;
    }
}
