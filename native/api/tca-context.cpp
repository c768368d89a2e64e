// C API: figures of a context.
#include "tca-error.h"

#include "llama/llama-memory-tca.h"
#include "llama/llama-model-tca.h"
#include "llama/tca-rope.h"

#include "llama-context.h"
#include "llama-model.h"
#include "llama.h"

#include <algorithm>

static const llama_memory_tca * memory_of(const llama_context * ctx) {
    const auto * memory = ctx == nullptr ? nullptr : llama_tca_memory_of(ctx->get_memory());
    if (memory == nullptr) {
        tca_fail(TCA_NO_BUDGETS, "this context uses the stock KV cache");
    }
    return memory;
}

tca_status tca_context_get_info(const llama_context * ctx, tca_context_info * info) {
    *info = {};
    if (const llama_memory_tca * memory = memory_of(ctx)) {
        const llama_tca_store & store = memory->get_store();
        info->active         = true;
        info->n_layer        = store.full_plan().n_layer();
        info->n_head_kv      = store.full_plan().n_head_kv();
        info->n_stream       = store.n_stream();
        info->n_ctx_seq      = store.full_plan().n_ctx_seq;
        info->kv_bytes       = store.bytes();
        info->kv_bytes_dense = store.bytes_dense();
    }
    if (ctx != nullptr && ctx->get_memory() != nullptr) {
        const llama_tca_bytes bytes = llama_tca_count_bytes(*ctx->get_memory());
        info->memory_bytes       = bytes.allocated;
        info->memory_bytes_stock = bytes.stock;
    }
    return TCA_OK;
}

static tca_status check_region(const llama_memory_tca * memory, uint32_t layer, int32_t seq_id, uint32_t head) {
    if (memory == nullptr) {
        return TCA_ERR_ARGUMENT;
    }
    const llama_tca_store & store = memory->get_store();
    if (layer >= store.full_plan().n_layer() || head >= store.full_plan().n_head_kv() || seq_id < 0 || seq_id >= (int32_t) store.n_stream()) {
        return tca_fail(TCA_ERR_ARGUMENT, "layer " + std::to_string(layer) + ", sequence " + std::to_string(seq_id) + ", KV head " +
                std::to_string(head) + " does not exist in this context");
    }
    return TCA_OK;
}

tca_status tca_context_sequence(const llama_context * ctx, int32_t seq_id, uint32_t * n_tokens, uint32_t * n_groups) {
    const llama_memory_tca * memory = memory_of(ctx);
    const tca_status status = check_region(memory, 0, seq_id, 0);
    if (status == TCA_OK) {
        *n_tokens = memory->get_stream(seq_id).state.n_tokens;
        *n_groups = memory->get_stream(seq_id).state.n_groups;
    }
    return status;
}

int64_t tca_context_region_length(const llama_context * ctx, uint32_t layer, int32_t seq_id, uint32_t head) {
    const llama_memory_tca * memory = memory_of(ctx);
    const tca_status status = check_region(memory, layer, seq_id, head);
    return status == TCA_OK ? memory->get_store().full_plan().length(layer, head, memory->get_stream(seq_id).state) : (int64_t) status;
}

int64_t tca_context_positions(llama_context * ctx, uint32_t layer, int32_t seq_id, uint32_t head, int32_t * positions, int64_t n_max) {
    const int64_t n = tca_context_region_length(ctx, layer, seq_id, head);
    if (n <= 0) {
        return n;
    }
    llama_synchronize(ctx);
    const llama_memory_tca * memory = memory_of(ctx);
    memory->do_pending();
    const llama_tca_store & store = memory->get_store();
    const int64_t first = store.first_slot(seq_id, layer) + store.plan(seq_id).offset(layer, head);
    ggml_backend_tensor_get(store.get_layer(layer).pos, positions, first*sizeof(int32_t), std::min(n, n_max)*sizeof(int32_t));
    return n;
}

tca_status tca_context_get_shape(const llama_context * ctx, tca_model_shape * shape, bool * stored, uint32_t n_max) {
    return tca_model_get_shape(&ctx->get_model(), shape, stored, n_max);
}

tca_status tca_context_rope(const llama_context * ctx, uint32_t layer, tca_rope * rope, float * freqs, int32_t n_max) {
    const llama_model & model = ctx->get_model();
    if (layer >= model.hparams.n_layer_all) {
        return tca_fail(TCA_ERR_ARGUMENT, "layer " + std::to_string(layer) + " does not exist in this model");
    }
    const std::string reason = model.hparams.no_alloc ? "its weights are not loaded" : llama_tca_unsupported(model);
    if (!reason.empty()) {
        return tca_fail(TCA_ERR_UNSUPPORTED, "TCA cannot run this model: " + reason);
    }
    const llama_tca_rope found = llama_tca_ropes(model, ctx->get_cparams()).at(layer);
    if ((int32_t) found.freqs.size() > n_max) {
        return tca_fail(TCA_ERR_ARGUMENT, "the frequency buffer needs " + std::to_string(found.freqs.size()) + " entries");
    }
    std::copy(found.freqs.begin(), found.freqs.end(), freqs);
    *rope = { found.type, found.n_rot, found.scale, freqs };
    return TCA_OK;
}
