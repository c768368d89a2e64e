// Whether a device runs the nodes of a layer. Asked before a cache is made, with the layer's real shapes: afterwards ggml's scheduler
// would move a node that its device does not take to the CPU, without a word.
#pragma once

#include "ops/tca-ops.h"

#include "ggml-backend.h"

#include <string>

struct tca_layer_shape {
    ggml_type type_k, type_v;
    int64_t   head_dim_k, head_dim_v;
    int64_t   n_head, n_head_kv;
    bool      sinks = false;  // learned attention sinks
};

// Empty if the cache types fit the layer's head sizes and the CPU reads and writes them; else a line that says what to use.
std::string tca_types_problem(const tca_layer_shape & shape);

// Empty if the device runs append, both forms of attention, and compaction as params has it; else a line that says what to do.
std::string tca_device_problem(ggml_backend_dev_t dev, const tca_layer_shape & shape, const tca_select_params & params);
