// key-diff: 1 - cos(key, mean key of the group), both before RoPE. A key that points elsewhere than its neighbours stays.
// Source: KeyDiff (Park et al. 2025, arXiv 2504.15364), with the mean of the group in place of the whole cache's.
#include "tca-importance.h"

#include <cmath>
#include <vector>

void tca_metric_key_diff(const tca_metric_input & in, double * importance) {
    const int n = in.n_tokens, dim = in.head_dim_k;

    std::vector<double> mean(dim, 0.0);
    for (int t = 0; t < n; ++t) {
        for (int d = 0; d < dim; ++d) {
            mean[d] += in.keys[(size_t) t*dim + d];
        }
    }
    double mean_norm = 0.0;
    for (int d = 0; d < dim; ++d) {
        mean[d] /= n;
        mean_norm += mean[d]*mean[d];
    }

    for (int t = 0; t < n; ++t) {
        const double * x = in.keys + (size_t) t*dim;
        double dot = 0.0, norm = 0.0;
        for (int d = 0; d < dim; ++d) {
            dot  += x[d]*mean[d];
            norm += x[d]*x[d];
        }
        const double denominator = std::sqrt(norm)*std::sqrt(mean_norm);
        const double value       = denominator > 0.0 ? 1.0 - dot/denominator : 1.0;
        importance[t] = std::isfinite(value) ? value : 0.0;
    }
}
