#include "llama-model-tca.h"

#include "budgets/tca-source.h"
#include "llama-memory-tca.h"
#include "tca-archs.h"
#include "tca-cpu-backend.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-memory-hybrid.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <stdexcept>

const char * llama_tca_layer_kept(const llama_model & model, uint32_t il) {
    const llama_hparams & hparams = model.hparams;
    if (il >= hparams.n_layer()) {
        return "no part in the forward pass (a prediction layer)";
    }
    if (hparams.is_recr(il) && model.arch != LLM_ARCH_FALCON_H1) {  // whose layers are both
        return "no attention (a recurrent layer)";
    }
    if (hparams.n_head_kv(il) == 0) {
        return "no attention";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.is_swa(il)) {
        return "sliding-window attention";
    }
    return nullptr;
}

std::string llama_tca_unsupported(const llama_model & model) {
    const llama_hparams  & hparams = model.hparams;
    const tca_arch_entry * entry   = tca_arch_find(model.arch);

    if (entry == nullptr) {
        return "architecture '" + model.arch_name() + "' is not known to the ragged cache";
    }
    if (entry->inputs == TCA_INPUT_NONE) {
        return "architecture '" + model.arch_name() + "': " + entry->remark;
    }
    const bool    slides = hparams.swa_type != LLAMA_SWA_TYPE_NONE;
    const uint8_t input  = llm_arch_is_hybrid(model.arch) && !slides ? TCA_INPUT_HYBRID : slides ? TCA_INPUT_ISWA :
        hparams.is_mla() ? TCA_INPUT_LATENT : TCA_INPUT_KV;
    if (!(entry->inputs & input) || hparams.swa_type == LLAMA_SWA_TYPE_SYMMETRIC) {
        return "architecture '" + model.arch_name() + "' with this kind of attention (sliding-window, recurrent or latent) is not served";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return "it uses ALiBi position biases";
    }
    if (!hparams.causal_attn) {
        return "its attention is not causal";
    }
    int64_t first = -1;
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (llama_tca_layer_kept(model, il) != nullptr) {
            continue;
        }
        if (!hparams.has_kv(il)) {
            return "layer " + std::to_string(il) + " reads the keys and values of an earlier one, which is not served yet";
        }
        first = first < 0 ? il : first;
        if (hparams.n_head_kv(il) != hparams.n_head_kv(first)) {
            return "its layers have different numbers of KV heads";
        }
    }
    if (first < 0) {
        return "it has no layer with full attention, so there is nothing to evict";
    }
    return "";
}

llama_tca_shape llama_tca_shape_of(const llama_model & model) {
    const llama_hparams & hparams = model.hparams;

    llama_tca_shape shape = { hparams.n_layer_all, 0, 0, 0, std::vector<bool>(hparams.n_layer_all) };
    for (uint32_t il = 0; il < shape.n_layer; ++il) {
        shape.stored[il] = llama_tca_layer_kept(model, il) == nullptr;
        if (shape.stored[il]) {
            shape.n_head_kv  = hparams.n_head_kv(il);
            shape.head_dim_k = hparams.n_embd_head_k(il);
            shape.head_dim_v = hparams.n_embd_head_v(il);
        }
    }
    return shape;
}

std::string llama_tca_misfit(const llama_model & model, const tca_budgets & budgets) {
    const llama_tca_shape shape = llama_tca_shape_of(model);
    if (budgets.n_layer != shape.n_layer || budgets.n_head_kv != shape.n_head_kv) {
        return format("tca.head_config is %u x %u, this model has %u layers of %u KV heads", budgets.n_layer, budgets.n_head_kv,
                shape.n_layer, shape.n_head_kv);
    }
    for (uint32_t il = 0; il < shape.n_layer; ++il) {
        const int32_t config = budgets.head_config[(size_t) il*shape.n_head_kv];
        if (shape.stored[il] == (config == TCA_HEAD_SLIDING)) {
            const char * kept = llama_tca_layer_kept(model, il);
            return format("tca.head_config[%u] is %d, but layer %u of this model has %s, so it must %sbe -2", il*shape.n_head_kv,
                    config, il, kept ? kept : "full attention", kept ? "" : "not ");
        }
    }
    if (budgets.n_probe > 0 && budgets.n_probe != shape.head_dim_k) {
        return format("tca.probe has %u entries a head, this model has keys of %u", budgets.n_probe, shape.head_dim_k);
    }
    return "";
}

