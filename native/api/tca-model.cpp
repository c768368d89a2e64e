// C API: shape and budgets of a model that is already loaded, and what architectures there are.
#include "tca-error.h"

#include "budgets/tca-source.h"
#include "llama/llama-model-tca.h"
#include "llama/tca-archs.h"

#include "llama-arch.h"
#include "llama-hparams.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include "gguf.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

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
    model->tca = std::make_shared<llama_tca_model>(llama_tca_model { tca_budgets_data(*budgets), "" });
    return TCA_OK;
}

// The loader says what it reads; nobody asked it to.
namespace {
struct quiet_log {
    ggml_log_callback callback;
    void *            user_data;

    quiet_log() {
        llama_log_get(&callback, &user_data);
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }
    ~quiet_log() { llama_log_set(callback, user_data); }
};
}  // namespace

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
    out->n_swa       = model->hparams.swa_type == LLAMA_SWA_TYPE_NONE ? 0 : model->hparams.n_swa;
    for (uint32_t il = 0; il < shape.n_layer; ++il) {
        const bool slides = out->n_swa > 0 && !shape.stored[il] && il < model->hparams.n_layer() && model->hparams.is_swa(il);
        out->n_head = std::max(out->n_head, shape.stored[il] ? model->hparams.n_head(il) : 0);
        out->sliding_k += slides ? model->hparams.n_embd_k_gqa(il) : 0;
        out->sliding_v += slides ? model->hparams.n_embd_v_gqa(il) : 0;
    }
    for (uint32_t il = 0; il < std::min(n_max, shape.n_layer); ++il) {
        stored[il] = shape.stored[il];
    }
    return TCA_OK;
}

// llama.cpp asserts, and so ends the process, where some of these are not as it expects.
static std::string malformed(const gguf_context * gguf, const std::string & arch) {
    const auto number = [&](const char * name, int64_t absent) -> int64_t {
        const int64_t id = gguf_find_key(gguf, (arch + name).c_str());
        return id < 0 ? absent : gguf_get_kv_type(gguf, id) == GGUF_TYPE_UINT32 ? (int64_t) gguf_get_val_u32(gguf, id) : -1;
    };
    const int64_t n_layer = number(".block_count", 0), n_nextn = number(".nextn_predict_layers", 0), n_expert = number(".expert_count", 0);
    if (n_layer < 1 || n_layer > LLAMA_MAX_LAYERS) {
        return arch + ".block_count must be a number from 1 to " + std::to_string(LLAMA_MAX_LAYERS);
    }
    if (n_nextn < 0 || n_nextn > n_layer) {
        return arch + ".nextn_predict_layers must be a number up to the number of layers";
    }
    const int64_t n_groups = number(".expert_group_count", 0), n_groups_used = number(".expert_group_used_count", 0);
    if (n_expert < 0 || n_expert > LLAMA_MAX_EXPERTS || n_groups < 0 || (n_groups > 0 && n_groups >= n_expert) ||
            (n_groups > 1 && (n_expert % n_groups != 0 || n_groups_used < 1 || n_groups_used >= n_groups))) {
        return arch + ".expert_count, .expert_group_count and .expert_group_used_count do not fit each other";
    }
    const int64_t id_used = gguf_find_key(gguf, (arch + ".expert_used_count").c_str());
    if (id_used < 0 ? n_expert > 0 : gguf_get_kv_type(gguf, id_used) != GGUF_TYPE_ARRAY &&
            (number(".expert_used_count", 0) < (n_expert > 0) || number(".expert_used_count", 0) > n_expert)) {
        return arch + ".expert_used_count does not fit " + arch + ".expert_count";
    }
    const int64_t id_scaling = gguf_find_key(gguf, (arch + ".rope.scaling.type").c_str());
    static const char * const scalings[] = { "none", "linear", "yarn", "longrope" };
    if (id_scaling >= 0 && (gguf_get_kv_type(gguf, id_scaling) != GGUF_TYPE_STRING ||
            std::none_of(std::begin(scalings), std::end(scalings), [&](const char * s) { return !strcmp(s, gguf_get_val_str(gguf, id_scaling)); }))) {
        return arch + ".rope.scaling.type is not known";
    }
    return "";
}

using gguf_ptr = std::unique_ptr<gguf_context, void (*)(gguf_context *)>;

