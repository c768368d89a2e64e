// What a model carries of TCA: its validated budgets. Entry points of the hooks in llama_model_load and create_memory.
#pragma once

#include "plan/tca-plan.h"

struct llama_cparams;
struct llama_hparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llama_model_loader;

struct llama_tca_model {
    tca_budgets_data budgets;
};

// Reads and validates the tca.* keys after the hyperparameters are known. Leaves model.tca empty if there are none or if
// tca.enabled is false (in the file or by override). Throws std::runtime_error that names the key or the reason.
void llama_tca_load(llama_model & model, llama_model_loader & ml);

// Empty if the ragged cache can serve this model, else the reason.
std::string llama_tca_unsupported(const llama_model & model);

// Whether layer il has sliding-window attention and stays in the stock cache.
bool llama_tca_layer_slides(const llama_model & model, uint32_t il);

// Empty if the budgets treat as sliding-window layers just those that the model has; else one line that names the key.
// head_config [n_layer, n_head_kv].
std::string llama_tca_misfit(const llama_model & model, const tca_budgets & budgets);

// Every sequence has a stream of its own in the ragged cache: turns kv_unified off before the context sizes are derived.
void llama_tca_adjust_cparams(const llama_model & model, llama_cparams & cparams);

// nullptr: use the stock memory. Throws std::runtime_error if the setting cannot work.
llama_memory_i * llama_tca_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

// Graph nodes that the segments of a micro-batch of n_tokens add.
uint32_t llama_tca_graph_nodes(const llama_model & model, uint32_t n_tokens);
