#include "tca-convert.h"
#include "tca-kernels.h"
#include "tca-observe.h"
#include "tca-select.h"

#include <cstring>

// Moves the kept rows of the group to its start and the rows behind the group right after them; those that are dropped go to the
// stash, which may lie where rows were that moved.
static void move_rows(char * rows, size_t row_size, const int32_t * d, const int32_t * kept, int n_kept, int group_size, std::vector<char> & dropped) {
    const int64_t group = d[TCA_DESC_GROUP], used = d[TCA_DESC_USED];
    char * to = rows + group*row_size;
    if (d[TCA_DESC_STASH] >= 0) {
        dropped.resize((group_size - n_kept)*row_size);
        char * out = dropped.data();
        for (int i = 0, next = 0; i < group_size; ++i) {
            if (next < n_kept && kept[next] == i) {
                ++next;
                continue;
            }
            memcpy(out, to + i*row_size, row_size);
            out += row_size;
        }
    }
    for (int i = 0; i < n_kept; ++i) {
        // kept[i] >= i: a row never lands behind one that is still to be read
        memmove(to + i*row_size, to + kept[i]*row_size, row_size);
    }
    memmove(to + n_kept*row_size, to + group_size*row_size, (used - group - group_size)*row_size);
    if (d[TCA_DESC_STASH] >= 0 && n_kept < group_size) {
        memcpy(rows + d[TCA_DESC_STASH]*row_size, dropped.data(), dropped.size());
    }
}

void tca_cpu_compact(ggml_tensor * node, int ith, int nth) {
    const tca_compact_node a = tca_compact_node::of(node);
    ggml_tensor * const k = a.k, * const v = a.v, * const pos = a.pos;

    const tca_metric &          metric   = *tca_metric_by_id(a.tables.n.metric);
    const bool                  observes = metric.needs & TCA_NEEDS_QUERIES;
    const tca_tables::numbers & params   = a.tables.n;
    const int64_t dim_k = k->ne[0];
    const int64_t dim_v = v->ne[0];
    const int     n     = params.group_size;

    const int       n_keep      = a.tables.configs->ne[0];
    const int32_t * keep_counts = (const int32_t *) a.tables.configs->data;
    const int32_t * configs     = keep_counts + n_keep;
    const float   * probe       = a.tables.probe ? (const float *) a.tables.probe->data : nullptr;
    tca_rope rope = { params.rope_type, 0, params.rope_scale, nullptr };
    if (a.tables.freqs) {
        rope.n_rot = 2*a.tables.freqs->ne[0];
        rope.freqs = (const float *) a.tables.freqs->data;
    }

    static thread_local tca_select_scratch   scratch;
    static thread_local std::vector<float>   keys;
    static thread_local std::vector<float>   values;
    static thread_local std::vector<double>  importance;
    static thread_local std::vector<double>  observed;
    static thread_local tca_observe_scratch  observe_scratch;
    static thread_local std::vector<int32_t> kept;
    static thread_local std::vector<char>    dropped;

    int unit = 0;
    for (int64_t s = 0; s < a.desc->ne[2]; ++s) {
        for (int64_t h = 0; h < a.desc->ne[1]; ++h) {
            const int32_t * d = tca_desc_of(a.desc, a.row, s, h);
            if (d[TCA_DESC_COUNT] == 0 || d[TCA_DESC_GROUP] < 0 || d[TCA_DESC_CONFIG] == TCA_HEAD_DENSE || unit++ % nth != ith) {
                continue;
            }
            const int64_t first = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_GROUP];
            int32_t * positions = (int32_t *) pos->data + first;

            importance.resize(n);
            kept.resize(n);
            tca_group g = { n, (int32_t) dim_k, (int32_t) dim_v, params.layer, (int32_t) h, nullptr, nullptr, positions, &rope,
                probe ? probe + h*dim_k : nullptr };
            if (metric.needs & TCA_NEEDS_KEYS) {
                keys.resize(n*dim_k);
                tca_rows_to_f32(k->type, (const char *) k->data + first*k->nb[1], keys.data(), n*dim_k);
                g.keys = keys.data();
            }
            if (metric.needs & TCA_NEEDS_VALUES) {
                values.resize(n*dim_v);
                tca_rows_to_f32(v->type, (const char *) v->data + first*v->nb[1], values.data(), n*dim_v);
                g.values = values.data();
            }
            if (observes) {
                observed.resize(n);
                tca_observe(a.q, k, d, h, a.desc->ne[1], a.scale, a.softcap, n, observe_scratch, observed.data());
            }
            tca_importance(metric, g, params.hadamard, observes ? observed.data() : nullptr, scratch, importance.data());
            const int n_kept = tca_select_tokens(importance.data(), n, params.block_size, n_keep, keep_counts,
                    configs + (size_t) d[TCA_DESC_CONFIG]*n_keep, scratch, kept.data());

            const int64_t base = d[TCA_DESC_OFFSET];
            move_rows((char *) k->data   + base*k->nb[1],   k->nb[1],        d, kept.data(), n_kept, n, dropped);
            move_rows((char *) v->data   + base*v->nb[1],   v->nb[1],        d, kept.data(), n_kept, n, dropped);
            move_rows((char *) pos->data + base*pos->nb[0], sizeof(int32_t), d, kept.data(), n_kept, n, dropped);
        }
    }
}