void llama_tca_load(llama_model & model, llama_model_loader & ml, const std::string & path) {
    const auto it = ml.kv_overrides.find("tca.enabled");
    const llama_model_kv_override * forced = it == ml.kv_overrides.end() ? nullptr : &it->second;
    if (forced && forced->tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
        throw std::runtime_error("tca.enabled must be overridden with a bool, as in --override-kv tca.enabled=bool:false");
    }
    if (forced && !forced->val_bool) {
        LLAMA_LOG_INFO("tca: off by override (tca.enabled=false), using the stock KV cache\n");
        return;
    }

    const std::string     reason = llama_tca_unsupported(model);
    const llama_tca_shape shape  = llama_tca_shape_of(model);

    tca_budgets_data budgets;
    bool             enabled = true;
    std::string      problem;
    tca_source       source;
    if (!tca_source_find(ml.metadata, path, source, problem)) {
        throw std::runtime_error(problem + " (load without TCA: --override-kv tca.enabled=bool:false)");
    }
    if (!source.note.empty()) {
        LLAMA_LOG_WARN("tca: %s\n", source.note.c_str());
    }
    const tca_status status = tca_budgets_from_gguf(source.gguf, shape.n_layer, shape.n_head_kv, budgets, enabled, problem);
    if (!source.path.empty() && !problem.empty()) {
        problem = source.path + ": " + problem;
    }

    if (status == TCA_NO_BUDGETS) {
        if (forced) {
            throw std::runtime_error("tca.enabled=true, but the file holds no budgets; run: python -m tca_gguf embed-budgets MODEL");
        }
        return;
    }
    if (!forced && !enabled) {
        LLAMA_LOG_INFO("tca: tca.enabled is false in the file, using the stock KV cache\n");
        return;
    }

    if (!reason.empty()) {
        throw std::runtime_error("the file carries tca.* budgets, but TCA cannot run this model: " + reason +
                "; load it with --override-kv tca.enabled=bool:false, or run strip-budgets");
    }
    if (status != TCA_OK) {
        throw std::runtime_error(problem + " (load without TCA: --override-kv tca.enabled=bool:false)");
    }
    const std::string misfit = llama_tca_misfit(model, budgets.view());
    if (!misfit.empty()) {
        throw std::runtime_error(misfit + "; run embed-budgets again (load without TCA: --override-kv tca.enabled=bool:false)");
    }
    model.tca = std::make_shared<llama_tca_model>(llama_tca_model { std::move(budgets), source.path });
}

// Empty: contexts of this kind use the ragged cache; else why they use the stock one. Before the sizes of the context are rounded.
static std::string stock_cache_because(const llama_model & model, const llama_cparams & cparams) {
    if (cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return "it is no default context (a draft of prediction layers)";
    }
    if (cparams.embeddings) {
        return "it makes embeddings, which want the whole text";
    }
    if (!cparams.causal_attn) {
        return "its attention is not causal";
    }
    if (cparams.n_seq_max > 1) {
        const bool     shared = cparams.kv_unified;
        const uint32_t n_ctx  = GGML_PAD(cparams.n_ctx, 256);
        const tca_plan plan(model.tca->budgets, shared ? n_ctx : GGML_PAD(n_ctx/cparams.n_seq_max, 256));
        int64_t slots = 0, slots_dense = 0;
        for (uint32_t il = 0; il < plan.n_layer(); ++il) {
            slots       += llama_tca_store_slots(plan, il, n_ctx, cparams.n_seq_max, shared);
            slots_dense += plan.layer_stored(il) ? (int64_t) plan.n_head_kv()*(shared ? n_ctx : plan.n_ctx_seq*cparams.n_seq_max) : 0;
        }
        if (slots >= slots_dense) {
            return format("with %u tokens for %u sequences the windows alone are as large", n_ctx, cparams.n_seq_max);
        }
    }
    return "";
}

