// Dispatch of the TCA nodes.
#include "tca-cuda.cuh"
#include "tca-kernels.cuh"

static bool type_supported(int type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
}

static bool store_supported(const ggml_tensor * k, const ggml_tensor * v) {
    const int64_t d = k->ne[0];
    return type_supported(k->type) && type_supported(v->type) && v->ne[0] == d &&
        (d == 64 || d == 80 || d == 96 || d == 128 || d == 256);
}

bool ggml_cuda_tca_handles(const ggml_tensor * node) {
    const int first = node->view_src ? 1 : 0;  // an in-place node carries its destination in src[0]
    switch (tca_op_of(node)) {
        case TCA_OP_APPEND:
            return store_supported(node->src[0], node->src[1]);
        case TCA_OP_COMPACT:
            return store_supported(node->src[0], node->src[1]) && tca_cuda_has_metric(*tca_op_select_params(node)->metric);
        case TCA_OP_ATTN:
        case TCA_OP_ATTN_PARTIAL: {
            const ggml_tensor * q = node->src[first];
            return store_supported(node->src[first + 1], node->src[first + 2]) && q->ne[1]/node->src[first + 3]->ne[1] <= 16 &&
                q->nb[1] % 8 == 0 && q->nb[2] % 8 == 0;
        }
        case TCA_OP_ATTN_COMBINE:
            return node->ne[0] <= 256;
        default:
            return false;
    }
}

static void attend(ggml_backend_cuda_context & ctx, ggml_tensor * dst, bool partial) {
    const int first = dst->view_src ? 1 : 0;
    const ggml_tensor * q    = dst->src[first + 0];
    const ggml_tensor * k    = dst->src[first + 1];
    const ggml_tensor * v    = dst->src[first + 2];
    const ggml_tensor * desc = dst->src[first + 3];

    const tca_op_params params = tca_op_get_params(dst);
    const tca_store     store  = tca_store_of(k, v, desc, params.row);

    tca_queries a;
    a.q         = (const float *) q->data;
    a.dst       = (float *) dst->data;
    a.q_head    = q->nb[1]/sizeof(float);
    a.q_token   = q->nb[2]/sizeof(float);
    a.dst_head  = dst->nb[partial ? 2 : 1]/sizeof(float);
    a.dst_token = dst->nb[partial ? 3 : 2]/sizeof(float);
    a.gqa       = q->ne[1]/desc->ne[1];
    a.n_tokens  = q->ne[2];
    a.scale     = params.scale;
    a.softcap   = params.softcap;
    a.n_chunks  = params.n_chunks;
    a.limits    = partial ? tca_cuda_decode_limits(ctx.device, dst) : tca_decode_limits { 0, 0 };

    const int head_dim = k->ne[0];
    if (a.limits.at_once > 0) {
        if (tca_decode_is_quantized(k->type, v->type)) {
            tca_cuda_decode_quantized(store, a, head_dim, ctx.stream());
        } else {
            tca_cuda_decode(store, a, head_dim, ctx.stream());
        }
        return;
    }
#ifdef TCA_CUDA_HOPPER
    if (!partial && tca_cuda_prefill_hopper(ctx, store, a, head_dim)) {
        return;
    }
#endif
    tca_cuda_prefill(ctx, store, a, head_dim, partial);
}

bool ggml_cuda_tca_forward(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (tca_op_of(dst)) {
        case TCA_OP_APPEND:       tca_cuda_append(ctx, dst);  break;
        case TCA_OP_ATTN:         attend(ctx, dst, false);    break;
        case TCA_OP_ATTN_PARTIAL: attend(ctx, dst, true);     break;
        case TCA_OP_ATTN_COMBINE: tca_cuda_combine(ctx, dst); break;
        case TCA_OP_COMPACT:      tca_cuda_compact(ctx, dst); break;
        default:                  return false;
    }
    CUDA_CHECK(cudaGetLastError());
    return true;
}
