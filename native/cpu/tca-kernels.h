// The CPU kernels, one file each. Thread ith of nth does its share of the node.
#pragma once

#include "ops/tca-ops.h"

void tca_cpu_append      (ggml_tensor * node, int ith, int nth);
void tca_cpu_attn        (ggml_tensor * node, int ith, int nth);
void tca_cpu_attn_partial(ggml_tensor * node, int ith, int nth);
void tca_cpu_attn_combine(ggml_tensor * node, int ith, int nth);
void tca_cpu_compact     (ggml_tensor * node, int ith, int nth);

// See tca-functions.h.
const char * tca_cpu_simd(void);
double       tca_cpu_read_bandwidth(int n_threads);
double       tca_cpu_fma_peak      (int n_threads);
