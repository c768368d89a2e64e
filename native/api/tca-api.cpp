// C API: build information, budgets, plan and files. No context is touched here; see tca-context.cpp.
#include "tca-error.h"

#include "budgets/tca-budgets.h"
#include "llama/tca-cpu-backend.h"
#include "plan/tca-plan.h"

#include "ggml.h"
#include "gguf.h"

#include <cstdio>
#include <memory>

static thread_local std::string last_error;

tca_status tca_fail(tca_status status, const std::string & message) {
    last_error = message;
    return status;
}

const char * tca_last_error(void) {
    return last_error.c_str();
}

const char * tca_build_info(void) {
    static const auto text = [](const char * simd, const std::string & library) { return std::string(
        "{\"version\": \"" TCA_PACKAGE_VERSION "\", \"upstream\": \"" TCA_UPSTREAM "\", \"upstream_commit\": \"" TCA_UPSTREAM_COMMIT
        "\", \"patch\": \"" TCA_PATCH_HASH "\", \"compiler\": \"" TCA_COMPILER "\", \"simd\": \"") + simd + "\", \"cpu\": \"" + library +
#ifdef TCA_USE_CUDA
        "\", \"cuda\": true}"; };
#else
        "\", \"cuda\": false}"; };
#endif
    const tca_cpu_functions * cpu = tca_cpu_functions_get();
    if (cpu == nullptr) {
        static const std::string info = text("none", "");
        return info.c_str();
    }
    static const std::string info = text(cpu->simd(), tca_cpu_library());
    return info.c_str();
}

tca_status tca_budgets_check(const tca_budgets * budgets) {
    const std::string problem = tca_budgets_problem(*budgets);
    return problem.empty() ? TCA_OK : tca_fail(TCA_ERR_BUDGETS, problem);
}

static bool valid(const tca_budgets * budgets) {
    return tca_budgets_check(budgets) == TCA_OK;
}

static bool valid_head(const tca_budgets * b, uint32_t layer, uint32_t head) {
    if (!valid(b)) {
        return false;
    }
    if (layer >= b->n_layer || head >= b->n_head_kv) {
        tca_fail(TCA_ERR_ARGUMENT, "layer " + std::to_string(layer) + ", KV head " + std::to_string(head) + ": the budgets have " +
                std::to_string(b->n_layer) + " layers of " + std::to_string(b->n_head_kv) + " KV heads");
        return false;
    }
    return true;
}

int32_t tca_budgets_kept_per_group(const tca_budgets * b, int32_t config) {
    if (!valid(b)) {
        return TCA_ERR_BUDGETS;
    }
    if (config != TCA_HEAD_DENSE && (config < 0 || config >= (int32_t) b->n_configs)) {
        return tca_fail(TCA_ERR_ARGUMENT, "configuration " + std::to_string(config) + " does not exist");
    }
    return tca_config_kept(*b, config);
}

int64_t tca_plan_groups(const tca_budgets * b, uint32_t n_tokens) {
    return valid(b) ? (int64_t) tca_plan_groups_at(*b, n_tokens) : (int64_t) TCA_ERR_BUDGETS;
}

static int32_t head_kept(const tca_budgets * b, uint32_t layer, uint32_t head) {
    return tca_config_kept(*b, b->head_config[(size_t) layer*b->n_head_kv + head]);
}

static bool slides(const tca_budgets * b, uint32_t layer) {
    return b->head_config[(size_t) layer*b->n_head_kv] == TCA_HEAD_SLIDING;
}

int64_t tca_plan_length(const tca_budgets * b, uint32_t layer, uint32_t head, uint32_t n_tokens) {
    if (!valid_head(b, layer, head)) {
        return TCA_ERR_ARGUMENT;
    }
    if (slides(b, layer)) {
        return 0;
    }
    return n_tokens - (int64_t) tca_plan_groups_at(*b, n_tokens)*((int64_t) b->group_size - head_kept(b, layer, head));
}

int64_t tca_plan_capacity(const tca_budgets * b, uint32_t layer, uint32_t head, uint32_t n_ctx) {
    if (!valid_head(b, layer, head)) {
        return TCA_ERR_ARGUMENT;
    }
    return slides(b, layer) ? 0 : tca_plan_capacity_for(*b, head_kept(b, layer, head), n_ctx);
}

tca_status tca_plan_bytes(const tca_budgets * b, uint32_t head_dim_k, uint32_t head_dim_v, int type_k, int type_v, uint32_t n_ctx,
        uint64_t * bytes_tca, uint64_t * bytes_dense) {
    if (!valid(b)) {
        return TCA_ERR_BUDGETS;
    }
    for (const auto & [type, dim] : { std::make_pair(type_k, head_dim_k), std::make_pair(type_v, head_dim_v) }) {
        if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0 || dim == 0 ||
                dim % ggml_blck_size((ggml_type) type) != 0) {
            return tca_fail(TCA_ERR_ARGUMENT, "cache type " + std::to_string(type) + " does not fit a head size of " + std::to_string(dim));
        }
    }
    const uint64_t row = ggml_row_size((ggml_type) type_k, head_dim_k) + ggml_row_size((ggml_type) type_v, head_dim_v);
    uint64_t slots = 0, n_stored = 0;
    for (uint32_t il = 0; il < b->n_layer; ++il) {
        if (slides(b, il)) {
            continue;
        }
        ++n_stored;
        for (uint32_t h = 0; h < b->n_head_kv; ++h) {
            slots += tca_plan_capacity_for(*b, head_kept(b, il, h), n_ctx);
        }
    }
    if (bytes_tca) {
        *bytes_tca = slots*(row + sizeof(int32_t));
    }
    if (bytes_dense) {
        *bytes_dense = (uint64_t) n_ctx*n_stored*b->n_head_kv*row;
    }
    return TCA_OK;
}
