// Rotary embedding of the keys of a layer as one table, whatever its type, scaling and frequency factors. It is read off the
// model's own graph: which layers rotate at all, which dimensions, with which parameters.
#pragma once

#include "tca.h"

#include <vector>

struct llama_cparams;
struct llama_model;

struct llama_tca_rope {
    int32_t            type  = TCA_ROPE_NONE;
    int32_t            n_rot = 0;
    float              scale = 1.0f;
    std::vector<float> freqs;  // [n_rot/2]

    tca_rope view() const { return { type, n_rot, scale, freqs.data() }; }  // valid while this object is unchanged
};

// RoPE of every layer [n_layer_all], as contexts with these parameters apply it; NONE for layers that store no keys. Builds the graph of
// one token over a small stock memory, without running it. The weights must be loaded (frequency factors are among them).
std::vector<llama_tca_rope> llama_tca_ropes(const llama_model & model, const llama_cparams & cparams);
