// Dispatch of the TCA nodes.
#include "tca-cuda.cuh"
#include "tca-cuda-supports.h"
#include "tca-kernels.cuh"

bool ggml_cuda_tca_handles(int device, const ggml_tensor * node) {
    return node->op == GGML_OP_CUSTOM && tca_cuda_supports(ggml_cuda_info().devices[device].cc, node);
}

static void attend(ggml_backend_cuda_context & ctx, ggml_tensor * dst, bool partial) {
    const tca_attn_node n     = tca_attn_node::of(dst);
    const tca_store     store = tca_store_of(n.k, n.v, n.desc, n.row);

    tca_queries a;
    a.q         = (const float *) n.q->data;
    a.dst       = (float *) dst->data;
    a.q_head    = n.q->nb[1]/sizeof(float);
    a.q_token   = n.q->nb[2]/sizeof(float);
    a.dst_head  = dst->nb[partial ? 2 : 1]/sizeof(float);
    a.dst_token = dst->nb[partial ? 3 : 2]/sizeof(float);
    a.gqa       = n.gqa;
    a.n_tokens  = n.q->ne[2];
    a.scale     = n.scale;
    a.softcap   = n.softcap;
    a.n_chunks  = n.n_chunks;
    a.limits    = partial ? tca_cuda_decode_limits(ctx.device, dst) : tca_decode_limits { 0, 0, 0 };

    const int head_dim = n.k->ne[0];
    if (a.limits.at_once > 0) {
        switch (tca_decode_kind_of(n.k->type, n.v->type)) {
            case TCA_DECODE_QUANTIZED: tca_cuda_decode_quantized(store, a, head_dim, ctx.stream()); break;
            case TCA_DECODE_HALF:      tca_cuda_decode_half     (store, a, head_dim, ctx.stream()); break;
            default:                   tca_cuda_decode          (store, a, head_dim, ctx.stream()); break;
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
