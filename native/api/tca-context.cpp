// C API: figures of a context.
#include "tca-error.h"

#include "llama/llama-kv-cache-tca-iswa.h"
#include "llama/llama-model-tca.h"
#include "llama/tca-rope.h"

#include "llama-context.h"
#include "llama-model.h"
#include "llama.h"

#include <algorithm>

static const llama_kv_cache_tca * cache_of(const llama_context * ctx) {
    const auto * kv = ctx == nullptr ? nullptr : llama_tca_cache_of(ctx->get_memory());
    if (kv == nullptr) {
        tca_fail(TCA_NO_BUDGETS, "this context uses the stock KV cache");
    }
    return kv;
}

tca_status tca_context_get_info(const llama_context * ctx, tca_context_info * info) {
    *info = {};
    if (const llama_kv_cache_tca * kv = cache_of(ctx)) {
        info->active         = true;
        info->n_layer        = kv->get_plan().n_layer();
        info->n_head_kv      = kv->get_plan().n_head_kv();
        info->n_stream       = kv->n_stream();
        info->n_ctx_seq      = kv->get_plan().n_ctx_seq;
        info->kv_bytes       = kv->bytes();
        info->kv_bytes_dense = kv->bytes_dense();
    }
    if (ctx != nullptr && ctx->get_memory() != nullptr) {
        const llama_tca_bytes bytes = llama_tca_count_bytes(*ctx->get_memory());
        info->memory_bytes       = bytes.allocated;
        info->memory_bytes_stock = bytes.stock;
    }
    return TCA_OK;
}

static tca_status check_region(const llama_kv_cache_tca * kv, uint32_t layer, int32_t seq_id, uint32_t head) {
    if (kv == nullptr) {
        return TCA_ERR_ARGUMENT;
    }
    if (layer >= kv->get_plan().n_layer() || head >= kv->get_plan().n_head_kv() || seq_id < 0 || seq_id >= (int32_t) kv->n_stream()) {
        return tca_fail(TCA_ERR_ARGUMENT, "layer " + std::to_string(layer) + ", sequence " + std::to_string(seq_id) + ", KV head " +
                std::to_string(head) + " does not exist in this context");
    }
    return TCA_OK;
}

tca_status tca_context_sequence(const llama_context * ctx, int32_t seq_id, uint32_t * n_tokens, uint32_t * n_groups) {
    const llama_kv_cache_tca * kv = cache_of(ctx);
    const tca_status status = check_region(kv, 0, seq_id, 0);
    if (status == TCA_OK) {
        *n_tokens = kv->get_stream(seq_id).state.n_tokens;
        *n_groups = kv->get_stream(seq_id).state.n_groups;
    }
    return status;
}

int64_t tca_context_region_length(const llama_context * ctx, uint32_t layer, int32_t seq_id, uint32_t head) {
    const llama_kv_cache_tca * kv = cache_of(ctx);
    const tca_status status = check_region(kv, layer, seq_id, head);
    return status == TCA_OK ? kv->get_plan().length(layer, head, kv->get_stream(seq_id).state) : (int64_t) status;
}

int64_t tca_context_positions(llama_context * ctx, uint32_t layer, int32_t seq_id, uint32_t head, int32_t * positions, int64_t n_max) {
    const int64_t n = tca_context_region_length(ctx, layer, seq_id, head);
    if (n <= 0) {
        return n;
    }
    llama_synchronize(ctx);
    const llama_kv_cache_tca * kv = cache_of(ctx);
    kv->copy_pending_streams();
    const tca_plan & plan = kv->get_plan();
    const int64_t first = seq_id*plan.slots(layer) + plan.offset(layer, head);
    ggml_backend_tensor_get(kv->get_layer(layer).pos, positions, first*sizeof(int32_t), std::min(n, n_max)*sizeof(int32_t));
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
