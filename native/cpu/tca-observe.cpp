#include "tca-observe.h"

#include "tca-convert.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

void tca_observe(const ggml_tensor * q, const ggml_tensor * k, const int32_t * d, int head_kv, int n_head_kv, float scale,
        float softcap, int n, tca_observe_scratch & scratch, double * observed) {
    constexpr int Q = TCA_OBSERVED_QUERIES;
    const int64_t dim       = k->ne[0];
    const int     gqa       = q->ne[1]/n_head_kv;
    const int     n_queries = std::min<int>(d[TCA_DESC_COUNT], Q);
    const int64_t used      = d[TCA_DESC_USED];
    const int64_t group     = d[TCA_DESC_GROUP];
    const auto sees = [&](int i, int64_t slot) { return slot <= used - n_queries + i; };

    scratch.queries.resize(dim*Q);
    scratch.scores.resize(used*Q);
    scratch.key.resize(dim);
    std::fill_n(observed, n, 0.0);
    for (int g = 0; g < gqa; ++g) {
        for (int i = 0; i < Q; ++i) {
            const int64_t token = d[TCA_DESC_TOKEN] + d[TCA_DESC_COUNT] - n_queries + i;
            const float * row   = (const float *) ((const char *) q->data + (head_kv*gqa + g)*q->nb[1] + token*q->nb[2]);
            for (int64_t e = 0; e < dim; ++e) {
                scratch.queries[e*Q + i] = i < n_queries ? row[e] : 0.0f;
            }
        }
        double max[Q], sum[Q] = {};
        std::fill_n(max, Q, -DBL_MAX);
        for (int64_t slot = 0; slot < used; ++slot) {
            tca_rows_to_f32(k->type, (const char *) k->data + (d[TCA_DESC_OFFSET] + slot)*k->nb[1], scratch.key.data(), dim);
            double dot[Q] = {};
            for (int64_t e = 0; e < dim; ++e) {
                const double x = scratch.key[e];
                for (int i = 0; i < Q; ++i) {  // side by side: a vector, and each sum in its own order
                    dot[i] += x*scratch.queries[e*Q + i];
                }
            }
            for (int i = 0; i < n_queries; ++i) {
                double s = dot[i]*scale;
                if (softcap != 0.0f) {
                    s = softcap*std::tanh(s/softcap);
                }
                scratch.scores[slot*Q + i] = s;
                if (sees(i, slot) && s > max[i]) {
                    max[i] = s;
                }
            }
        }
        for (int64_t slot = 0; slot < used; ++slot) {
            for (int i = 0; i < n_queries; ++i) {
                if (sees(i, slot)) {
                    double & s = scratch.scores[slot*Q + i];
                    s = std::exp(s - max[i]);
                    sum[i] += s;
                }
            }
        }
        for (int t = 0; t < n; ++t) {
            for (int i = 0; i < n_queries; ++i) {
                if (sees(i, group + t)) {
                    observed[t] += scratch.scores[(group + t)*Q + i]/sum[i];
                }
            }
        }
    }
}
