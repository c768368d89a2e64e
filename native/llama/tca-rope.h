// Rotary embedding of a layer as one table, whatever its type, scaling and frequency factors.
#pragma once

#include "tca.h"

#include <vector>

struct llama_cparams;
struct llama_model;

// The table is measured, not recomputed: ggml's own RoPE op is applied to unit vectors at position 1, and the angles and the
// magnitude are read off. So every parameter that the op honours is honoured here. `freqs` receives the frequencies and must
// outlive the result.
tca_rope llama_tca_rope(const llama_model & model, const llama_cparams & cparams, int il, std::vector<float> & freqs);