void llama_tca_adjust_cparams(const llama_model & model, llama_cparams & cparams) {
    // a hybrid's recurrent part would take that many copies of its state: what the caller asked for stays
    if (model.tca && !llm_arch_is_hybrid(model.arch) && stock_cache_because(model, cparams).empty()) {
        cparams.n_rs_seq = std::max(cparams.n_rs_seq, model.tca->budgets.rollback);
    }
}

// The stock cache sizes its sliding-window part for the window and one micro-batch. Told of a longer micro-batch it also holds
// the window before the newest `rollback` tokens, which can always be taken back. Beyond those there are checkpoints: neither a
// full-size sliding-window cache (swa_full, llama.cpp's default) nor room for longer tails would be worth its memory.
static llama_tca_rest sliding_rest(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const tca_budgets_data & b = model.tca->budgets;
    const bool     unified = cparams.kv_unified;  // the stock parts of a graph make their masks by it
    const uint32_t n_tokens = cparams.n_ctx_seq*(unified ? cparams.n_seq_max : 1);  // sequences that share a context may hold more than n_ctx
    const uint64_t tails    = (uint64_t) b.rollback*(unified ? cparams.n_seq_max : 1);
    auto memory = std::make_unique<llama_kv_cache_iswa>(model, params.type_k, params.type_v, !cparams.flash_attn, cparams.offload_kqv,
            /* swa_full */ false, unified, n_tokens, cparams.n_seq_max, std::min<uint64_t>(cparams.n_ubatch + tails, n_tokens), 1,
            nullptr, [&model](int32_t il) { return model.hparams.is_swa(il); }, nullptr, nullptr);
    llama_tca_rest rest;
    rest.sliding    = memory->get_swa();
    rest.n_swa      = model.hparams.n_swa;
    rest.sequential = !unified && cparams.n_seq_max > 1;
    // One micro-batch at a time: to prepare several at once, as llama.cpp does, forgets cells that the first of them still sees
    // (llama_kv_cache::prepare of the pin puts back the cells that it gave away, but not those that were purged with them).
    rest.take = [iswa = memory.get()](const llama_ubatch & ubatch) -> llama_memory_context_ptr {
        auto sinfos_base = iswa->get_base()->prepare({ ubatch });
        auto sinfos_swa  = iswa->get_swa() ->prepare({ ubatch });
        if (sinfos_base.empty() || sinfos_swa.empty()) {
            return std::make_unique<llama_kv_cache_iswa_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
        return std::make_unique<llama_kv_cache_iswa_context>(iswa, std::move(sinfos_base), std::move(sinfos_swa), std::vector<llama_ubatch>{ ubatch });
    };
    const uint64_t n_cells = GGML_PAD(std::min<uint64_t>(cparams.n_ctx_seq, (uint64_t) rest.n_swa*(unified ? cparams.n_seq_max : 1) + cparams.n_ubatch), 256);
    rest.n_cells_stock = n_cells*(unified ? 1 : cparams.n_seq_max);
    rest.memory  = std::move(memory);
    return rest;
}

// The recurrent layers of a hybrid model. The attention child has cells and no layers.
static llama_tca_rest recurrent_rest(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const llama_hparams & hparams = model.hparams;
    llama_tca_rest rest;
    rest.memory = std::make_unique<llama_memory_hybrid>(model, params.type_k, params.type_v, !cparams.flash_attn, cparams.n_ctx_seq, 1,
            hparams.n_swa, hparams.swa_type, GGML_TYPE_F32, GGML_TYPE_F32, std::max(1u, cparams.n_seq_max), cparams.n_seq_max,
            cparams.n_rs_seq, cparams.offload_kqv, /* unified */ false,
            [](int32_t) { return false; }, [&hparams](int32_t il) { return (uint32_t) il < hparams.n_layer() && hparams.is_recr(il); });
    return rest;
}

// The one line that says which cache is in use. A warning, because llama.cpp's programs show no other level by default, and a
// user who does not see it cannot tell the two caches apart.
static void say_on(const llama_model & model, const llama_memory_tca & memory, const llama_cparams & cparams, const llama_memory_params & params) {
    const llama_tca_store       & store = memory.get_store();
    const tca_plan        & plan  = store.full_plan();
    const llama_tca_bytes   bytes = llama_tca_count_bytes(memory);

    uint32_t n_stored = 0;
    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        n_stored += store.get_layer(il).k != nullptr;
    }
    const std::string slots = store.n_stream() == 1 ? format("%u tokens", plan.n_ctx_seq) : cparams.kv_unified ?
        format("%u tokens that %u sequences share", plan.n_ctx_seq, store.n_stream()) :
        format("%u sequences of %u tokens each", store.n_stream(), plan.n_ctx_seq);
    const tca_cpu_functions * functions = tca_cpu_functions_get();
    const std::string cpu = functions ? format("%s (%s)", functions->simd(), tca_cpu_library().c_str()) : "none";
    LLAMA_LOG_WARN("tca: ragged KV cache on: %.2f MiB instead of %.2f MiB dense (%.1f%%) for %s; K %s, V %s; %u of %u layers have "
            "budgets%s%s; metric %s, window %u, sinks %u; CPU kernels %s\n", bytes.allocated/1048576.0, bytes.stock/1048576.0,
            100.0*bytes.allocated/bytes.stock, slots.c_str(), ggml_type_name(params.type_k), ggml_type_name(params.type_v),
            n_stored, plan.n_layer(), model.tca->source.empty() ? "" : " from ", model.tca->source.c_str(),
            plan.budgets.metric.c_str(), plan.budgets.window, plan.budgets.sinks, cpu.c_str());
}

