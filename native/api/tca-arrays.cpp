// C API: selection and attention on plain arrays.
#include "tca-error.h"

#include "budgets/tca-budgets.h"
#include "llama/tca-cpu-backend.h"
#include "metrics/tca-metric.h"
#include "ops/tca-ops.h"
#include "reference/tca-reference.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

const char * tca_metric_name(int32_t i) {
    const tca_metric * metric = tca_metric_at(i);
    return metric ? metric->name : nullptr;
}

bool tca_metric_needs_queries(const char * name) {
    const tca_metric * metric = tca_metric_find(name);
    return metric && (metric->needs & TCA_NEEDS_QUERIES);
}

int32_t tca_select(tca_impl impl, const char * metric_name, const tca_group * group, int32_t block_size, int32_t n_keep,
        const int32_t * keep_counts, const int32_t * counts, int32_t * kept, float * scores) {
    const tca_metric * metric = tca_metric_find(metric_name);
    if (metric == nullptr) {
        return tca_fail(TCA_ERR_ARGUMENT, "unknown metric, this build knows: " + tca_metric_names());
    }
    const int32_t n_tokens = group->n_tokens;
    if (n_tokens < 1 || group->head_dim_k < 1 || block_size < 1 || n_keep < 1 || n_tokens % block_size != 0) {
        return tca_fail(TCA_ERR_ARGUMENT, "n_tokens must be a positive multiple of block_size, head_dim_k and n_keep positive");
    }
    if ((metric->needs & TCA_NEEDS_VALUES) && (group->values == nullptr || group->head_dim_v < 1)) {
        return tca_fail(TCA_ERR_ARGUMENT, std::string("metric ") + metric->name + " looks at values, none were given");
    }
    if ((metric->needs & TCA_NEEDS_PROBE) && group->probe == nullptr) {
        return tca_fail(TCA_ERR_ARGUMENT, std::string("metric ") + metric->name + " needs a probe, none was given");
    }
    if (metric->needs & TCA_NEEDS_QUERIES) {
        return tca_fail(TCA_ERR_ARGUMENT, std::string("metric ") + metric->name + " looks at queries, which only a running model has");
    }
    int64_t n_blocks = 0;
    for (int32_t j = 0; j < n_keep; ++j) {
        if (counts[j] < 0 || keep_counts[j] < 0 || keep_counts[j] > block_size || (j > 0 && keep_counts[j] <= keep_counts[j - 1])) {
            return tca_fail(TCA_ERR_ARGUMENT, "keep_counts must increase from 0 to block_size at most, counts must not be negative");
        }
        n_blocks += counts[j];
    }
    if (n_blocks != n_tokens/block_size) {
        return tca_fail(TCA_ERR_ARGUMENT, "counts must sum to n_tokens/block_size");
    }
    const tca_rope * r = group->rope;
    if (r && r->type != TCA_ROPE_NONE && (r->n_rot < 2 || r->n_rot % 2 != 0 || r->n_rot > group->head_dim_k || !(r->scale > 0.0f) ||
            r->freqs == nullptr)) {
        return tca_fail(TCA_ERR_ARGUMENT, "rope: n_rot must be even and at most head_dim_k, scale positive, freqs given");
    }

    if (impl == TCA_IMPL_REFERENCE) {
        std::vector<float> unused(scores ? 0 : n_tokens);
        return tca_reference_select(metric->name, *group, 0, nullptr, block_size, n_keep, keep_counts, counts, kept,
                scores ? scores : unused.data());
    }
    const tca_cpu_functions * cpu = tca_cpu_functions_get();
    if (cpu == nullptr) {
        return tca_fail(TCA_ERR_UNSUPPORTED, TCA_NO_CPU_BACKEND);
    }
    std::vector<double> importance(n_tokens);
    const int32_t n_kept = cpu->select(metric, group, block_size, n_keep, keep_counts, counts, kept, importance.data());
    if (scores) {
        std::copy(importance.begin(), importance.end(), scores);
    }
    return n_kept;
}

static void to_f32(ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}

