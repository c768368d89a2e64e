#include "tca-reference.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <map>
#include <string>
#include <vector>

using matrix = std::vector<std::vector<double>>;

// Keys before RoPE [n_tokens][head_dim_k], from the definitions of the Hadamard matrix and of the rotation.
static matrix plain_keys(const tca_group & g, int hadamard) {
    const int dim = g.head_dim_k;
    matrix x(g.n_tokens, std::vector<double>(dim));
    for (int t = 0; t < g.n_tokens; ++t) {
        // H is symmetric and its own inverse: entry (i, j) is (-1)^(common bits of i and j)/sqrt(hadamard)
        for (int i = 0; i < dim; ++i) {
            const int base = hadamard > 0 ? i/hadamard*hadamard : 0;
            if (hadamard == 0 || base + hadamard > dim) {
                x[t][i] = g.keys[t*dim + i];
                continue;
            }
            for (int j = 0; j < hadamard; ++j) {
                int common = 0;
                for (int bit = 1; bit < hadamard; bit *= 2) {
                    common += ((i - base) & bit) && (j & bit);
                }
                x[t][i] += (common % 2 ? -1.0 : 1.0)*g.keys[t*dim + base + j]/std::sqrt((double) hadamard);
            }
        }
        for (int i = 0; g.rope && g.rope->type != TCA_ROPE_NONE && i < g.rope->n_rot/2; ++i) {
            const int    a = g.rope->type == TCA_ROPE_NORM ? 2*i     : i;
            const int    b = g.rope->type == TCA_ROPE_NORM ? 2*i + 1 : i + g.rope->n_rot/2;
            const double angle = -(double) g.positions[t]*g.rope->freqs[i];
            const double xa = x[t][a], xb = x[t][b];
            x[t][a] = (xa*std::cos(angle) - xb*std::sin(angle))/g.rope->scale;
            x[t][b] = (xa*std::sin(angle) + xb*std::cos(angle))/g.rope->scale;
        }
    }
    return x;
}

static double dot(const std::vector<double> & x, const std::vector<double> & y) {
    double sum = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
        sum += x[i]*y[i];
    }
    return sum;
}

static std::vector<double> key_diff(const tca_group & g, int hadamard, const double * /*observed*/) {
    const matrix x = plain_keys(g, hadamard);
    std::vector<double> mean(g.head_dim_k), importance(g.n_tokens);
    for (int i = 0; i < g.head_dim_k; ++i) {
        for (int t = 0; t < g.n_tokens; ++t) {
            mean[i] += x[t][i]/g.n_tokens;
        }
    }
    for (int t = 0; t < g.n_tokens; ++t) {
        const double xx = dot(x[t], x[t]), mm = dot(mean, mean);
        importance[t] = xx > 0.0 && mm > 0.0 ? 1.0 - dot(x[t], mean)/std::sqrt(xx*mm) : 1.0;
        if (!std::isfinite(importance[t])) {
            importance[t] = 0.0;
        }
    }
    return importance;
}

static std::vector<double> key_norm(const tca_group & g, int hadamard, const double * /*observed*/) {
    const matrix x = plain_keys(g, hadamard);
    std::vector<double> importance(g.n_tokens);
    for (int t = 0; t < g.n_tokens; ++t) {
        const double norm = std::sqrt(dot(x[t], x[t]));
        importance[t] = std::isfinite(norm) ? -norm : -FLT_MAX;
    }
    return importance;
}

static std::vector<double> key_probe(const tca_group & g, int hadamard, const double * /*observed*/) {
    const matrix x = plain_keys(g, hadamard);
    const std::vector<double> probe(g.probe, g.probe + g.head_dim_k);
    std::vector<double> importance(g.n_tokens);
    for (int t = 0; t < g.n_tokens; ++t) {
        const double value = dot(x[t], probe);
        importance[t] = std::isfinite((float) value) ? value : -FLT_MAX;
    }
    return importance;
}

static std::vector<double> value_norm(const tca_group & g, int /*hadamard*/, const double * /*observed*/) {
    std::vector<double> importance(g.n_tokens);
    for (int t = 0; t < g.n_tokens; ++t) {
        const std::vector<double> x(g.values + t*g.head_dim_v, g.values + (t + 1)*g.head_dim_v);
        const double norm = std::sqrt(dot(x, x));
        importance[t] = std::isfinite(norm) ? norm : 0.0;
    }
    return importance;
}

