#include "tca-cpu-backend.h"

#if !defined(_WIN32)
#    include <dlfcn.h>
#endif

static ggml_backend_dev_t device() {
    if (ggml_backend_reg_count() == 0) {  // as llama_backend_init() does, and without a line for each: the cache's names the CPU's
        ggml_log_callback log;
        void * data;
        ggml_log_get(&log, &data);
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        ggml_backend_load_all();
        ggml_log_set(log, data);
    }
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

static void * function(const char * name) {
    ggml_backend_dev_t dev = device();
    return dev ? ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(dev), name) : nullptr;
}

const tca_cpu_functions * tca_cpu_functions_get() {
    const auto get = (tca_cpu_functions_fn) function("tca_cpu_functions");
    return get ? get() : nullptr;
}

std::string tca_cpu_library() {
#if !defined(_WIN32)
    Dl_info info;
    const tca_cpu_functions * functions = tca_cpu_functions_get();
    if (functions && dladdr((const void *) functions->simd, &info) != 0 && info.dli_fname != nullptr) {
        const std::string path = info.dli_fname;
        return path.substr(path.rfind('/') + 1);
    }
#endif
    return "";
}

ggml_backend_ptr tca_cpu_backend_new(int n_threads) {
    ggml_backend_dev_t dev = device();
    ggml_backend_ptr backend { dev ? ggml_backend_dev_init(dev, nullptr) : nullptr };
    const auto set_n_threads = (ggml_backend_set_n_threads_t) function("ggml_backend_set_n_threads");
    if (backend && set_n_threads) {
        set_n_threads(backend.get(), n_threads);
    }
    return backend;
}
