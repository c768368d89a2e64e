// key-diff+observed: the sum of a token's ranks in its group by key-diff and by observed-attn. Equal tokens have equal ranks.
#include "tca-importance.h"

#include <algorithm>
#include <vector>

void tca_metric_key_diff_observed(const tca_metric_input & in, double * importance) {
    std::fill_n(importance, in.n_tokens, 0.0);
    std::vector<double> values(in.n_tokens);
    for (const tca_importance_fn part : { tca_metric_key_diff, tca_metric_observed_attn }) {
        part(in, values.data());
        std::vector<double> sorted = values;
        std::sort(sorted.begin(), sorted.end());
        for (int t = 0; t < in.n_tokens; ++t) {
            // how many tokens are less important
            importance[t] += std::lower_bound(sorted.begin(), sorted.end(), values[t]) - sorted.begin();
        }
    }
}
