// What the CUDA kernels run. No CUDA here: the answer depends on the node and on the device's compute capability alone, and is
// tested where there is no GPU.
#include "tca-cuda-supports.h"

#include "tca-cuda-metrics.h"

// Explicit on purpose: kernels take apart a block of each of these types, and would misread any other.
static bool type_supported(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
            return true;
        default:
            return false;
    }
}

static bool head_dim_supported(int64_t d) {
    return d == 64 || d == 80 || d == 96 || d == 128 || d == 256;
}

static bool store_supported(const ggml_tensor * k, const ggml_tensor * v) {
    return type_supported(k->type) && type_supported(v->type) && head_dim_supported(k->ne[0]) && v->ne[0] == k->ne[0];
}

static bool metric_supported(int32_t metric) {
    switch (metric) {
#define CASE(id, kernel) case TCA_METRIC_##id:
        TCA_CUDA_METRICS(CASE)
#undef CASE
            return true;
        default:
            return false;
    }
}

bool tca_cuda_supports(int cc, const ggml_tensor * node) {
    if (cc < TCA_CUDA_MIN_CC) {
        return false;
    }
    switch (tca_op_of(node)) {
        case TCA_OP_APPEND: {
            const tca_append_node a = tca_append_node::of(node);
            return store_supported(a.k, a.v);
        }
        case TCA_OP_ATTN:
        case TCA_OP_ATTN_PARTIAL: {
            const tca_attn_node a = tca_attn_node::of(node);
            return a.sinks == nullptr && store_supported(a.k, a.v) && a.gqa <= TCA_CUDA_MAX_GQA && a.q->nb[1] % 8 == 0 && a.q->nb[2] % 8 == 0;
        }
        case TCA_OP_ATTN_COMBINE:
            return tca_combine_node::of(node).sinks == nullptr && head_dim_supported(node->ne[0]);
        case TCA_OP_COMPACT: {
            const tca_compact_node a = tca_compact_node::of(node);
            return store_supported(a.k, a.v) && metric_supported(a.tables.n.metric) &&
                (a.q == nullptr || a.q->ne[1]/a.desc->ne[1] <= TCA_CUDA_MAX_GQA);
        }
        case TCA_OP_NONE:
            break;
    }
    return false;
}
