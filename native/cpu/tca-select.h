// Selection of one group on the CPU: importance of every token, then the tokens that stay.
#pragma once

#include "metrics/tca-importance.h"

#include <cstdint>
#include <vector>

// Sines and cosines of a group's positions. A group has the same positions in every head and layer, and they cost more than all
// that is done with them: they are kept until other positions or another RoPE come.
struct tca_rope_table {
    std::vector<double>  turns;  // [n_tokens, n_rot/2, 2] cosine and sine over rope.scale
    std::vector<int32_t> positions;
    std::vector<float>   freqs;
    float                scale = 0.0f;

    void set(const int32_t * positions, int n_tokens, const tca_rope & rope);
};

// Scratch that is reused from group to group.
struct tca_select_scratch {
    tca_rope_table       rope;
    std::vector<double>  keys;    // [n_tokens, head_dim], before RoPE
    std::vector<double>  blocks;  // [n_blocks] importance
    std::vector<int32_t> order;
};

// Importance of every token of a group under a metric; undoes what was done to the keys if the metric looks at them.
//   hadamard: size of the matrices the keys were multiplied with, 0: none; observed [n_tokens]: see tca-observe.h, NULL unless
//   the metric needs it; importance [n_tokens] out
void tca_importance(const tca_metric & metric, const tca_group & group, int hadamard, const double * observed,
        tca_select_scratch & scratch, double * importance);

// Ranks the blocks by the sum of their tokens' importance (least redundant first, ties towards the newer block), gives the
// largest keep count to the first counts[n_keep-1] of them and so on down, and keeps the most important tokens of each
// block (ties towards the newer token).
//   counts [n_keep] blocks per keep count; kept [n_tokens] out, increasing. Returns the number of kept tokens.
int tca_select_tokens(const double * importance, int n_tokens, int block_size, int n_keep, const int32_t * keep_counts,
        const int32_t * counts, tca_select_scratch & scratch, int32_t * kept);
