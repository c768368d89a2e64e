// key-norm: minus the length of the key. Small keys draw much attention in many models (Devoto et al. 2024, arXiv 2406.11430).
#include "tca-importance.h"

#include <cfloat>
#include <cmath>

void tca_metric_key_norm(const tca_metric_input & in, double * importance) {
    for (int t = 0; t < in.n_tokens; ++t) {
        const double * x = in.keys + (size_t) t*in.head_dim_k;
        double norm = 0.0;
        for (int d = 0; d < in.head_dim_k; ++d) {
            norm += x[d]*x[d];
        }
        importance[t] = std::isfinite(norm) ? -std::sqrt(norm) : -FLT_MAX;
    }
}
