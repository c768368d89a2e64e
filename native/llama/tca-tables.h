// The selection tables of a cache (tca_tables), on the buffers of the layers that they belong to.
#pragma once

#include "ops/tca-ops.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

class llama_tca_tables {
public:
    explicit llama_tca_tables(uint32_t n_layer) : n_layer(n_layer) {}

    // Tables of one layer, whose store is on buft. What params refers to must live until alloc(), but freqs: it is kept here.
    // params.rope.freqs is not looked at.
    tca_tables add(ggml_backend_buffer_type_t buft, tca_select_params params, std::vector<float> freqs, int64_t head_dim_k, int64_t n_head_kv);

    // Allocates and fills all of them. no_alloc: memory is only being estimated. False: no memory.
    bool alloc(bool no_alloc);

    // Adds their bytes.
    void breakdown(std::map<ggml_backend_buffer_type_t, size_t> & bytes) const;

private:
    struct pool {
        ggml_context_ptr        ctx;
        ggml_tensor *           configs = nullptr;  // the same for every layer
        ggml_backend_buffer_ptr buf;
    };
    struct entry {
        tca_tables         tables;
        tca_select_params  params;
        std::vector<float> freqs;
    };

    uint32_t n_layer;
    bool     estimated = false;
    std::vector<std::pair<ggml_backend_buffer_type_t, pool>> pools;
    std::vector<entry> entries;
};
