#pragma once

#include "ops/tca-ops.h"

enum {
    TCA_CUDA_MIN_CC  = 800,  // cp.async and mma.m16n8k16; compute capability as ggml-cuda counts it: 100*major + 10*minor
    TCA_CUDA_MAX_GQA = 16,   // query heads a KV head
};

// A TCA node that the kernels run on a device of this compute capability: store types f32, f16, bf16, q8_0 and q4_0 (K and V each),
// head sizes 64, 80, 96, 128 and 256 (the same for K and V), up to TCA_CUDA_MAX_GQA query heads a KV head, no attention sinks. False for every other node.
bool tca_cuda_supports(int cc, const ggml_tensor * node);
