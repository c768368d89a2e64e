#include "tca-reference.h"

#include <cmath>
#include <vector>

int32_t tca_reference_select(const float * keys, const int32_t * positions, int32_t n_tokens, int32_t head_dim,
        const tca_rope & rope, int32_t hadamard, int32_t block_size, int32_t n_keep, const int32_t * keep_counts,
        const int32_t * counts, int32_t * kept, float * scores) {
    std::vector<std::vector<double>> x(n_tokens, std::vector<double>(head_dim));
    for (int t = 0; t < n_tokens; ++t) {
        // H is symmetric and its own inverse: entry (i, j) is (-1)^(common bits of i and j)/sqrt(hadamard)
        for (int i = 0; i < head_dim; ++i) {
            const int base = hadamard > 0 ? i/hadamard*hadamard : 0;
            if (hadamard == 0 || base + hadamard > head_dim) {
                x[t][i] = keys[t*head_dim + i];
                continue;
            }
            for (int j = 0; j < hadamard; ++j) {
                int common = 0;
                for (int bit = 1; bit < hadamard; bit *= 2) {
                    common += ((i - base) & bit) && (j & bit);
                }
                x[t][i] += (common % 2 ? -1.0 : 1.0)*keys[t*head_dim + base + j]/std::sqrt((double) hadamard);
            }
        }
        for (int i = 0; rope.type != TCA_ROPE_NONE && i < rope.n_rot/2; ++i) {
            const int    a = rope.type == TCA_ROPE_NORM ? 2*i     : i;
            const int    b = rope.type == TCA_ROPE_NORM ? 2*i + 1 : i + rope.n_rot/2;
            const double angle = -(double) positions[t]*rope.freqs[i];
            const double xa = x[t][a], xb = x[t][b];
            x[t][a] = (xa*std::cos(angle) - xb*std::sin(angle))/rope.scale;
            x[t][b] = (xa*std::sin(angle) + xb*std::cos(angle))/rope.scale;
        }
    }

    std::vector<double> mean(head_dim), importance(n_tokens);
    for (int i = 0; i < head_dim; ++i) {
        for (int t = 0; t < n_tokens; ++t) {
            mean[i] += x[t][i]/n_tokens;
        }
    }
    for (int t = 0; t < n_tokens; ++t) {
        double dot = 0.0, xx = 0.0, mm = 0.0;
        for (int i = 0; i < head_dim; ++i) {
            dot += x[t][i]*mean[i];
            xx  += x[t][i]*x[t][i];
            mm  += mean[i]*mean[i];
        }
        importance[t] = xx > 0.0 && mm > 0.0 ? 1.0 - dot/std::sqrt(xx*mm) : 1.0;
        if (!std::isfinite(importance[t])) {
            importance[t] = 0.0;
        }
        scores[t] = importance[t];
    }

    const int n_blocks = n_tokens/block_size;
    std::vector<double> block(n_blocks);
    for (int t = 0; t < n_tokens; ++t) {
        block[t/block_size] += importance[t];
    }

    // the rank of a block or token is the number of its peers that beat it: larger, or equal and newer
    const auto beats = [](double vi, int i, double vj, int j) { return vi > vj || (vi == vj && i > j); };

    int32_t n_kept = 0;
    for (int t = 0; t < n_tokens; ++t) {
        const int b = t/block_size;
        int rank_block = 0, rank_token = 0;
        for (int o = 0; o < n_blocks; ++o) {
            rank_block += beats(block[o], o, block[b], b);
        }
        for (int o = b*block_size; o < (b + 1)*block_size; ++o) {
            rank_token += beats(importance[o], o, importance[t], t);
        }
        int keep = 0;
        for (int j = n_keep - 1, upto = 0; j >= 0; --j) {
            upto += counts[j];
            if (rank_block < upto) {
                keep = keep_counts[j];
                break;
            }
        }
        if (rank_token < keep) {
            kept[n_kept++] = t;
        }
    }
    return n_kept;
}

void tca_reference_attention(const float * q, const float * k, const float * v, int32_t n_tokens, int32_t n_head,
        int32_t n_head_kv, int32_t head_dim_k, int32_t head_dim_v, const int64_t * lengths, float scale, float softcap, float * out) {
    const int gqa = n_head/n_head_kv;
    int64_t first = 0;
    for (int hk = 0; hk < n_head_kv; ++hk) {
        for (int h = hk*gqa; h < (hk + 1)*gqa; ++h) {
            for (int t = 0; t < n_tokens; ++t) {
                const int64_t n_visible = lengths[hk] - n_tokens + t + 1;
                std::vector<double> s(n_visible);
                double max = -INFINITY;
                for (int64_t j = 0; j < n_visible; ++j) {
                    for (int i = 0; i < head_dim_k; ++i) {
                        s[j] += (double) q[((int64_t) t*n_head + h)*head_dim_k + i]*k[(first + j)*head_dim_k + i];
                    }
                    s[j] *= scale;
                    if (softcap != 0.0f) {
                        s[j] = softcap*std::tanh(s[j]/softcap);
                    }
                    max = std::fmax(max, s[j]);
                }
                double sum = 0.0;
                std::vector<double> o(head_dim_v);
                for (int64_t j = 0; j < n_visible; ++j) {
                    const double p = std::exp(s[j] - max);
                    sum += p;
                    for (int i = 0; i < head_dim_v; ++i) {
                        o[i] += p*v[(first + j)*head_dim_v + i];
                    }
                }
                for (int i = 0; i < head_dim_v; ++i) {
                    out[((int64_t) t*n_head + h)*head_dim_v + i] = o[i]/sum;
                }
            }
        }
        first += lengths[hk];
    }
}
