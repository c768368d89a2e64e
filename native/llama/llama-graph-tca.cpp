#include "llama-graph-tca.h"

#include "llama-memory-tca.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-memory-hybrid.h"

#include <stdexcept>

llm_graph_input_attn_tca::llm_graph_input_attn_tca(const llama_hparams & hparams, const llama_cparams & cparams,
        const llama_memory_tca_context * mctx) : llm_graph_input_attn_kv(hparams, cparams, nullptr), mctx_tca(mctx) {
}

void llm_graph_input_attn_tca::set_input(const llama_ubatch * /*ubatch*/) {
    for (ggml_tensor * t : { self_k_rot, self_v_rot }) {
        if (t && t->buffer) {
            ggml_backend_tensor_set(t, mctx_tca->get_memory()->get_store().hadamard_matrix(t->ne[0]).data(), 0, ggml_nbytes(t));
        }
    }
    if (!desc->buffer) {
        return;
    }
    GGML_ASSERT(ggml_backend_buffer_is_host(desc->buffer));

    const llama_tca_store & store = mctx_tca->get_memory()->get_store();

    int32_t * d = (int32_t *) desc->data;
    for (const auto & segment : mctx_tca->get_step()) {
        for (uint32_t il = 0; il < store.full_plan().n_layer(); ++il) {
            for (const auto & s : segment) {
                store.plan(s.stream).describe(il, store.first_slot(s.stream, il), s.seg, s.token, s.pos, d);
                d += store.full_plan().n_head_kv()*TCA_DESC_SIZE;
            }
        }
    }
}

bool llm_graph_input_attn_tca::can_reuse(const llm_graph_params & params) {
    mctx_tca = params.res->mctx_tca;

    return desc->ne[2] == mctx_tca->n_entries(params.ubatch) && attn_desc->ne[2] == params.ubatch.n_seqs &&
        n_segments == mctx_tca->n_segments(params.ubatch) && compacts == mctx_tca->compacts();
}

static std::unique_ptr<llm_graph_input_attn_tca> make_input(const llm_graph_context & graph) {
    const llama_memory_tca_context * mctx = graph.res->mctx_tca;
    if (mctx == nullptr) {
        return nullptr;
    }
    const llama_tca_store & store = mctx->get_memory()->get_store();
    const tca_plan  & plan  = store.full_plan();

    auto inp = std::make_unique<llm_graph_input_attn_tca>(graph.hparams, graph.cparams, mctx);

    inp->n_segments = mctx->n_segments(graph.ubatch);
    inp->compacts   = mctx->compacts();
    inp->desc = ggml_new_tensor_4d(graph.ctx0, GGML_TYPE_I32, TCA_DESC_SIZE, plan.n_head_kv(), mctx->n_entries(graph.ubatch),
            (int64_t) inp->n_segments*plan.n_layer());
    ggml_set_input(inp->desc);
    ggml_set_name(inp->desc, "tca_desc");
    inp->attn_desc = inp->desc->ne[2] == graph.ubatch.n_seqs ? inp->desc :
        ggml_view_4d(graph.ctx0, inp->desc, TCA_DESC_SIZE, plan.n_head_kv(), graph.ubatch.n_seqs, inp->desc->ne[3],
                inp->desc->nb[1], inp->desc->nb[2], inp->desc->nb[3], 0);

    if (store.hadamard_k() > 0) {
        inp->self_k_rot = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, store.hadamard_k(), store.hadamard_k());
        ggml_set_input(inp->self_k_rot);
        ggml_set_name(inp->self_k_rot, "attn_inp_k_rot");
    }
    if (store.hadamard_v() > 0) {
        inp->self_v_rot = ggml_new_tensor_2d(graph.ctx0, GGML_TYPE_F32, store.hadamard_v(), store.hadamard_v());
        ggml_set_input(inp->self_v_rot);
        ggml_set_name(inp->self_v_rot, "attn_inp_v_rot");
    }
    return inp;
}

llm_graph_input_attn_kv * llm_tca_build_attn_inp(const llm_graph_context & graph) {
    auto inp = make_input(graph);
    return inp ? static_cast<llm_graph_input_attn_kv *>(graph.res->add_input(std::move(inp))) : nullptr;
}

namespace {
class llm_graph_input_attn_k_tca : public llm_graph_input_attn_k {
public:
    llm_graph_input_attn_k_tca(const llm_graph_context & graph, std::unique_ptr<llm_graph_input_attn_tca> inner) :
        llm_graph_input_attn_k(graph.hparams, graph.cparams, nullptr), inner(std::move(inner)) {}

    void set_input(const llama_ubatch * ubatch) override { inner->set_input(ubatch); }
    bool can_reuse(const llm_graph_params & params) override { return inner->can_reuse(params); }

    const std::unique_ptr<llm_graph_input_attn_tca> inner;
};

class llm_graph_input_mem_hybrid_tca : public llm_graph_input_mem_hybrid {
public:
    using llm_graph_input_mem_hybrid::llm_graph_input_mem_hybrid;

    void set_input(const llama_ubatch * ubatch) override {
        inp_attn->set_input(ubatch);
        inp_rs->mctx = mctx->get_recr();
        inp_rs->set_input(ubatch);
    }

