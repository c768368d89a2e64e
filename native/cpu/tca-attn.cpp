// The attention ops of the CPU backend: units of work, their share among threads, where results go.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#    pragma GCC diagnostic ignored "-Wuninitialized"  // false alarms inside the AVX-512 intrinsics of GCC 12 and older
#    pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "tca-attn.h"
#include "tca-attn-dims.h"
#include "tca-attn-rows.h"

#include <algorithm>
#include <cmath>

namespace {

// Shares units of work among threads in contiguous runs of about equal cost. First add up `total`, then ask for every unit,
// in the same order, whether it is mine().
struct work_split {
    double total = 0.0, before = 0.0;
    int    ith, nth;

    work_split(int ith, int nth) : ith(ith), nth(nth) {}

    bool mine(double cost) {
        const double middle = before + 0.5*cost;
        before += cost;
        return std::min<int>(middle*nth/total, nth - 1) == ith;
    }
};

} // namespace

const char * tca_cpu_simd(void) {
    return TCA_SIMD_NAME;
}

void tca_cpu_attn(ggml_tensor * dst, int ith, int nth) {
    const tca_attn_args a(dst);
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];
    const float * sinks = a.sinks ? (const float *) a.sinks->data : nullptr;
    scratch_t & w = thread_scratch(dk, dv);

    // enough units for every thread first, then as many panels a unit as share an unpacked tile
    const int64_t rows_total = a.q->ne[1]*a.q->ne[2];
    const int     n_panels   = std::clamp<int64_t>(rows_total/(PANEL_ROWS*4*nth), 1, MAX_PANELS);
    const int64_t unit_rows  = (int64_t) n_panels*PANEL_ROWS;

    const auto for_each_unit = [&](auto && visit) {
        for (int64_t s = 0; s < a.desc->ne[2]; ++s) {
            for (int64_t h = 0; h < a.desc->ne[1]; ++h) {
                const int32_t * d = a.region(s, h);
                const int64_t n_rows = d[TCA_DESC_COUNT]*a.gqa;
                for (int64_t r0 = 0; r0 < n_rows; r0 += unit_rows) {
                    const int64_t n = std::min(unit_rows, n_rows - r0);
                    visit(d, h, r0, n, (double) n*(d[TCA_DESC_PAST] + (r0 + n - 1)/a.gqa + 1));
                }
            }
        }
    };

    work_split work(ith, nth);
    for_each_unit([&](const int32_t *, int64_t, int64_t, int64_t, double cost) { work.total += cost; });
    for_each_unit([&](const int32_t * d, int64_t h, int64_t r0, int64_t n, double cost) {
        if (!work.mine(cost)) {
            return;
        }
        int n_used = 0;
        for (int64_t r = 0; r < n; r += PANEL_ROWS, ++n_used) {
            load_queries(a, d, h, r0 + r, std::min<int64_t>(PANEL_ROWS, n - r), w.panels[n_used]);
        }
        attend(a, d, n_used, 0, w.panels[n_used - 1].max_visible, w);
        for (int64_t r = 0; r < n; ++r) {
            const panel & p    = w.panels[r/PANEL_ROWS];
            const int     lane = r%PANEL_ROWS;
            const int64_t t = d[TCA_DESC_TOKEN] + (r0 + r)/a.gqa;
            const int64_t q = h*a.gqa + (r0 + r)%a.gqa;
            float * out = (float *) ((char *) dst->data + q*dst->nb[1] + t*dst->nb[2]);
            const float norm = 1.0f/(p.l[lane] + (sinks ? expf(sinks[q] - p.m[lane]) : 0.0f));
            for (int64_t i = 0; i < dv; ++i) {
                out[i] = p.ot[i*PANEL_ROWS + lane]*norm;
            }
        }
    });
}

