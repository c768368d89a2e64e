// Graph side of the ragged cache: the attention input and the nodes of one layer.
#pragma once

#include "llama-graph.h"

class llama_memory_tca_context;

// Takes the place of the stock attention input. Its only tensors are the descriptor (see ops/tca-ops.h), whose size does not
// depend on the context length, and the Hadamard matrices of quantized caches.
class llm_graph_input_attn_tca : public llm_graph_input_attn_kv {
public:
    llm_graph_input_attn_tca(const llama_hparams & hparams, const llama_cparams & cparams, const llama_memory_tca_context * mctx);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    const llama_memory_tca_context * mctx_tca;

    ggml_tensor * desc      = nullptr;  // I32 [TCA_DESC_SIZE, n_head_kv, n_entries, n_segments*n_layer]
    ggml_tensor * attn_desc = nullptr;  // its first n_seqs entries, those with queries (llama_memory_tca_context::step)
    uint32_t      n_segments = 0;
    bool          compacts   = false;  // compaction nodes are in the graph
    ggml_tensor * v_mla      = nullptr;  // of the layer that is being built: [latent value, value, n_head]; NULL: values are not latent
};

// nullptr: the context uses the stock cache.
llm_graph_input_attn_kv * llm_tca_build_attn_inp(const llm_graph_context & graph);

// For models that mix sliding-window and full attention: the ragged cache's input if layer il is in it, made when the first
// such layer asks; nullptr: layer il uses the stock input.
llm_graph_input_attn_kv * llm_tca_attn_inp_of_layer(const llm_graph_context & graph, int il);

// For hybrid models: the input of both kinds of layers, with the ragged cache's in place of the stock attention input, whose tensors
// no layer would use. rs: the stock input of the recurrent layers. nullptr: the context uses the stock cache; rs is left alone.
llm_graph_input_mem_hybrid * llm_tca_build_inp_mem_hybrid(const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> & rs);

// For latent attention, whose stock cache holds keys alone (values are their first elements): the ragged cache's input in the shape that
// such graphs expect; and what is inside it, for a layer whose values v_mla makes from latent ones. nullptr: the stock cache.
llm_graph_input_attn_k  * llm_tca_build_attn_inp_k(const llm_graph_context & graph);
llm_graph_input_attn_kv * llm_tca_attn_inp_of(llm_graph_input_attn_k * inp, ggml_tensor * v_mla);

// nullptr: `inp` is the stock input. Else the attention output [head_dim_v*n_head, n_tokens], everything expanded into the
// graph. Throws std::runtime_error for a bias.
ggml_tensor * llm_tca_build_attn(const llm_graph_context & graph, llm_graph_input_attn_kv * inp, ggml_tensor * q_cur,
        ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il);