    bool can_reuse(const llm_graph_params & params) override {
        mctx = static_cast<const llama_memory_hybrid_context *>(params.mctx);
        const llama_memory_recurrent_context * recr = mctx->get_recr();
        const int64_t n_rs = recr->get_n_rs(), n_seqs = params.ubatch.n_seqs;
        return inp_attn->can_reuse(params) && inp_rs->s_copy->ne[0] == n_rs && inp_rs->s_copy_main->ne[0] == n_seqs &&
            inp_rs->s_copy_extra->ne[0] == n_rs - n_seqs && inp_rs->head == recr->get_head() && inp_rs->rs_z == recr->get_rs_z();
    }
};
}  // namespace

llm_graph_input_attn_k * llm_tca_build_attn_inp_k(const llm_graph_context & graph) {
    auto inner = make_input(graph);
    if (inner == nullptr) {
        return nullptr;
    }
    auto inp = std::make_unique<llm_graph_input_attn_k_tca>(graph, std::move(inner));
    return static_cast<llm_graph_input_attn_k *>(graph.res->add_input(std::move(inp)));
}

llm_graph_input_attn_kv * llm_tca_attn_inp_of(llm_graph_input_attn_k * inp, ggml_tensor * v_mla) {
    auto * inp_tca = dynamic_cast<llm_graph_input_attn_k_tca *>(inp);
    if (inp_tca == nullptr) {
        return nullptr;
    }
    inp_tca->inner->v_mla = v_mla;
    return inp_tca->inner.get();
}

llm_graph_input_mem_hybrid * llm_tca_build_inp_mem_hybrid(const llm_graph_context & graph, std::unique_ptr<llm_graph_input_rs> & rs) {
    auto attn = make_input(graph);
    if (attn == nullptr) {
        return nullptr;
    }
    auto inp = std::make_unique<llm_graph_input_mem_hybrid_tca>(graph.cparams, std::move(attn), std::move(rs),
            static_cast<const llama_memory_hybrid_context *>(graph.mctx));
    return static_cast<llm_graph_input_mem_hybrid *>(graph.res->add_input(std::move(inp)));
}

llm_graph_input_attn_kv * llm_tca_attn_inp_of_layer(const llm_graph_context & graph, int il) {
    const llama_memory_tca_context * mctx = graph.res->mctx_tca;
    if (mctx == nullptr || !mctx->get_memory()->get_store().full_plan().layer_stored(il)) {
        return nullptr;
    }
    for (const llm_graph_input_ptr & input : graph.res->inputs) {
        if (auto * inp = dynamic_cast<llm_graph_input_attn_tca *>(input.get())) {
            return inp;
        }
    }
    return llm_tca_build_attn_inp(graph);
}

ggml_tensor * llm_tca_build_attn(const llm_graph_context & graph, llm_graph_input_attn_kv * inp_any, ggml_tensor * q,
        ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    auto * inp = dynamic_cast<llm_graph_input_attn_tca *>(inp_any);
    if (inp == nullptr) {
        return nullptr;
    }
    if (kq_b) {
        throw std::runtime_error("tca: attention biases are not supported; load with --override-kv tca.enabled=bool:false");
    }

    ggml_context * ctx = graph.ctx0;
    ggml_cgraph  * gf  = graph.gf;

    const llama_tca_store        & store = inp->mctx_tca->get_memory()->get_store();
    const tca_plan         & plan  = store.full_plan();
    const llama_tca_store::layer & layer = store.get_layer(il);

    const float softcap = graph.hparams.attn_soft_cap ? graph.hparams.f_attn_logit_softcapping : 0.0f;
    const bool  split   = tca_attn_splits(graph.ubatch.n_seq_tokens, q->ne[1], plan.n_head_kv());

    ggml_tensor * cur  = nullptr;
    ggml_tensor * rows = layer.k;  // as the nodes before left it: what a segment reads is the result of the one before
    for (uint32_t i = 0; i < inp->n_segments; ++i) {
        const int row = i*plan.n_layer() + il;

        ggml_tensor * k = tca_build_append(ctx, rows, layer.v, layer.pos, k_cur, v_cur, inp->desc, row);
        graph.cb(k, "tca_append", il);
        ggml_build_forward_expand(gf, k);

        cur = split ?
            tca_build_attn_split(ctx, q, k, layer.v, inp->attn_desc, row, kq_scale, softcap, store.n_chunks(il), cur, sinks) :
            tca_build_attn      (ctx, q, k, layer.v, inp->attn_desc, row, kq_scale, softcap, cur, sinks);
        graph.cb(cur, "tca_attn", il);
        ggml_build_forward_expand(gf, cur);

        if (inp->compacts && plan.layer_compacts(il)) {
            k = tca_build_compact(ctx, k, layer.v, layer.pos, inp->desc, row, layer.tables, q, kq_scale, softcap);
            graph.cb(k, "tca_compact", il);
            ggml_build_forward_expand(gf, k);
        }
        rows = k;
    }
    if (inp->v_mla) {
        cur = ggml_mul_mat(ctx, inp->v_mla, ggml_permute(ctx, cur, 0, 2, 1, 3));
        cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3));
        ggml_build_forward_expand(gf, cur);
    }
    return ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]);
}
