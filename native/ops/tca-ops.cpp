// Builders of the nodes. They name the CPU kernels, hence their place in the CPU backend's library.
#include "tca-ops.h"

#include "metrics/tca-metric.h"

static ggml_tensor * finish(ggml_tensor * node, const tca_op_params & params) {
    tca_op_set_params(node, params);
    return node;
}

static void check_store(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * desc, int row) {
    GGML_ASSERT(k->ne[1] == v->ne[1] && ggml_is_contiguous(k) && ggml_is_contiguous(v));
    GGML_ASSERT(desc->type == GGML_TYPE_I32 && desc->ne[0] == TCA_DESC_SIZE && row < desc->ne[3]);
}

static void check_queries(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * desc) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[0] == k->ne[0] && q->ne[1] % desc->ne[1] == 0);
}

ggml_tensor * tca_build_append(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * pos, ggml_tensor * k_cur,
        ggml_tensor * v_cur, ggml_tensor * desc, int row) {
    check_store(k, v, desc, row);
    GGML_ASSERT(k_cur->type == GGML_TYPE_F32 && k_cur->nb[0] == sizeof(float) && k_cur->ne[0] == k->ne[0]);
    GGML_ASSERT(v_cur->type == GGML_TYPE_F32 && v_cur->nb[0] == sizeof(float) && v_cur->ne[0] == v->ne[0]);
    GGML_ASSERT(k_cur->ne[1] == desc->ne[1] && v_cur->ne[1] == desc->ne[1]);
    ggml_tensor * args[] = { v, pos, k_cur, v_cur, desc };
    return finish(ggml_custom_inplace(ctx, k, args, 5, tca_cpu_append, GGML_N_TASKS_MAX, nullptr),
            { TCA_MAGIC, TCA_OP_APPEND, row, 0.0f, 0.0f, 0 });
}

ggml_tensor * tca_build_attn(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * desc, int row,
        float scale, float softcap, ggml_tensor * dst) {
    check_store(k, v, desc, row);
    check_queries(q, k, desc);
    ggml_tensor * args[] = { q, k, v, desc };
    ggml_tensor * node = dst ?
        ggml_custom_inplace(ctx, dst, args, 4, tca_cpu_attn, GGML_N_TASKS_MAX, nullptr) :
        ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], 1, args, 4, tca_cpu_attn, GGML_N_TASKS_MAX, nullptr);
    return finish(node, { TCA_MAGIC, TCA_OP_ATTN, row, scale, softcap, 0 });
}

ggml_tensor * tca_build_attn_split(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * desc,
        int row, float scale, float softcap, int n_chunks, ggml_tensor * dst) {
    check_store(k, v, desc, row);
    check_queries(q, k, desc);
    ggml_tensor * args[] = { q, k, v, desc };
    // per chunk and query: the unnormalised output, then the running maximum and sum of its softmax
    ggml_tensor * partial = finish(
            ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0] + 2, n_chunks, q->ne[1], q->ne[2], args, 4, tca_cpu_attn_partial,
                GGML_N_TASKS_MAX, nullptr),
            { TCA_MAGIC, TCA_OP_ATTN_PARTIAL, row, scale, softcap, n_chunks });

    ggml_tensor * args_combine[] = { partial, desc };
    ggml_tensor * node = dst ?
        ggml_custom_inplace(ctx, dst, args_combine, 2, tca_cpu_attn_combine, GGML_N_TASKS_MAX, nullptr) :
        ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0], q->ne[1], q->ne[2], 1, args_combine, 2, tca_cpu_attn_combine,
                GGML_N_TASKS_MAX, nullptr);
    return finish(node, { TCA_MAGIC, TCA_OP_ATTN_COMBINE, row, scale, softcap, n_chunks });
}

ggml_tensor * tca_build_compact(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * pos, ggml_tensor * desc,
        int row, const tca_select_params * params, ggml_tensor * q, float scale, float softcap) {
    check_store(k, v, desc, row);
    const bool observes = params->metric->needs & TCA_NEEDS_QUERIES;
    if (observes) {
        check_queries(q, k, desc);
    }
    ggml_tensor * args[] = { v, pos, desc, q };
    return finish(ggml_custom_inplace(ctx, k, args, observes ? 4 : 3, tca_cpu_compact, GGML_N_TASKS_MAX, const_cast<tca_select_params *>(params)),
            { TCA_MAGIC, TCA_OP_COMPACT, row, observes ? scale : 0.0f, observes ? softcap : 0.0f, 0 });
}
