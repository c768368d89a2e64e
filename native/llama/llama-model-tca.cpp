#include "llama-model-tca.h"

#include "llama-kv-cache-tca-iswa.h"

#include "llama-arch.h"
#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <stdexcept>

// Architectures whose graph uses the plain KV attention input for every layer and rotates keys, if at all, with the model's
// own RoPE parameters. Checked against src/models of the pin; see native/README.md, "bumping the pin".
static bool arch_has_plain_attention(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_FALCON:
        case LLM_ARCH_BAICHUAN:
        case LLM_ARCH_GPTNEOX:
        case LLM_ARCH_STARCODER2:
        case LLM_ARCH_STABLELM:
        case LLM_ARCH_QWEN:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN2MOE:
        case LLM_ARCH_QWEN3:
        case LLM_ARCH_QWEN3MOE:
        case LLM_ARCH_PHI2:
        case LLM_ARCH_PHI3:
        case LLM_ARCH_CODESHELL:
        case LLM_ARCH_ORION:
        case LLM_ARCH_INTERNLM2:
        case LLM_ARCH_GEMMA:
        case LLM_ARCH_XVERSE:
        case LLM_ARCH_COMMAND_R:
        case LLM_ARCH_OLMO:
        case LLM_ARCH_OLMO2:
        case LLM_ARCH_OLMOE:
        case LLM_ARCH_NEMOTRON:
        case LLM_ARCH_EXAONE:
        case LLM_ARCH_ERNIE4_5:
        case LLM_ARCH_SEED_OSS:
        case LLM_ARCH_ARCEE:
        case LLM_ARCH_MISTRAL3:
            return true;
        default:
            return false;
    }
}

// The same for architectures that mix sliding-window and full attention over the iSWA attention input. Both kinds of layers
// rotate their keys (a full layer without RoPE would be un-rotated by mistake), and there are no attention sinks or biases.
static bool arch_has_iswa_attention(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_GEMMA2:
        case LLM_ARCH_GEMMA3:
            return true;
        default:
            return false;
    }
}

bool llama_tca_layer_slides(const llama_model & model, uint32_t il) {
    return model.hparams.swa_type != LLAMA_SWA_TYPE_NONE && model.hparams.is_swa(il);
}

std::string llama_tca_unsupported(const llama_model & model) {
    const llama_hparams & hparams = model.hparams;

    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        if (hparams.swa_type != LLAMA_SWA_TYPE_STANDARD || !arch_has_iswa_attention(model.arch)) {
            return "architecture '" + model.arch_name() + "' uses a kind of sliding-window attention that the ragged cache does not serve yet";
        }
        uint32_t n_full = 0;
        for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
            n_full += hparams.is_swa(il) ? 0 : 1;
        }
        if (n_full == 0) {
            return "every layer uses sliding-window attention, so there is nothing to evict";
        }
    } else if (!arch_has_plain_attention(model.arch)) {
        return "architecture '" + model.arch_name() + "' does not use, or is not known to use, the plain KV attention input";
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f) {
        return "it uses ALiBi position biases";
    }
    if (!hparams.causal_attn) {
        return "its attention is not causal";
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_MROPE || hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE || hparams.n_pos_per_embd() > 1) {
        return "it uses multi-dimensional RoPE";
    }
    if (hparams.is_mla()) {
        return "it uses multi-head latent attention";
    }
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!hparams.has_kv(il)) {
            return "layer " + std::to_string(il) + " has no KV cache of its own";
        }
        if (hparams.n_head_kv(il) != hparams.n_head_kv(0) || hparams.n_head_kv(il) == 0) {
            return "its layers have different numbers of KV heads";
        }
    }
    return "";
}

std::string llama_tca_misfit(const llama_model & model, const tca_budgets & budgets) {
    const uint32_t n_head_kv = budgets.n_head_kv;
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        const int32_t config = budgets.head_config[(size_t) il*n_head_kv];
        const bool    slides = llama_tca_layer_slides(model, il);
        if (slides != (config == TCA_HEAD_SLIDING)) {
            return format("tca.head_config[%u] is %d, but layer %u of this model has %s attention, so it must %sbe -2", il*n_head_kv,
                    config, il, slides ? "sliding-window" : "full", slides ? "" : "not ");
        }
        if (!slides && budgets.n_probe > 0 && budgets.n_probe != model.hparams.n_embd_head_k(il)) {
            return format("tca.probe has %u entries a head, layer %u of this model has keys of %u", budgets.n_probe, il,
                    model.hparams.n_embd_head_k(il));
        }
    }
    return "";
}