// dst [head_dim_v + 2, n_chunks, n_head, n_tokens]
void tca_cpu_attn_partial(ggml_tensor * dst, int ith, int nth) {
    const tca_attn_args a(dst);
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];
    scratch_t & w = thread_scratch(dk, dv);

    const auto for_each_unit = [&](auto && visit) {
        for (int64_t s = 0; s < a.desc->ne[2]; ++s) {
            for (int64_t h = 0; h < a.desc->ne[1]; ++h) {
                const int32_t * d = a.region(s, h);
                for (int64_t c = 0; d[TCA_DESC_COUNT] > 0 && c*TCA_ATTN_CHUNK < d[TCA_DESC_USED]; ++c) {
                    const int64_t j1 = std::min<int64_t>((c + 1)*TCA_ATTN_CHUNK, d[TCA_DESC_USED]);
                    visit(d, h, c, j1, (double) (j1 - c*TCA_ATTN_CHUNK)*d[TCA_DESC_COUNT]);
                }
            }
        }
    };

    work_split work(ith, nth);
    for_each_unit([&](const int32_t *, int64_t, int64_t, int64_t, double cost) { work.total += cost; });
    for_each_unit([&](const int32_t * d, int64_t h, int64_t c, int64_t j1, double cost) {
        if (!work.mine(cost)) {
            return;
        }
        const auto result = [&](int64_t r) {
            const int64_t t = d[TCA_DESC_TOKEN] + r/a.gqa;
            const int64_t q = h*a.gqa + r%a.gqa;
            return (float *) ((char *) dst->data + c*dst->nb[1] + q*dst->nb[2] + t*dst->nb[3]);
        };
        const int n_rows = d[TCA_DESC_COUNT]*a.gqa;  // at most TCA_ATTN_PARTIAL_ROWS, the builder saw to it
        if (dims_serves(a, n_rows)) {
            static thread_local dims_state state;
            const int n_pass = n_rows <= DIMS_MAX_ROWS ? n_rows : (n_rows + 1)/2;
            for (int r0 = 0; r0 < n_rows; r0 += n_pass) {
                const int n = std::min(n_pass, n_rows - r0);
                dims_attend(a, d, h, r0, n, c*TCA_ATTN_CHUNK, j1, state);
                for (int r = 0; r < n; ++r) {
                    float * out = result(r0 + r);
                    std::copy_n(&state.o[r*dv], dv, out);
                    out[dv + 0] = state.m[r];
                    out[dv + 1] = state.l[r];
                }
            }
            return;
        }
        for (int r0 = 0; r0 < n_rows; r0 += PANEL_ROWS*MAX_PANELS) {
            int n_used = 0;
            for (int r = r0; r < n_rows && n_used < MAX_PANELS; r += PANEL_ROWS, ++n_used) {
                load_queries(a, d, h, r, std::min(PANEL_ROWS, n_rows - r), w.panels[n_used]);
            }
            attend(a, d, n_used, c*TCA_ATTN_CHUNK, j1, w);
            for (int r = r0; r < std::min(n_rows, r0 + n_used*PANEL_ROWS); ++r) {
                const panel & p    = w.panels[(r - r0)/PANEL_ROWS];
                const int     lane = (r - r0)%PANEL_ROWS;
                float * out = result(r);
                for (int64_t i = 0; i < dv; ++i) {
                    out[i] = p.ot[i*PANEL_ROWS + lane];
                }
                out[dv + 0] = p.m[lane];
                out[dv + 1] = p.l[lane];
            }
        }
    });
}

void tca_cpu_attn_combine(ggml_tensor * dst, int ith, int nth) {
    const auto [partial, desc, sinks, row] = tca_combine_node::of(dst);
    const int64_t dv  = dst->ne[0];
    const int64_t gqa = dst->ne[1]/desc->ne[1];

    for (int64_t s = 0; s < desc->ne[2]; ++s) {
        for (int64_t q = ith; q < dst->ne[1]; q += nth) {
            const int32_t * d = tca_desc_of(desc, row, s, q/gqa);
            const int64_t n_chunks = (d[TCA_DESC_USED] + TCA_ATTN_CHUNK - 1)/TCA_ATTN_CHUNK;
            for (int64_t t = d[TCA_DESC_TOKEN]; t < d[TCA_DESC_TOKEN] + d[TCA_DESC_COUNT]; ++t) {
                const char * chunks = (const char *) partial->data + q*partial->nb[2] + t*partial->nb[3];
                float * out = (float *) ((char *) dst->data + q*dst->nb[1] + t*dst->nb[2]);

                float max = TCA_NO_MAX;
                for (int64_t c = 0; c < n_chunks; ++c) {
                    max = std::max(max, ((const float *) (chunks + c*partial->nb[1]))[dv]);
                }
                std::fill_n(out, dv, 0.0f);
                float sum = 0.0f;
                for (int64_t c = 0; c < n_chunks; ++c) {
                    const float * p = (const float *) (chunks + c*partial->nb[1]);
                    const float weight = expf(p[dv] - max);  // 0 for a chunk the query does not see
                    sum += weight*p[dv + 1];
                    ggml_vec_mad_f32(dv, out, p, weight);
                }
                if (sinks) {
                    sum += expf(((const float *) sinks->data)[q] - max);
                }
                ggml_vec_scale_f32(dv, out, 1.0f/sum);
            }
        }
    }
}