static thread_local bool want_stock = false;  // create_memory() is asked for a stock memory by us

llama_memory_ptr llama_tca_stock_memory(const llama_model & model, const llama_cparams & cparams) {
    llama_memory_params params = {};
    params.type_k   = GGML_TYPE_F16;
    params.type_v   = GGML_TYPE_F16;
    params.ctx_type = LLAMA_CONTEXT_TYPE_DEFAULT;

    want_stock = true;
    try {
        llama_memory_ptr memory { model.create_memory(params, cparams) };
        want_stock = false;
        return memory;
    } catch (...) {
        want_stock = false;
        throw;
    }
}

llama_memory_i * llama_tca_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && llama_tca_memory_of(params.mem_other) != nullptr) {
        throw std::runtime_error("tca: a Gemma 4 assistant reads the KV cache of its target, and that has the ragged one; load the target "
                "with --override-kv tca.enabled=bool:false, or use no assistant");
    }
    if (!model.tca || want_stock) {
        return nullptr;
    }
    const std::string reason = stock_cache_because(model, cparams);
    if (!reason.empty()) {
        LLAMA_LOG_INFO("tca: this context uses the stock KV cache: %s\n", reason.c_str());
        return nullptr;
    }
    llama_tca_rest rest;
    if (llm_arch_is_hybrid(model.arch)) {
        rest = recurrent_rest(model, params, cparams);
    } else if (model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        rest = sliding_rest(model, params, cparams);
    }
    auto memory = std::make_unique<llama_memory_tca>(model, cparams, params.type_k, params.type_v, std::move(rest), params.swa_full);
    if (!model.hparams.no_alloc) {
        say_on(model, *memory, cparams, params);
    }
    return memory.release();
}

uint32_t llama_tca_graph_nodes(const llama_model & model, uint32_t n_tokens) {
    if (!model.tca) {
        return 0;
    }
    const tca_plan plan(model.tca->budgets, n_tokens);
    return 8*plan.n_layer()*plan.max_segments(n_tokens);
}