tca_status tca_attention(tca_impl impl, const float * q, const void * k, const void * v, int type_k, int type_v, int32_t n_tokens,
        int32_t n_head, int32_t n_head_kv, int32_t head_dim_k, int32_t head_dim_v, const int64_t * lengths, float scale,
        float softcap, const float * sinks, int32_t n_threads, float * out) {
    if (n_tokens < 1 || n_head_kv < 1 || n_head < 1 || n_head % n_head_kv != 0 || head_dim_k < 1 || head_dim_v < 1 || n_threads < 1) {
        return tca_fail(TCA_ERR_ARGUMENT, "sizes must be positive and n_head a multiple of n_head_kv");
    }
    int64_t n_slots = 0, longest = 0;
    for (int32_t h = 0; h < n_head_kv; ++h) {
        if (lengths[h] < n_tokens) {
            return tca_fail(TCA_ERR_ARGUMENT, "every region must hold at least the n_tokens newest");
        }
        n_slots += lengths[h];
        longest  = std::max(longest, lengths[h]);
    }
    const ggml_type tk = (ggml_type) type_k, tv = (ggml_type) type_v;
    for (const auto & [type, dim] : { std::make_pair(type_k, head_dim_k), std::make_pair(type_v, head_dim_v) }) {
        if (type < 0 || type >= GGML_TYPE_COUNT || ggml_blck_size((ggml_type) type) == 0 || dim % ggml_blck_size((ggml_type) type) != 0 ||
                (type != GGML_TYPE_F32 && ggml_get_type_traits((ggml_type) type)->to_float == nullptr)) {
            return tca_fail(TCA_ERR_ARGUMENT, "cache type " + std::to_string(type) + " does not fit a head size of " + std::to_string(dim));
        }
    }

    if (impl == TCA_IMPL_REFERENCE) {
        std::vector<float> kf(n_slots*head_dim_k), vf(n_slots*head_dim_v);
        to_f32(tk, k, kf.data(), kf.size());
        to_f32(tv, v, vf.data(), vf.size());
        tca_reference_attention(q, kf.data(), vf.data(), n_tokens, n_head, n_head_kv, head_dim_k, head_dim_v, lengths, scale, softcap, sinks, out);
        return TCA_OK;
    }

    // the runtime's own nodes, in a graph of their own over the caller's arrays
    const ggml_init_params params = { 64*ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true };
    const ggml_context_ptr ctx { ggml_init(params) };
    ggml_tensor * tq   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, head_dim_k, n_head, n_tokens);
    ggml_tensor * tk_  = ggml_new_tensor_2d(ctx.get(), tk, head_dim_k, n_slots);
    ggml_tensor * tv_  = ggml_new_tensor_2d(ctx.get(), tv, head_dim_v, n_slots);
    ggml_tensor * desc = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_I32, TCA_DESC_SIZE, n_head_kv, 1, 1);
    ggml_tensor * ts   = sinks ? ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, n_head) : nullptr;

    std::vector<int32_t> rows((size_t) n_head_kv*TCA_DESC_SIZE);
    int64_t first = 0;
    for (int32_t h = 0; h < n_head_kv; ++h) {
        tca_desc d;
        d.offset = first;
        d.past   = lengths[h] - n_tokens;
        d.count  = n_tokens;
        d.write(&rows[(size_t) h*TCA_DESC_SIZE]);
        first += lengths[h];
    }

    const bool split = tca_attn_splits(n_tokens, n_head, n_head_kv);
    ggml_tensor * node = split ?
        tca_build_attn_split(ctx.get(), tq, tk_, tv_, desc, 0, scale, softcap, tca_attn_n_chunks(longest), nullptr, ts) :
        tca_build_attn      (ctx.get(), tq, tk_, tv_, desc, 0, scale, softcap, nullptr, ts);

    ggml_tensor *      partial_node = split ? tca_combine_node::of(node).partial : nullptr;
    std::vector<float> partial(split ? ggml_nelements(partial_node) : 0);
    tq->data   = (void *) q;
    tk_->data  = (void *) k;
    tv_->data  = (void *) v;
    desc->data = rows.data();
    node->data = out;
    if (ts) {
        ts->data = (void *) sinks;
    }
    if (split) {
        partial_node->data = partial.data();
    }
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, node);

    const ggml_backend_ptr backend = tca_cpu_backend_new(n_threads);
    if (!backend) {
        return tca_fail(TCA_ERR_UNSUPPORTED, TCA_NO_CPU_BACKEND);
    }
    if (ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        return tca_fail(TCA_ERR_MEMORY, "the CPU backend failed to run the attention graph");
    }
    return TCA_OK;
}
