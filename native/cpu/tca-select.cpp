#include "tca-select.h"

#include <algorithm>
#include <cmath>

// In-place Walsh-Hadamard transform of size n (a power of two), normalised: its own inverse.
static void hadamard_transform(double * x, int n) {
    for (int s = 1; s < n; s *= 2) {
        for (int i = 0; i < n; i += 2*s) {
            for (int j = i; j < i + s; ++j) {
                const double a = x[j], b = x[j + s];
                x[j]     = a + b;
                x[j + s] = a - b;
            }
        }
    }
    const double norm = 1.0/std::sqrt((double) n);
    for (int i = 0; i < n; ++i) {
        x[i] *= norm;
    }
}

void tca_rope_table::set(const int32_t * group, int n_tokens, const tca_rope & rope) {
    const int n_half = rope.n_rot/2;
    if (scale == rope.scale && (int) positions.size() == n_tokens && std::equal(positions.begin(), positions.end(), group) &&
            (int) freqs.size() == n_half && std::equal(freqs.begin(), freqs.end(), rope.freqs)) {
        return;
    }
    positions.assign(group, group + n_tokens);
    freqs.assign(rope.freqs, rope.freqs + n_half);
    scale = rope.scale;
    turns.resize((size_t) n_tokens*n_half*2);
    for (int t = 0; t < n_tokens; ++t) {
        for (int i = 0; i < n_half; ++i) {
            const double theta = (double) group[t]*rope.freqs[i];
            turns[((size_t) t*n_half + i)*2]     = std::cos(theta)*(1.0/scale);
            turns[((size_t) t*n_half + i)*2 + 1] = std::sin(theta)*(1.0/scale);
        }
    }
}

// turns [n_rot/2, 2] of the key's position
static void rope_undo(double * x, const double * turns, const tca_rope & rope) {
    const int n_half = rope.n_rot/2;
    for (int i = 0; i < n_half; ++i) {
        const int    ia = rope.type == TCA_ROPE_NORM ? 2*i     : i;
        const int    ib = rope.type == TCA_ROPE_NORM ? 2*i + 1 : i + n_half;
        const double c = turns[2*i], s = turns[2*i + 1];
        const double a = x[ia], b = x[ib];
        x[ia] = a*c + b*s;
        x[ib] = b*c - a*s;
    }
}

void tca_importance(const tca_metric & metric, const tca_group & group, int hadamard, const double * observed,
        tca_select_scratch & scratch, double * importance) {
    const int n = group.n_tokens, dim = group.head_dim_k;

    const bool needs_keys = metric.needs & TCA_NEEDS_KEYS;
    if (needs_keys) {
        // double throughout: selection is a ranking, and a rank must not depend on the order of a sum
        scratch.keys.resize((size_t) n*dim);
        const bool rotated = group.rope && group.rope->type != TCA_ROPE_NONE;
        if (rotated) {
            scratch.rope.set(group.positions, n, *group.rope);
        }
        for (int t = 0; t < n; ++t) {
            double * x = &scratch.keys[(size_t) t*dim];
            for (int d = 0; d < dim; ++d) {
                x[d] = group.keys[(size_t) t*dim + d];
            }
            for (int d = 0; hadamard > 0 && d + hadamard <= dim; d += hadamard) {
                hadamard_transform(x + d, hadamard);
            }
            if (rotated) {
                rope_undo(x, &scratch.rope.turns[(size_t) t*(group.rope->n_rot/2)*2], *group.rope);
            }
        }
    }
    tca_importance_of(metric.id)({ n, dim, group.head_dim_v, group.layer, group.head, needs_keys ? scratch.keys.data() : nullptr,
            group.values, group.positions, group.probe, observed }, importance);
}

int tca_select_tokens(const double * importance, int n_tokens, int block_size, int n_keep, const int32_t * keep_counts,
        const int32_t * counts, tca_select_scratch & scratch, int32_t * kept) {
    const int n_blocks = n_tokens/block_size;
    scratch.blocks.assign(n_blocks, 0.0);
    for (int t = 0; t < n_blocks*block_size; ++t) {
        scratch.blocks[t/block_size] += importance[t];
    }

    std::vector<int32_t> & order = scratch.order;
    order.resize(n_blocks + block_size);
    int32_t * by_block = order.data();
    int32_t * by_token = order.data() + n_blocks;

    const auto rank = [](int32_t * idx, int n, int first, const double * value) {
        for (int i = 0; i < n; ++i) {
            idx[i] = first + i;
        }
        std::sort(idx, idx + n, [value](int32_t a, int32_t b) {
            return value[a] != value[b] ? value[a] > value[b] : a > b;
        });
    };
    rank(by_block, n_blocks, 0, scratch.blocks.data());

    int n_kept = 0;
    int next   = 0;
    for (int j = n_keep - 1; j >= 0; --j) {
        for (int i = 0; i < counts[j] && next < n_blocks; ++i, ++next) {
            const int first = by_block[next]*block_size;
            rank(by_token, block_size, first, importance);
            for (int k = 0; k < keep_counts[j]; ++k) {
                kept[n_kept++] = by_token[k];
            }
        }
    }
    std::sort(kept, kept + n_kept);
    return n_kept;
}
