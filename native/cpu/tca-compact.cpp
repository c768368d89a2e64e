#include "ops/tca-ops.h"
#include "tca-convert.h"
#include "tca-observe.h"
#include "tca-select.h"

#include <cstring>

// Moves the kept rows of the group to its start and the rows behind the group right after them.
static void move_rows(char * rows, size_t row_size, int64_t group, const int32_t * kept, int n_kept, int group_size, int64_t used) {
    char * to = rows + group*row_size;
    for (int i = 0; i < n_kept; ++i) {
        // kept[i] >= i: a row never lands behind one that is still to be read
        memmove(to + i*row_size, to + kept[i]*row_size, row_size);
    }
    memmove(to + n_kept*row_size, to + group_size*row_size, (used - group - group_size)*row_size);
}

// src: k, v, pos, desc, and q for metrics that look at queries
void tca_cpu_compact(ggml_tensor * dst, int ith, int nth, void * userdata) {
    ggml_tensor       * k    = dst->src[0];
    ggml_tensor       * v    = dst->src[1];
    ggml_tensor       * pos  = dst->src[2];
    const ggml_tensor * desc = dst->src[3];

    const tca_select_params & params = *(const tca_select_params *) userdata;

    const tca_op_params op = tca_op_get_params(dst);
    const int64_t dim_k    = k->ne[0];
    const int64_t dim_v    = v->ne[0];
    const int     n        = params.group_size;

    static thread_local tca_select_scratch   scratch;
    static thread_local std::vector<float>   keys;
    static thread_local std::vector<float>   values;
    static thread_local std::vector<double>  importance;
    static thread_local std::vector<double>  observed;
    static thread_local tca_observe_scratch  observe_scratch;
    static thread_local std::vector<int32_t> kept;

    int unit = 0;
    for (int64_t s = 0; s < desc->ne[2]; ++s) {
        for (int64_t h = 0; h < desc->ne[1]; ++h) {
            const int32_t * d = (const int32_t *) ((const char *) desc->data + h*desc->nb[1] + s*desc->nb[2] + op.row*desc->nb[3]);
            if (d[TCA_DESC_COUNT] == 0 || d[TCA_DESC_GROUP] < 0 || d[TCA_DESC_CONFIG] == TCA_HEAD_DENSE || unit++ % nth != ith) {
                continue;
            }
            const int64_t first = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_GROUP];
            int32_t * positions = (int32_t *) pos->data + first;

            importance.resize(n);
            kept.resize(n);
            tca_group g = { n, (int32_t) dim_k, (int32_t) dim_v, params.layer, (int32_t) h, nullptr, nullptr, positions, &params.rope,
                params.probe ? params.probe + h*dim_k : nullptr };
            if (params.metric->needs & TCA_NEEDS_KEYS) {
                keys.resize(n*dim_k);
                tca_rows_to_f32(k->type, (const char *) k->data + first*k->nb[1], keys.data(), n*dim_k);
                g.keys = keys.data();
            }
            if (params.metric->needs & TCA_NEEDS_VALUES) {
                values.resize(n*dim_v);
                tca_rows_to_f32(v->type, (const char *) v->data + first*v->nb[1], values.data(), n*dim_v);
                g.values = values.data();
            }
            const bool observes = params.metric->needs & TCA_NEEDS_QUERIES;
            if (observes) {
                observed.resize(n);
                tca_observe(dst->src[4], k, d, h, desc->ne[1], op.scale, op.softcap, n, observe_scratch, observed.data());
            }
            tca_importance(*params.metric, g, params.hadamard, observes ? observed.data() : nullptr, scratch, importance.data());
            const int n_kept = tca_select_tokens(importance.data(), n, params.block_size, params.n_keep, params.keep_counts,
                    params.configs + (size_t) d[TCA_DESC_CONFIG]*params.n_keep, scratch, kept.data());

            const int64_t group = d[TCA_DESC_GROUP];
            const int64_t used  = d[TCA_DESC_USED];
            const int64_t base  = d[TCA_DESC_OFFSET];
            move_rows((char *) k->data   + base*k->nb[1],   k->nb[1],        group, kept.data(), n_kept, n, used);
            move_rows((char *) v->data   + base*v->nb[1],   v->nb[1],        group, kept.data(), n_kept, n, used);
            move_rows((char *) pos->data + base*pos->nb[0], sizeof(int32_t), group, kept.data(), n_kept, n, used);
        }
    }
}
