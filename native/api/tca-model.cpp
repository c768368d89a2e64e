// C API: budgets of a model that is already loaded.
#include "tca-error.h"

#include "llama/llama-model-tca.h"

#include "llama-model.h"

tca_status tca_model_set_budgets(llama_model * model, const tca_budgets * budgets) {
    if (model == nullptr) {
        return tca_fail(TCA_ERR_ARGUMENT, "no model");
    }
    if (budgets == nullptr) {
        model->tca.reset();
        return TCA_OK;
    }
    const std::string problem = tca_budgets_problem(*budgets);
    if (!problem.empty()) {
        return tca_fail(TCA_ERR_BUDGETS, problem);
    }
    const std::string reason = llama_tca_unsupported(*model);
    if (!reason.empty()) {
        return tca_fail(TCA_ERR_UNSUPPORTED, "TCA cannot run this model: " + reason);
    }
    const uint32_t n_layer = model->hparams.n_layer_all, n_head_kv = model->hparams.n_head_kv(0);
    if (budgets->n_layer != n_layer || budgets->n_head_kv != n_head_kv) {
        return tca_fail(TCA_ERR_BUDGETS, "tca.head_config is " + std::to_string(budgets->n_layer) + " x " +
                std::to_string(budgets->n_head_kv) + ", this model has " + std::to_string(n_layer) + " layers of " +
                std::to_string(n_head_kv) + " KV heads");
    }
    const std::string misfit = llama_tca_misfit(*model, *budgets);
    if (!misfit.empty()) {
        return tca_fail(TCA_ERR_BUDGETS, misfit);
    }
    model->tca = std::make_shared<llama_tca_model>(llama_tca_model { tca_budgets_data(*budgets) });
    return TCA_OK;
}
