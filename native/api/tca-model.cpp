// C API: shape and budgets of a model that is already loaded, and what architectures there are.
#include "tca-error.h"

#include "llama/llama-model-tca.h"

#include "llama/tca-archs.h"

#include "llama-model.h"

#include <algorithm>

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
    const std::string misfit = llama_tca_misfit(*model, *budgets);
    if (!misfit.empty()) {
        return tca_fail(TCA_ERR_BUDGETS, misfit);
    }
    model->tca = std::make_shared<llama_tca_model>(llama_tca_model { tca_budgets_data(*budgets) });
    return TCA_OK;
}

tca_status tca_model_get_shape(const llama_model * model, tca_model_shape * out, bool * stored, uint32_t n_max) {
    *out = {};
    const std::string reason = llama_tca_unsupported(*model);
    if (!reason.empty()) {
        return tca_fail(TCA_ERR_UNSUPPORTED, "TCA cannot run this model: " + reason);
    }
    const llama_tca_shape shape = llama_tca_shape_of(*model);
    out->n_layer     = shape.n_layer;
    out->n_head_kv   = shape.n_head_kv;
    out->head_dim_k  = shape.head_dim_k;
    out->head_dim_v  = shape.head_dim_v;
    out->n_stored    = std::count(shape.stored.begin(), shape.stored.end(), true);
    out->n_ctx_train = model->hparams.n_ctx_train;
    for (uint32_t il = 0; il < std::min(n_max, shape.n_layer); ++il) {
        stored[il] = shape.stored[il];
    }
    return TCA_OK;
}

bool tca_arch_info(int32_t i, tca_arch * out) {
    const tca_arch_entry * entry = i < 0 ? nullptr : tca_arch_at(i);
    if (entry == nullptr) {
        return false;
    }
    out->name   = llm_arch_name(entry->arch);
    out->inputs = entry->inputs;
    out->remark = entry->remark;
    return true;
}