// Metadata of a file; null and TCA_ERR_IO said.
static gguf_ptr read_metadata(const char * path) {
    gguf_ptr gguf { nullptr, gguf_free };
    FILE * file = fopen(path, "rb");
    if (file == nullptr) {
        tca_fail(TCA_ERR_IO, std::string("cannot open ") + path);
        return gguf;
    }
    fclose(file);
    gguf.reset(gguf_init_from_file(path, { true, nullptr }));
    if (!gguf) {
        tca_fail(TCA_ERR_IO, std::string(path) + " is not a readable GGUF file");
    }
    return gguf;
}

// A model without tensors, of which the hyperparameters alone are known. Null, with the status and text said, for one that llama.cpp
// cannot read or that the table does not serve.
static std::unique_ptr<llama_model> hparams_of(gguf_context * gguf, const std::string & path, tca_status & status) {
    const int64_t id_arch = gguf_find_key(gguf, "general.architecture");
    if (id_arch < 0 || gguf_get_kv_type(gguf, id_arch) != GGUF_TYPE_STRING) {
        status = tca_fail(TCA_ERR_IO, path + ": general.architecture is missing or no string");
        return nullptr;
    }
    const std::string      arch  = gguf_get_val_str(gguf, id_arch);
    const tca_arch_entry * entry = tca_arch_find(llm_arch_from_string(arch));
    if (entry == nullptr || entry->inputs == TCA_INPUT_NONE) {
        std::string shown;  // a file's string may be long or hold control characters
        for (size_t i = 0; i < arch.size() && i < 32; ++i) {
            shown += arch[i] >= 0x20 && arch[i] < 0x7f ? arch[i] : '?';
        }
        status = tca_fail(TCA_ERR_UNSUPPORTED, "TCA cannot run this model: architecture '" + shown + "' " +
                (entry ? std::string("is not served: ") + entry->remark : "is not known"));
        return nullptr;
    }
    const std::string problem = malformed(gguf, arch);
    if (!problem.empty()) {
        status = tca_fail(TCA_ERR_IO, path + ": " + problem);
        return nullptr;
    }
    try {
        const quiet_log quiet;
        std::vector<std::string> splits;
        llama_model_loader ml(gguf, nullptr, nullptr, "", splits, nullptr, LLAMA_LOAD_MODE_NONE, false, true, false, nullptr, nullptr);
        std::unique_ptr<llama_model> model { llama_model_create(ml, llama_model_default_params()) };
        dynamic_cast<llama_model_base &>(*model).load_hparams(ml);
        status = TCA_OK;
        return model;
    } catch (const std::exception & error) {
        status = tca_fail(TCA_ERR_IO, path + ": " + error.what());
        return nullptr;
    }
}

tca_status tca_file_get_shape(const char * path, tca_model_shape * out, bool * stored, uint32_t n_max) {
    *out = {};
    const gguf_ptr gguf = read_metadata(path);
    if (!gguf) {
        return TCA_ERR_IO;
    }
    tca_status status;
    const std::unique_ptr<llama_model> model = hparams_of(gguf.get(), path, status);
    return model ? tca_model_get_shape(model.get(), out, stored, n_max) : status;
}

tca_status tca_file_check(const char * path) {
    const gguf_ptr gguf = read_metadata(path);
    if (!gguf) {
        return TCA_ERR_IO;
    }
    std::string problem;
    tca_source  source;
    if (!tca_source_find(gguf.get(), path, source, problem)) {
        return tca_fail(TCA_ERR_BUDGETS, problem);
    }
    tca_status  status;
    const std::unique_ptr<llama_model> model = hparams_of(gguf.get(), path, status);
    if (model && llama_tca_unsupported(*model).empty()) {
        const llama_tca_shape shape = llama_tca_shape_of(*model);
        tca_budgets_data budgets;
        bool             enabled = true;
        status = tca_budgets_from_gguf(source.gguf, shape.n_layer, shape.n_head_kv, budgets, enabled, problem);
        if (status == TCA_OK && !(problem = llama_tca_misfit(*model, budgets.view())).empty()) {
            status = TCA_ERR_BUDGETS;
        }
        status = enabled ? status : TCA_NO_BUDGETS;
    } else {
        status = tca_gguf_check(gguf.get(), source.gguf, problem);  // of a file that llama.cpp does not read, what can be said of the keys alone
    }
    return status < 0 ? tca_fail(status, (source.path.empty() ? path : source.path) + ": " + problem) : status;
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
