// C API: where the budgets of a model file are. tca_file_check() and tca_file_get_shape(), which need llama.cpp's loader, are in
// tca-model.cpp.
#include "tca-error.h"

#include "budgets/tca-budgets.h"
#include "budgets/tca-source.h"

#include "gguf.h"

#include <cstring>
#include <memory>

static tca_status give(const std::string & text, char * out, size_t n_max) {
    if (text.size() >= n_max) {
        return tca_fail(TCA_ERR_ARGUMENT, "the buffer of " + std::to_string(n_max) + " bytes is too small for " + text);
    }
    memcpy(out, text.c_str(), text.size() + 1);
    return TCA_OK;
}

tca_status tca_file_source(const char * path, char * out, size_t n_max) {
    const std::unique_ptr<gguf_context, tca_gguf_deleter> gguf { gguf_init_from_file(path, { true, nullptr }) };
    if (!gguf) {
        return tca_fail(TCA_ERR_IO, std::string(path) + " is not a readable GGUF file");
    }
    std::string problem;
    tca_source  source;
    if (!tca_source_find(gguf.get(), path, source, problem)) {
        return tca_fail(TCA_ERR_BUDGETS, problem);
    }
    if (source.path.empty()) {
        return tca_has_keys(gguf.get()) ? give(path, out, n_max) : TCA_NO_BUDGETS;
    }
    return give(source.path, out, n_max);
}

tca_status tca_file_identity(const char * path, char identity[17]) {
    const std::unique_ptr<gguf_context, tca_gguf_deleter> gguf { gguf_init_from_file(path, { true, nullptr }) };
    if (!gguf) {
        return tca_fail(TCA_ERR_IO, std::string(path) + " is not a readable GGUF file");
    }
    std::string problem;
    const std::string text = tca_identity(gguf.get(), path, problem);
    return text.empty() ? tca_fail(TCA_ERR_IO, problem) : give(text, identity, 17);
}

tca_status tca_file_beside(const char * path, char * out, size_t n_max) {
    return give(tca_beside(path), out, n_max);
}

tca_status tca_user_budgets(char * out, size_t n_max) {
    const std::string folder = tca_user_folder();
    return folder.empty() ? tca_fail(TCA_ERR_ARGUMENT, "neither XDG_DATA_HOME nor HOME says where the user's folder is") :
        give(folder, out, n_max);
}
