#include "tca-remote.h"

#include "rpc/tca-rpc.h"

static tca_rpc_status_fn status_fn(ggml_backend_dev_t dev) {
    ggml_backend_reg_t reg = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;
    return reg ? (tca_rpc_status_fn) ggml_backend_reg_get_proc_address(reg, "tca_rpc_status") : nullptr;
}

ggml_status llama_tca_compute_status(ggml_backend_sched_t sched, ggml_status status) {
    bool waited = false;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_dev_t dev = ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i));
        const tca_rpc_status_fn server = status_fn(dev);
        if (server == nullptr) {
            continue;
        }
        if (!waited) {
            ggml_backend_sched_synchronize(sched);
            waited = true;
        }
        if (server(ggml_backend_dev_description(dev)) == TCA_RPC_LOST) {
            return GGML_STATUS_FAILED;
        }
    }
    return status;
}
