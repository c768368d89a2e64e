// What the CPU backend can do beside its nodes. libllama does not link the backend, which may be one of several variants that are
// loaded at run time: it asks the loaded one for this table.
#pragma once

#include "tca.h"

struct tca_metric;

struct tca_cpu_functions {
    // Vector extension the kernels were compiled for: "avx512", "avx2", "neon" or "generic".
    const char * (*simd)(void);

    // Best of several runs on n_threads threads: bytes/s read from memory; f32 operations/s, a multiply-add counting as two.
    double (*read_bandwidth)(int n_threads);
    double (*fma_peak)      (int n_threads);

    // Importance of the tokens of a group, and those that stay, as a compaction node chooses them.
    //   importance [n_tokens] out; the rest and the result as in tca_select() of tca.h
    int32_t (*select)(const struct tca_metric * metric, const struct tca_group * group, int32_t block_size, int32_t n_keep,
            const int32_t * keep_counts, const int32_t * counts, int32_t * kept, double * importance);
};

typedef const struct tca_cpu_functions * (*tca_cpu_functions_fn)(void);
