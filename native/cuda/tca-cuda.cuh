// What the patch in ggml-cuda calls. One predicate decides for dispatch and for supports_op.
#pragma once

struct ggml_tensor;
struct ggml_backend_cuda_context;

// A TCA node that these kernels run: store types f32, f16, bf16, q8_0 and q4_0 (K and V each), head sizes 64, 80, 96, 128 and
// 256 (the same for K and V), 1 to 16 query heads per KV head. False for every other node.
bool ggml_cuda_tca_handles(const struct ggml_tensor * node);

// Launches the node's kernels on the context's stream. Only for nodes that ggml_cuda_tca_handles() accepts.
// Launch parameters depend on shapes and op_params alone, lengths are read from the descriptor on the device: CUDA graphs hold.
bool ggml_cuda_tca_forward(struct ggml_backend_cuda_context & ctx, struct ggml_tensor * dst);