void llama_tca_load(llama_model & model, llama_model_loader & ml) {
    const auto it = ml.kv_overrides.find("tca.enabled");
    const llama_model_kv_override * forced = it == ml.kv_overrides.end() ? nullptr : &it->second;
    if (forced && forced->tag != LLAMA_KV_OVERRIDE_TYPE_BOOL) {
        throw std::runtime_error("tca.enabled must be overridden with a bool, as in --override-kv tca.enabled=bool:false");
    }
    if (forced && !forced->val_bool) {
        LLAMA_LOG_INFO("tca: off by override (tca.enabled=false), using the stock KV cache\n");
        return;
    }

    const uint32_t n_layer   = model.hparams.n_layer_all;
    const uint32_t n_head_kv = n_layer > 0 ? model.hparams.n_head_kv(0) : 0;

    tca_budgets_data budgets;
    bool             enabled = true;
    std::string      problem;
    const tca_status status = tca_budgets_from_gguf(ml.metadata, n_layer, n_head_kv, budgets, enabled, problem);

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

    const std::string reason = llama_tca_unsupported(model);
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
    model.tca = std::make_shared<llama_tca_model>(llama_tca_model { std::move(budgets) });
}

void llama_tca_adjust_cparams(const llama_model & model, llama_cparams & cparams) {
    if (model.tca && cparams.kv_unified) {
        if (cparams.n_seq_max > 1) {
            LLAMA_LOG_WARN("tca: %u sequences share n_ctx = %u in equal parts (kv_unified does not apply to the ragged cache); "
                    "use one sequence (-np 1) to give it the whole context\n", cparams.n_seq_max, cparams.n_ctx);
        }
        cparams.kv_unified = false;
    }
}

// The one line that says which cache is in use. A warning, because llama.cpp's programs show no other level by default, and a
// user who does not see it cannot tell the two caches apart.
static void say_on(const llama_memory_i & memory, const llama_memory_params & params) {
    const llama_kv_cache_tca & tca   = *llama_tca_cache_of(&memory);
    const tca_plan           & plan  = tca.get_plan();
    const llama_tca_bytes      bytes = llama_tca_count_bytes(memory);

    uint32_t n_stored = 0;
    for (uint32_t il = 0; il < plan.n_layer(); ++il) {
        n_stored += tca.get_layer(il).k != nullptr;
    }
    const std::string slots = tca.n_stream() > 1 ? format("%u sequences of %u tokens each", tca.n_stream(), plan.n_ctx_seq) :
        format("%u tokens", plan.n_ctx_seq);
    LLAMA_LOG_WARN("tca: ragged KV cache on: %.2f MiB instead of %.2f MiB dense (%.1f%%) for %s; K %s, V %s; %u of %u layers have "
            "budgets; metric %s, window %u, sinks %u\n", bytes.allocated/1048576.0, bytes.stock/1048576.0,
            100.0*bytes.allocated/bytes.stock, slots.c_str(), ggml_type_name(params.type_k), ggml_type_name(params.type_v),
            n_stored, plan.n_layer(), plan.budgets.metric.c_str(), plan.budgets.window, plan.budgets.sinks);
}

llama_memory_i * llama_tca_create_memory(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    if (!model.tca) {
        return nullptr;
    }
    if (params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        throw std::runtime_error("tca: only default contexts can use the ragged cache; load with --override-kv tca.enabled=bool:false");
    }
    if (!cparams.causal_attn) {
        throw std::runtime_error("tca: non-causal attention cannot use the ragged cache; load with --override-kv tca.enabled=bool:false");
    }
    llama_memory_i * memory;
    if (model.hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        memory = new llama_kv_cache_tca_iswa(model, cparams, params);
    } else {
        memory = new llama_kv_cache_tca(model, cparams, params.type_k, params.type_v);
    }
    if (!model.hparams.no_alloc) {
        say_on(*memory, params);
    }
    return memory;
}

uint32_t llama_tca_graph_nodes(const llama_model & model, uint32_t n_tokens) {
    if (!model.tca) {
        return 0;
    }
    const tca_plan plan(model.tca->budgets, n_tokens);
    return 8*plan.n_layer()*plan.max_segments(n_tokens);
}
