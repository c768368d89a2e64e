// For the HIP and MUSA builds of ggml-cuda, which have no TCA kernels: no node is taken, and the cache refuses the device.
#include "tca-cuda.cuh"

bool ggml_cuda_tca_handles(int, const struct ggml_tensor *) {
    return false;
}

bool ggml_cuda_tca_forward(struct ggml_backend_cuda_context &, struct ggml_tensor *) {
    return false;
}
