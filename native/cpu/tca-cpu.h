// What the patch in ggml-cpu calls. C, because ggml-cpu.c includes it.
#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

// Whether a GGML_OP_CUSTOM node is one of ours. Other nodes never get here (ggml_cpu_is_tca).
bool ggml_cpu_is_tca_node(const struct ggml_tensor * node);

static inline bool ggml_cpu_is_tca(const struct ggml_tensor * node) {
    return node->op == GGML_OP_CUSTOM && ggml_cpu_is_tca_node(node);
}

// Whether these kernels run a node of ours: any types that ggml reads and writes on the CPU, any head sizes and numbers of heads.
bool ggml_cpu_tca_supports(const struct ggml_tensor * node);

// Thread ith of nth does its share of a node of ours.
void ggml_cpu_tca_forward(struct ggml_tensor * node, int ith, int nth);

// Functions for get_proc_address: "tca_cpu_functions" is a tca_cpu_functions_fn (tca-functions.h). NULL for any other name.
void * ggml_cpu_tca_proc_address(const char * name);

#ifdef __cplusplus
}
#endif
