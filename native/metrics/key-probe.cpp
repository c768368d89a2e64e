// key-probe: the key before RoPE times a vector of its head, which calibration fitted to the logarithm of what a token adds to
// later outputs (tca.probe; docs/calibration.md). A dot product a token, and no queries.
#include "tca-importance.h"

#include <cfloat>
#include <cmath>

void tca_metric_key_probe(const tca_metric_input & in, double * importance) {
    for (int t = 0; t < in.n_tokens; ++t) {
        const double * x = in.keys + (size_t) t*in.head_dim_k;
        double dot = 0.0;
        for (int d = 0; d < in.head_dim_k; ++d) {
            dot += x[d]*in.probe[d];
        }
        // importance leaves as f32, too: nothing that is finite here may be infinite there
        importance[t] = std::fabs(dot) <= FLT_MAX ? dot : -FLT_MAX;
    }
}