static std::vector<double> streaming(const tca_group & g, int /*hadamard*/, const double * /*observed*/) {
    return { g.positions, g.positions + g.n_tokens };
}

static std::vector<double> hashed(const tca_group & g, int /*hadamard*/, const double * /*observed*/) {
    std::vector<double> importance(g.n_tokens);
    for (int t = 0; t < g.n_tokens; ++t) {
        const uint64_t id = g.positions[t]*(1ull << 32) + g.layer*(1ull << 16) + g.head;
        uint64_t z = id + 0x9e3779b97f4a7c15ull;
        z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27))*0x94d049bb133111ebull;
        z = z ^ (z >> 31);
        importance[t] = std::ldexp((double) (z >> 11), -53);
    }
    return importance;
}

static std::vector<double> observed_attn(const tca_group & g, int /*hadamard*/, const double * observed) {
    std::vector<double> importance(observed, observed + g.n_tokens);
    for (double & x : importance) {
        x = std::isfinite(x) ? x : 0.0;
    }
    return importance;
}

static std::vector<double> key_diff_observed(const tca_group & g, int hadamard, const double * observed) {
    const std::vector<double> a = key_diff(g, hadamard, observed), b = observed_attn(g, hadamard, observed);
    std::vector<double> importance(g.n_tokens);
    for (int t = 0; t < g.n_tokens; ++t) {
        for (int o = 0; o < g.n_tokens; ++o) {
            importance[t] += (a[o] < a[t]) + (b[o] < b[t]);
        }
    }
    return importance;
}

static const std::map<std::string, std::vector<double> (*)(const tca_group &, int, const double *)> METRICS = {
    { "key-diff",   key_diff   }, { "key-probe",     key_probe     }, { "key-norm",          key_norm          },
    { "value-norm", value_norm }, { "streaming",     streaming     }, { "random",            hashed            },
    { "observed-attn", observed_attn }, { "key-diff+observed", key_diff_observed },
};

void tca_reference_observe(const float * q, const float * k, int32_t n_queries, int32_t n_head, int32_t first_head, int32_t gqa,
        int32_t head_dim_k, int64_t n_slots, float scale, float softcap, double * observed) {
    std::fill_n(observed, n_slots, 0.0);
    for (int h = first_head; h < first_head + gqa; ++h) {
        for (int t = 0; t < n_queries; ++t) {
            const int64_t n_visible = n_slots - n_queries + t + 1;
            std::vector<double> s(n_visible);
            double max = -DBL_MAX, sum = 0.0;
            for (int64_t j = 0; j < n_visible; ++j) {
                for (int i = 0; i < head_dim_k; ++i) {
                    s[j] += (double) q[((int64_t) t*n_head + h)*head_dim_k + i]*k[j*head_dim_k + i];
                }
                s[j] *= scale;
                if (softcap != 0.0f) {
                    s[j] = softcap*std::tanh(s[j]/softcap);
                }
                max = std::fmax(max, s[j]);
            }
            for (int64_t j = 0; j < n_visible; ++j) {
                sum += std::exp(s[j] - max);
            }
            for (int64_t j = 0; j < n_visible; ++j) {
                observed[j] += std::exp(s[j] - max)/sum;
            }
        }
    }
}

int32_t tca_reference_select(const char * metric, const tca_group & g, int32_t hadamard, const double * observed,
        int32_t block_size, int32_t n_keep, const int32_t * keep_counts, const int32_t * counts, int32_t * kept, float * scores) {
    const int n_tokens = g.n_tokens;
    const std::vector<double> importance = METRICS.at(metric)(g, hadamard, observed);
    std::copy(importance.begin(), importance.end(), scores);

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
        int32_t n_head_kv, int32_t head_dim_k, int32_t head_dim_v, const int64_t * lengths, float scale, float softcap, const float * sinks,
        float * out) {
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
                if (sinks) {
                    max = std::fmax(max, sinks[h]);
                }
                double sum = sinks ? std::exp(sinks[h] - max) : 0.0;
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
