// What the patch in ggml-cuda calls. One predicate decides for dispatch and for supports_op.
#pragma once

struct ggml_tensor;
struct ggml_backend_cuda_context;

// A TCA node that these kernels run on this device (tca-cuda-supports.h). False for every other node.
bool ggml_cuda_tca_handles(int device, const struct ggml_tensor * node);

// Launches the node's kernels on the context's stream. Only for nodes that ggml_cuda_tca_handles() accepts.
// Launch parameters depend on shapes and op_params alone, lengths are read from the descriptor on the device: CUDA graphs hold.
bool ggml_cuda_tca_forward(struct ggml_backend_cuda_context & ctx, struct ggml_tensor * dst);
