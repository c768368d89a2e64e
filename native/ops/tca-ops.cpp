// Builders of the nodes, and of the tables that compaction reads.
#include "tca-ops.h"

#include "metrics/tca-metric.h"

#include "ggml-backend.h"

#include <cstring>

// A new node, or one that writes into dst. n_args: sources behind dst.
static ggml_tensor * make_node(ggml_context * ctx, ggml_tensor * dst, const int64_t * ne, ggml_tensor ** args, int n_args,
        tca_op_params params) {
    ggml_tensor * node = dst ?
        ggml_custom_inplace(ctx, dst, args, n_args, nullptr, GGML_N_TASKS_MAX, nullptr) :
        ggml_custom_4d(ctx, GGML_TYPE_F32, ne[0], ne[1], ne[2], ne[3], args, n_args, nullptr, GGML_N_TASKS_MAX, nullptr);
    params.n_tasks = GGML_N_TASKS_MAX;
    params.magic   = TCA_MAGIC;
    memset(node->op_params, 0, sizeof(node->op_params));
    memcpy(node->op_params, &params, sizeof(params));
    return node;
}

static void check_store(const ggml_tensor * k, const ggml_tensor * v, const ggml_tensor * desc, int row) {
    GGML_ASSERT(k->ne[1] == v->ne[1] && ggml_is_contiguous(k) && ggml_is_contiguous(v));
    GGML_ASSERT(desc->type == GGML_TYPE_I32 && desc->ne[0] == TCA_DESC_SIZE && row < desc->ne[3]);
}

static void check_queries(const ggml_tensor * q, const ggml_tensor * k, const ggml_tensor * desc) {
    GGML_ASSERT(q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) && q->ne[0] == k->ne[0] && q->ne[1] % desc->ne[1] == 0);
}

static void check_sinks(const ggml_tensor * sinks, const ggml_tensor * q) {
    GGML_ASSERT(sinks == nullptr || (sinks->type == GGML_TYPE_F32 && sinks->ne[0] == q->ne[1] && ggml_is_contiguous(sinks)));
}

static tca_op_params params_of(tca_op op, int row, float scale, float softcap, int n_chunks) {
    tca_op_params params = {};
    params.op       = op;
    params.row      = row;
    params.scale    = scale;
    params.softcap  = softcap;
    params.n_chunks = n_chunks;
    return params;
}

ggml_tensor * tca_build_append(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * pos, ggml_tensor * k_cur,
        ggml_tensor * v_cur, ggml_tensor * desc, int row) {
    check_store(k, v, desc, row);
    GGML_ASSERT(k_cur->type == GGML_TYPE_F32 && k_cur->nb[0] == sizeof(float) && k_cur->ne[0] == k->ne[0]);
    GGML_ASSERT(v_cur->type == GGML_TYPE_F32 && v_cur->nb[0] == sizeof(float) && v_cur->ne[0] == v->ne[0]);
    GGML_ASSERT(k_cur->ne[1] == desc->ne[1] && v_cur->ne[1] == desc->ne[1]);
    ggml_tensor * args[] = { v, pos, k_cur, v_cur, desc };
    return make_node(ctx, k, nullptr, args, 5, params_of(TCA_OP_APPEND, row, 0.0f, 0.0f, 0));
}

ggml_tensor * tca_build_attn(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * desc, int row,
        float scale, float softcap, ggml_tensor * dst, ggml_tensor * sinks) {
    check_store(k, v, desc, row);
    check_queries(q, k, desc);
    check_sinks(sinks, q);
    ggml_tensor * args[] = { q, k, v, desc, sinks };
    const int64_t ne[]   = { v->ne[0], q->ne[1], q->ne[2], 1 };
    return make_node(ctx, dst, ne, args, 5, params_of(TCA_OP_ATTN, row, scale, softcap, 0));
}

ggml_tensor * tca_build_attn_split(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, ggml_tensor * desc,
        int row, float scale, float softcap, int n_chunks, ggml_tensor * dst, ggml_tensor * sinks) {
    check_store(k, v, desc, row);
    check_queries(q, k, desc);
    check_sinks(sinks, q);
    ggml_tensor * args[] = { q, k, v, desc };
    // per chunk and query: the unnormalised output, then the running maximum and sum of its softmax
    const int64_t ne_partial[] = { v->ne[0] + 2, n_chunks, q->ne[1], q->ne[2] };
    ggml_tensor * partial = make_node(ctx, nullptr, ne_partial, args, 4, params_of(TCA_OP_ATTN_PARTIAL, row, scale, softcap, n_chunks));

    ggml_tensor * args_combine[] = { partial, desc, sinks };
    const int64_t ne[] = { v->ne[0], q->ne[1], q->ne[2], 1 };
    return make_node(ctx, dst, ne, args_combine, 3, params_of(TCA_OP_ATTN_COMBINE, row, scale, softcap, n_chunks));
}

ggml_tensor * tca_build_compact(ggml_context * ctx, ggml_tensor * k, ggml_tensor * v, ggml_tensor * pos, ggml_tensor * desc,
        int row, const tca_tables & tables, ggml_tensor * q, float scale, float softcap) {
    check_store(k, v, desc, row);
    const tca_metric * metric   = tca_metric_by_id(tables.n.metric);
    const bool         observes = metric && (metric->needs & TCA_NEEDS_QUERIES);
    if (observes) {
        check_queries(q, k, desc);
    }
    ggml_tensor * args[] = { v, pos, desc, tables.configs, tables.freqs, tables.probe, observes ? q : nullptr };
    tca_op_params params = params_of(TCA_OP_COMPACT, row, observes ? scale : 0.0f, observes ? softcap : 0.0f, 0);
    params.select = tables.n;
    return make_node(ctx, k, nullptr, args, 7, params);
}

tca_tables tca_tables_new(ggml_context * ctx, const tca_select_params & params, int64_t head_dim_k, int64_t n_head_kv,
        ggml_tensor * configs) {
    const unsigned needs = params.metric->needs;
    tca_tables t;
    t.configs = configs ? configs : ggml_new_tensor_2d(ctx, GGML_TYPE_I32, params.n_keep, 1 + params.n_configs);
    if ((needs & TCA_NEEDS_KEYS) && params.rope.type != TCA_ROPE_NONE) {
        t.freqs = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, params.rope.n_rot/2);
    }
    if (needs & TCA_NEEDS_PROBE) {
        t.probe = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, head_dim_k, n_head_kv);
    }
    t.n = { params.metric->id, params.layer, params.block_size, params.group_size, params.hadamard,
        t.freqs ? params.rope.type : (int32_t) TCA_ROPE_NONE, t.freqs ? params.rope.scale : 1.0f };
    return t;
}

// ggml_backend_tensor_set() for tensors in a buffer; tests also have tensors over memory of their own.
static void set(ggml_tensor * t, const void * data, size_t offset, size_t size) {
    if (t->buffer) {
        ggml_backend_tensor_set(t, data, offset, size);
    } else {
        memcpy((char *) t->data + offset, data, size);
    }
}

void tca_tables_set(const tca_tables & t, const tca_select_params & params) {
    set(t.configs, params.keep_counts, 0,                params.n_keep*sizeof(int32_t));
    set(t.configs, params.configs,     t.configs->nb[1], (size_t) params.n_configs*params.n_keep*sizeof(int32_t));
    if (t.freqs) {
        set(t.freqs, params.rope.freqs, 0, ggml_nbytes(t.freqs));
    }
    if (t.probe) {
        set(t.probe, params.probe, 0, ggml_nbytes(t.probe));
    }
}
