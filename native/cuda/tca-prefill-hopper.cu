#include "tca-schedule.cuh"

bool tca_cuda_prefill_hopper(ggml_backend_cuda_context &, const tca_store &, const tca_queries &, int) {
    return false;
}
