// What a model carries of TCA: its validated budgets. Entry points of the hooks in llama_model_load and create_memory.
#pragma once

#include "plan/tca-plan.h"
#include "tca-remote.h"

#include <memory>

struct llama_cparams;
struct llama_hparams;
struct llama_memory_i;
struct llama_memory_context_i;
struct llama_memory_params;
struct llama_model;
struct llama_model_loader;
class  llm_graph_result;

struct llama_tca_model {
    tca_budgets_data budgets;
    std::string      source;  // the file of keys that they come from; empty: the model's own file, or tca_model_set_budgets
};

// Reads and validates the tca.* keys after the hyperparameters are known, from where tca-source.h says. Leaves model.tca empty
// if there are none or if tca.enabled is false (in the file or by override). path: of the model's file, its first part if it is
// split; empty if there is none. Throws std::runtime_error that names the key or the reason.
void llama_tca_load(llama_model & model, llama_model_loader & ml, const std::string & path);

// Empty if the ragged cache can serve this model, else the reason.
std::string llama_tca_unsupported(const llama_model & model);

// nullptr if layer il is in the ragged store; else why llama.cpp keeps it: "sliding-window attention", "no attention", ...
const char * llama_tca_layer_kept(const llama_model & model, uint32_t il);

// What budgets of this model look like: rows and KV heads of head_config, sizes of one key and one value of one head. Every layer
// in the store has the same; the others may differ. Only for a model that is not unsupported.
struct llama_tca_shape {
    uint32_t          n_layer;     // all layers that the file counts, those that llama.cpp keeps included
    uint32_t          n_head_kv;
    uint32_t          head_dim_k;
    uint32_t          head_dim_v;
    std::vector<bool> stored;      // [n_layer]
};
llama_tca_shape llama_tca_shape_of(const llama_model & model);

// Empty if the budgets have the model's shape and leave to llama.cpp just those layers that it keeps; else one line that names the key.
std::string llama_tca_misfit(const llama_model & model, const tca_budgets & budgets);

// Tells callers how many of the newest tokens can always be taken back (llama_n_rs_seq), so that llama-server keeps checkpoints.
void llama_tca_adjust_cparams(const llama_model & model, llama_cparams & cparams);

// The stock memory of the model, whatever budgets it carries, f16.
std::unique_ptr<llama_memory_i> llama_tca_stock_memory(const llama_model & model, const llama_cparams & cparams);

// nullptr: use the stock memory, also for contexts that the ragged cache does not serve, with a line in the log. Throws std::runtime_error if the setting cannot work.
llama_memory_i * llama_tca_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// What the stock parts of a graph see of a memory's context: the context of the rest, if ours has one. Ours goes to `res`.
const llama_memory_context_i * llama_tca_unwrap(const llama_memory_context_i * mctx, llm_graph_result * res);

// Graph nodes that the segments of a micro-batch of n_tokens add.
uint32_t llama_tca_graph_nodes(const llama_model & model, uint32_t n_tokens);
