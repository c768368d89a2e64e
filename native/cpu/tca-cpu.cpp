// The CPU backend's side of the TCA nodes: what it runs, and how.
#include "tca-cpu.h"

#include "tca-functions.h"
#include "tca-kernels.h"
#include "tca-select.h"

#include "ggml-cpu.h"

#include <cstring>

bool ggml_cpu_is_tca_node(const ggml_tensor * node) {
    return tca_op_of(node) != TCA_OP_NONE;
}

// Rows of n values can be written and read back.
static bool stores(ggml_type type, int64_t n) {
    return type >= 0 && type < GGML_TYPE_COUNT && ggml_blck_size(type) > 0 && n % ggml_blck_size(type) == 0 &&
        ggml_get_type_traits_cpu(type)->from_float != nullptr &&
        (type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr);
}

static bool stores(const ggml_tensor * k, const ggml_tensor * v) {
    return stores(k->type, k->ne[0]) && stores(v->type, v->ne[0]);
}

bool ggml_cpu_tca_supports(const ggml_tensor * node) {
    switch (tca_op_of(node)) {
        case TCA_OP_APPEND: {
            const tca_append_node a = tca_append_node::of(node);
            return stores(a.k, a.v);
        }
        case TCA_OP_ATTN:
        case TCA_OP_ATTN_PARTIAL: {
            const tca_attn_node a = tca_attn_node::of(node);
            return stores(a.k, a.v);
        }
        case TCA_OP_ATTN_COMBINE:
            return true;
        case TCA_OP_COMPACT: {
            const tca_compact_node a = tca_compact_node::of(node);
            return stores(a.k, a.v) && tca_importance_of(a.tables.n.metric) != nullptr;
        }
        case TCA_OP_NONE:
            break;
    }
    return false;
}

void ggml_cpu_tca_forward(ggml_tensor * node, int ith, int nth) {
    switch (tca_op_of(node)) {
        case TCA_OP_APPEND:       tca_cpu_append      (node, ith, nth); return;
        case TCA_OP_ATTN:         tca_cpu_attn        (node, ith, nth); return;
        case TCA_OP_ATTN_PARTIAL: tca_cpu_attn_partial(node, ith, nth); return;
        case TCA_OP_ATTN_COMBINE: tca_cpu_attn_combine(node, ith, nth); return;
        case TCA_OP_COMPACT:      tca_cpu_compact     (node, ith, nth); return;
        case TCA_OP_NONE:         break;
    }
    GGML_ABORT("tca: node %s holds an operation that this build does not know", node->name);
}

static int32_t select_group(const tca_metric * metric, const tca_group * group, int32_t block_size, int32_t n_keep,
        const int32_t * keep_counts, const int32_t * counts, int32_t * kept, double * importance) {
    tca_select_scratch scratch;
    tca_importance(*metric, *group, 0, nullptr, scratch, importance);
    return tca_select_tokens(importance, group->n_tokens, block_size, n_keep, keep_counts, counts, scratch, kept);
}

static const tca_cpu_functions * functions(void) {
    static const tca_cpu_functions all = { tca_cpu_simd, tca_cpu_read_bandwidth, tca_cpu_fma_peak, select_group };
    return &all;
}

void * ggml_cpu_tca_proc_address(const char * name) {
    return strcmp(name, "tca_cpu_functions") == 0 ? (void *) functions : nullptr;
}
