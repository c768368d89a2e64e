// Shared by the two halves of compaction: how important the tokens of a group are (tca-importance.cu), which of them stay and
// where they go (tca-compact.cu).
#pragma once

#include "tca-kernels.cuh"

struct tca_metric;

// Numbers of a compaction node and its tables on the device, by value into kernels.
struct tca_select_args {
    int             block_size, group_size, n_keep, hadamard;
    int             layer;
    int             rope_type, n_rot;
    float           rope_scale;
    const float   * freqs;        // [n_rot/2], if there is a rotation
    const int32_t * keep_counts;  // [n_keep]
    const int32_t * configs;      // [n_configs, n_keep]
    const float   * probe;        // [n_head_kv, head_dim], if the metric uses one
};

// Whether a group of this region is compacted after the segment.
static __device__ __forceinline__ bool tca_compacts(const int32_t * d) {
    return d[TCA_DESC_COUNT] > 0 && d[TCA_DESC_GROUP] >= 0 && d[TCA_DESC_CONFIG] != TCA_HEAD_DENSE;
}

// importance [n_seqs*n_head_kv, group_size] out, on the device. A region without a group to compact keeps what stands there.
// queries: q, its strides, gqa, scale and softcap as the segment's attention has them, for metrics with TCA_NEEDS_QUERIES.
// Double throughout: selection is a ranking, and the CPU must get the same one. Sums differ from the CPU's in their order,
// hence in the last bits; equal tokens get bitwise equal importance, as there, so that ties go to the newer one on both.
// Only for metrics of TCA_CUDA_METRICS (tca-cuda-metrics.h).
void tca_cuda_importance(ggml_backend_cuda_context & ctx, const tca_store & s, const int32_t * pos, const tca_select_args & p,
        const tca_queries & queries, const tca_metric & metric, int head_dim, double * importance);
