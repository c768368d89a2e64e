#include "tca-kernels.h"
#include "tca-convert.h"

void tca_cpu_append(ggml_tensor * node, int ith, int nth) {
    const auto [k, v, pos, k_cur, v_cur, desc, row] = tca_append_node::of(node);
    const int64_t n_head = desc->ne[1];

    for (int64_t s = 0; s < desc->ne[2]; ++s) {
        for (int64_t h = 0; h < n_head; ++h) {
            const int32_t * d = tca_desc_of(desc, row, s, h);
            for (int64_t t = 0; t < d[TCA_DESC_COUNT]; ++t) {
                if ((t*n_head + h) % nth != ith) {
                    continue;
                }
                const int64_t token = d[TCA_DESC_TOKEN] + t;
                const int64_t slot  = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_PAST] + t;
                tca_rows_from_f32(k->type, (const float *) ((const char *) k_cur->data + h*k_cur->nb[1] + token*k_cur->nb[2]),
                        (char *) k->data + slot*k->nb[1], k->ne[0]);
                tca_rows_from_f32(v->type, (const float *) ((const char *) v_cur->data + h*v_cur->nb[1] + token*v_cur->nb[2]),
                        (char *) v->data + slot*v->nb[1], v->ne[0]);
                ((int32_t *) pos->data)[slot] = d[TCA_DESC_POS] + t;
            }
        }
    }
}
