#include "tca-tables.h"

#include <algorithm>

tca_tables llama_tca_tables::add(ggml_backend_buffer_type_t buft, tca_select_params params, std::vector<float> freqs, int64_t head_dim_k,
        int64_t n_head_kv) {
    auto it = std::find_if(pools.begin(), pools.end(), [buft](const auto & p) { return p.first == buft; });
    if (it == pools.end()) {
        pools.emplace_back(buft, pool());
        it = pools.end() - 1;
        it->second.ctx.reset(ggml_init({ (2*(size_t) n_layer + 1)*ggml_tensor_overhead(), nullptr, true }));
    }
    pool & p = it->second;
    const tca_tables tables = tca_tables_new(p.ctx.get(), params, head_dim_k, n_head_kv, p.configs);
    if (p.configs == nullptr) {
        ggml_set_name(tables.configs, "tca_configs");
    }
    p.configs = tables.configs;
    if (tables.freqs) {
        ggml_format_name(tables.freqs, "tca_freqs_l%d", params.layer);
    }
    if (tables.probe) {
        ggml_format_name(tables.probe, "tca_probe_l%d", params.layer);
    }
    entries.push_back({ tables, params, std::move(freqs) });
    return tables;
}

bool llama_tca_tables::alloc(bool no_alloc) {
    estimated = no_alloc;
    for (auto & [buft, p] : pools) {
        // without data, a buffer keeps the scheduler from allocating the tensors
        p.buf.reset(no_alloc ? ggml_backend_buft_alloc_buffer(buft, 0) : ggml_backend_alloc_ctx_tensors_from_buft(p.ctx.get(), buft));
        if (!p.buf) {
            return false;
        }
        for (ggml_tensor * t = ggml_get_first_tensor(p.ctx.get()); no_alloc && t != nullptr; t = ggml_get_next_tensor(p.ctx.get(), t)) {
            t->buffer = p.buf.get();
        }
    }
    for (entry & e : entries) {
        if (!no_alloc) {
            e.params.rope.freqs = e.freqs.data();
            tca_tables_set(e.tables, e.params);
        }
    }
    entries.clear();
    return true;
}

void llama_tca_tables::breakdown(std::map<ggml_backend_buffer_type_t, size_t> & bytes) const {
    for (const auto & [buft, p] : pools) {
        bytes[buft] += estimated ? ggml_backend_alloc_ctx_tensors_from_buft_size(p.ctx.get(), buft) : ggml_backend_buffer_get_size(p.buf.get());
    }
}
