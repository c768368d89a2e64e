#include "tca-rope.h"

#include "llama-model-tca.h"
#include "tca-cpu-backend.h"

#include "llama-adapter.h"
#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-hparams.h"
#include "llama-memory.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>

// The RoPE node that the key passed through on its way here, nullptr if none; `first` becomes the dimension of the key where the
// node's input starts. Followed are nodes that leave every key where it is: views and copies, norms, scalings, the Hadamard
// rotation of quantized caches, and the joining of a key from a rotated part and one that is not.
static const ggml_tensor * find_rope(const ggml_tensor * t, int64_t & first) {
    while (t != nullptr) {
        switch (t->op) {
            case GGML_OP_ROPE:
                return t;
            case GGML_OP_VIEW:
            case GGML_OP_RESHAPE:
            case GGML_OP_PERMUTE:
            case GGML_OP_TRANSPOSE:
            case GGML_OP_CONT:
            case GGML_OP_CPY:
            case GGML_OP_DUP:
            case GGML_OP_REPEAT:
            case GGML_OP_SCALE:
            case GGML_OP_CLAMP:
            case GGML_OP_NORM:
            case GGML_OP_RMS_NORM:
            case GGML_OP_L2_NORM:
            case GGML_OP_MUL:
                t = t->src[0];
                break;
            case GGML_OP_MUL_MAT:  // a matrix of the graph's own inputs is the Hadamard matrix; any other makes the key
                t = t->src[0]->flags & GGML_TENSOR_FLAG_INPUT ? t->src[1] : nullptr;
                break;
            case GGML_OP_CONCAT: {
                int64_t inner = first;
                if (const ggml_tensor * node = find_rope(t->src[0], inner)) {
                    first = inner;
                    return node;
                }
                first += t->op_params[0] == 0 ? t->src[0]->ne[0] : 0;
                t = t->src[1];
                break;
            }
            default:
                return nullptr;
        }
    }
    return nullptr;
}

// RoPE of one key tensor [head_dim, n_head_kv, n_tokens] before it is stored. A rotation that a table cannot say (NEOX pairs at an
// offset) is NONE, too: keys are then ranked as they are.
// The table is measured, not recomputed: the node's own operation is applied to unit vectors at position 1, and the angles and the
// magnitude are read off. So every parameter that the operation honours is honoured here.
static llama_tca_rope rope_of(const ggml_tensor * key) {
    llama_tca_rope rope;
    int64_t first = 0;
    const ggml_tensor * node = find_rope(key, first);
    if (node == nullptr) {
        return rope;
    }
    const int  n_dims = node->op_params[1];
    const int  mode   = node->op_params[2];
    const bool multi  = mode & GGML_ROPE_TYPE_MROPE;
    const bool neox   = multi || (mode & GGML_ROPE_TYPE_NEOX);
    first += node->op_params[15];
    if (n_dims < 2 || mode == GGML_ROPE_TYPE_VISION || first % 2 != 0 || (neox && first != 0)) {
        return rope;
    }

    const ggml_init_params params = { 16*ggml_tensor_overhead() + ggml_graph_overhead() + (size_t) (1 << 20), nullptr, false };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_dims, 1, 1);
    ggml_tensor * pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, multi ? 4 : 1);
    for (int i = 0; i < 3 && i < pos->ne[0]; ++i) {
        ((int32_t *) pos->data)[i] = 1;  // a token of text: time, height and width are its position, the fourth is 0
    }
    if (multi) {
        ((int32_t *) pos->data)[3] = 0;
    }
    ggml_tensor * factors = nullptr;
    if (const ggml_tensor * given = node->src[2]) {
        factors = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_nelements(given));
        ggml_backend_tensor_get(given, factors->data, 0, ggml_nbytes(given));
    }

    float * unit = (float *) x->data;
    for (int i = 0; i < n_dims/2; ++i) {
        unit[neox ? i            : 2*i    ] = 1.0f;
        unit[neox ? i + n_dims/2 : 2*i + 1] = 0.0f;
    }
    int sections[GGML_MROPE_SECTIONS] = {};
    ggml_tensor * y = multi ? ggml_rope_multi(ctx.get(), x, pos, factors, n_dims, sections, mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f)
                            : ggml_rope_ext  (ctx.get(), x, pos, factors, n_dims, mode, 0, 1.0f, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f);
    memcpy(y->op_params, node->op_params, sizeof(node->op_params));
    y->op_params[15] = 0;
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, y);
    const ggml_backend_ptr backend = tca_cpu_backend_new(1);
    if (!backend || ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string("tca: ") + TCA_NO_CPU_BACKEND);
    }

    // consecutive pairs behind a part that is not rotated: the pairs of that part turn by nothing
    const float * out = (const float *) y->data;
    rope.freqs.assign((first + n_dims)/2, 0.0f);
    for (int i = 0; i < n_dims/2; ++i) {
        const float c = out[neox ? i            : 2*i    ];
        const float s = out[neox ? i + n_dims/2 : 2*i + 1];
        rope.freqs[first/2 + i] = std::atan2(s, c);
        rope.scale = std::hypot(s, c);
    }
    if (first > 0 && std::fabs(rope.scale - 1.0f) > 1e-5f) {
        return {};
    }
    rope.type  = neox ? TCA_ROPE_NEOX : TCA_ROPE_NORM;
    rope.n_rot = first + n_dims;
    return rope;
}

std::vector<llama_tca_rope> llama_tca_ropes(const llama_model & model, const llama_cparams & cparams) {
    std::vector<llama_tca_rope> ropes(model.hparams.n_layer_all);

    llama_cparams few = cparams;
    few.n_ctx       = 256;
    few.n_ctx_seq   = 256;
    few.n_seq_max   = 1;
    few.n_ubatch    = 1;
    few.offload_kqv = false;
    few.ctx_other   = nullptr;
    const llama_memory_ptr         memory = llama_tca_stock_memory(model, few);
    const llama_memory_context_ptr mctx   = memory->init_full();

    llama_batch_allocr balloc(model.hparams.n_pos_per_embd());
    llm_graph_result   res(std::max<int64_t>(8192, 64*(int64_t) model.n_tensors()));
    llama_adapter_cvec cvec;
    llama_adapter_loras loras;
    llama_cross        cross;

    few.n_ctx       = cparams.n_ctx;
    few.n_ctx_seq   = cparams.n_ctx_seq;  // frequency factors depend on it
    few.offload_kqv = true;               // else nodes are given to backends of a scheduler, which is not there
    llm_graph_params params = {};
    params.arch        = model.arch;
    params.hparams     = model.hparams;
    params.cparams     = few;
    params.ubatch      = balloc.ubatch_reserve(1, 1);
    params.gtype       = LLM_GRAPH_TYPE_DEFAULT;
    params.cvec        = &cvec;
    params.loras       = &loras;
    params.mctx        = mctx.get();
    params.cross       = &cross;
    params.prec_policy = &model.prec_policy;
    params.n_outputs   = 1;
    params.res         = &res;
    ggml_cgraph * gf = model.build_graph(params);

    for (int i = 0; i < ggml_graph_n_nodes(gf); ++i) {
        const ggml_tensor * t = ggml_graph_node(gf, i);
        int il = -1;
        if (t->op == GGML_OP_SET_ROWS && t->view_src && sscanf(t->view_src->name, "cache_k_l%d", &il) == 1) {
            ropes.at(il) = rope_of(t->src[0]);
        }
    }
    return ropes;
}
