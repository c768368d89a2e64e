// Ragged attention on the CPU.
//
// A lane of a vector is one query row, a row being one (query token, query head of the GQA group). Queries are packed once as
// Q^T [head_dim, rows]; the scores of a tile are S^T [keys, rows], the output O^T [head_dim, rows]. So K and V are read as they
// lie, one element broadcast to all rows, the softmax runs down the columns without any horizontal step, and prefill and
// decode share the code: with few rows a tile costs what reading it costs.
#include "ops/tca-ops.h"
#include "tca-convert.h"
#include "tca-simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int   TILE_KEYS  = 64;                     // slots unpacked together
constexpr int   PANEL_ROWS = TCA_TILE_N*tca_full::lanes;   // query rows of one pass of the inner kernel
constexpr int   MAX_PANELS = 4;                      // panels that share one unpacked tile
constexpr float MASKED     = -1e30f;                 // score of a slot that a row must not see
constexpr float NO_MAX     = -1e29f;                 // running maximum before the first visible slot: exp(MASKED - NO_MAX) == 0

// C[m, lanes] = (C*shrink if accumulate else 0) + sum_k A(m, k)*B[k, lanes]; A(m, k) = a[m*a_m + k*a_k], rows of B and C are
// PANEL_ROWS apart.
template <typename V, int M, int N>
inline void tile_product(float * c, const float * a, size_t a_m, size_t a_k, const float * b, int depth, const float * shrink) {
    typename V::type acc[M][N];
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            acc[m][n] = shrink ? V::mul(V::load(c + m*PANEL_ROWS + n*V::lanes), V::load(shrink + n*V::lanes)) : V::set1(0.0f);
        }
    }
    for (int k = 0; k < depth; ++k) {
        typename V::type bv[N];
        for (int n = 0; n < N; ++n) {
            bv[n] = V::load(b + (size_t) k*PANEL_ROWS + n*V::lanes);
        }
        for (int m = 0; m < M; ++m) {
            const typename V::type av = V::set1(a[m*a_m + k*a_k]);
            for (int n = 0; n < N; ++n) {
                acc[m][n] = V::fma(acc[m][n], av, bv[n]);
            }
        }
    }
    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            V::store(c + m*PANEL_ROWS + n*V::lanes, acc[m][n]);
        }
    }
}

// All rows of A, in blocks that keep enough accumulators in flight.
template <typename V, int N>
void product(float * c, const float * a, size_t a_m, size_t a_k, int m_total, const float * b, int depth, const float * shrink) {
    constexpr int M = N == 1 ? 2*TCA_TILE_M : TCA_TILE_M;
    int m = 0;
    for (; m + M <= m_total; m += M) {
        tile_product<V, M, N>(c + (size_t) m*PANEL_ROWS, a + m*a_m, a_m, a_k, b, depth, shrink);
    }
    for (; m + 4 <= m_total; m += 4) {
        tile_product<V, 4, N>(c + (size_t) m*PANEL_ROWS, a + m*a_m, a_m, a_k, b, depth, shrink);
    }
    for (; m < m_total; ++m) {
        tile_product<V, 1, N>(c + (size_t) m*PANEL_ROWS, a + m*a_m, a_m, a_k, b, depth, shrink);
    }
}

// One panel of query rows and its running softmax.
struct panel {
    int n_rows = 0;
    int64_t min_visible = 0, max_visible = 0;
    std::vector<float>   qt;       // [head_dim_k, PANEL_ROWS], scaled, zero in unused lanes
    std::vector<float>   ot;       // [head_dim_v, PANEL_ROWS], unnormalised
    std::vector<float>   m, l;     // [PANEL_ROWS] running maximum and sum
    std::vector<int64_t> visible;  // [PANEL_ROWS] slots of the region that the row sees
};

struct scratch_t {
    panel              panels[MAX_PANELS];
    std::vector<float> k;       // [TILE_KEYS, head_dim_k]
    std::vector<float> v;       // [TILE_KEYS, head_dim_v]
    std::vector<float> s;       // [TILE_KEYS, PANEL_ROWS]
    std::vector<float> shrink;  // [PANEL_ROWS]

    void resize(int64_t dk, int64_t dv) {
        for (panel & p : panels) {
            p.qt.resize(dk*PANEL_ROWS);
            p.ot.resize(dv*PANEL_ROWS);
            p.m.resize(PANEL_ROWS);
            p.l.resize(PANEL_ROWS);
            p.visible.resize(PANEL_ROWS);
        }
        k.resize(TILE_KEYS*dk);
        v.resize(TILE_KEYS*dv);
        s.resize(TILE_KEYS*PANEL_ROWS);
        shrink.resize(PANEL_ROWS);
    }
};

scratch_t & thread_scratch(int64_t dk, int64_t dv) {
    static thread_local scratch_t w;
    w.resize(dk, dv);
    return w;
}

// Tensors of an attention node. Rows of a (sequence, KV head): row r is query token r/gqa, query head r%gqa of the group.
struct attn_args {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * desc;
    int     row;
    float   scale;
    float   softcap;
    int64_t gqa;

    explicit attn_args(const ggml_tensor * dst) {
        const int first = dst->view_src ? 1 : 0;  // an in-place node carries its destination in src[0]
        const tca_op_params params = tca_op_get_params(dst);
        q       = dst->src[first + 0];
        k       = dst->src[first + 1];
        v       = dst->src[first + 2];
        desc    = dst->src[first + 3];
        row     = params.row;
        scale   = params.scale;
        softcap = params.softcap;
        gqa     = q->ne[1]/desc->ne[1];
    }

    const int32_t * region(int64_t s, int64_t h) const {
        return (const int32_t *) ((const char *) desc->data + h*desc->nb[1] + s*desc->nb[2] + row*desc->nb[3]);
    }
};

void load_queries(const attn_args & a, const int32_t * d, int64_t head, int64_t r0, int n_rows, panel & p) {
    const int64_t dk = a.q->ne[0];
    const int64_t dv = a.v->ne[0];

    p.n_rows = n_rows;
    std::fill(p.qt.begin(), p.qt.end(), 0.0f);
    std::fill_n(p.ot.begin(), dv*PANEL_ROWS, 0.0f);
    std::fill(p.m.begin(), p.m.end(), NO_MAX);
    std::fill(p.l.begin(), p.l.end(), 0.0f);
    for (int r = 0; r < n_rows; ++r) {
        const int64_t t = (r0 + r)/a.gqa;
        const int64_t g = (r0 + r)%a.gqa;
        const float * src = (const float *) ((const char *) a.q->data + (head*a.gqa + g)*a.q->nb[1] + (d[TCA_DESC_TOKEN] + t)*a.q->nb[2]);
        for (int64_t i = 0; i < dk; ++i) {
            p.qt[i*PANEL_ROWS + r] = src[i]*a.scale;
        }
        p.visible[r] = d[TCA_DESC_PAST] + t + 1;
    }
    p.min_visible = p.visible[0];  // never decreases from row to row
    p.max_visible = p.visible[n_rows - 1];
}

// Scores of a tile of n_keys slots from slot j of the region on, softmax update, output update.
template <typename V, int N>
void attend_tile(const attn_args & a, panel & p, int64_t j, int n_keys, scratch_t & w) {
    const int64_t dk = a.k->ne[0];
    const int64_t dv = a.v->ne[0];
    float * s = w.s.data();

    product<V, N>(s, w.k.data(), dk, 1, n_keys, p.qt.data(), dk, nullptr);

    if (a.softcap != 0.0f) {
        for (int i = 0; i < n_keys; ++i) {
            for (int r = 0; r < p.n_rows; ++r) {
                s[i*PANEL_ROWS + r] = a.softcap*tanhf(s[i*PANEL_ROWS + r]/a.softcap);
            }
        }
    }
    if (p.min_visible < j + n_keys) {
        for (int r = 0; r < p.n_rows && p.visible[r] < j + n_keys; ++r) {
            for (int64_t i = std::max<int64_t>(p.visible[r] - j, 0); i < n_keys; ++i) {
                s[i*PANEL_ROWS + r] = MASKED;
            }
        }
    }

    for (int n = 0; n < N*V::lanes; n += V::lanes) {
        const typename V::type old = V::load(&p.m[n]);
        typename V::type max = old;
        for (int i = 0; i < n_keys; ++i) {
            max = V::max(max, V::load(s + i*PANEL_ROWS + n));
        }
        typename V::type sum = V::set1(0.0f);
        for (int i = 0; i < n_keys; ++i) {
            const typename V::type e = V::exp(V::sub(V::load(s + i*PANEL_ROWS + n), max));
            V::store(s + i*PANEL_ROWS + n, e);
            sum = V::add(sum, e);
        }
        const typename V::type shrink = V::exp(V::sub(old, max));
        V::store(&w.shrink[n], shrink);
        V::store(&p.m[n], max);
        V::store(&p.l[n], V::fma(sum, V::load(&p.l[n]), shrink));
    }

    product<V, N>(p.ot.data(), w.v.data(), 1, dv, dv, s, n_keys, w.shrink.data());
}

// Runs the slots [j0, j1) of a region past the first n_panels panels.
void attend(const attn_args & a, const int32_t * d, int n_panels, int64_t j0, int64_t j1, scratch_t & w) {
    const int64_t dk = a.k->ne[0];
    const int64_t dv = a.v->ne[0];

    for (int64_t j = j0; j < j1; j += TILE_KEYS) {
        const int     n_keys = std::min<int64_t>(TILE_KEYS, j1 - j);
        const int64_t slot   = d[TCA_DESC_OFFSET] + j;
        tca_rows_to_f32(a.k->type, (const char *) a.k->data + slot*a.k->nb[1], w.k.data(), n_keys*dk);
        tca_rows_to_f32(a.v->type, (const char *) a.v->data + slot*a.v->nb[1], w.v.data(), n_keys*dv);
        for (int i = 0; i < n_panels; ++i) {
            panel & p = w.panels[i];
            if (p.max_visible <= j) {
                continue;
            }
            if (p.n_rows <= tca_half::lanes) {
                attend_tile<tca_half, 1>(a, p, j, n_keys, w);
            } else if (p.n_rows <= tca_full::lanes) {
                attend_tile<tca_full, 1>(a, p, j, n_keys, w);
            } else if (p.n_rows <= 2*tca_full::lanes) {
                attend_tile<tca_full, 2>(a, p, j, n_keys, w);
            } else {
                attend_tile<tca_full, TCA_TILE_N>(a, p, j, n_keys, w);
            }
        }
    }
}

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

void tca_cpu_attn(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const attn_args a(dst);
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];
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
            const float norm = 1.0f/p.l[lane];
            for (int64_t i = 0; i < dv; ++i) {
                out[i] = p.ot[i*PANEL_ROWS + lane]*norm;
            }
        }
    });
}

// dst [head_dim_v + 2, n_chunks, n_head, n_tokens]
void tca_cpu_attn_partial(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const attn_args a(dst);
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
        const int n_rows = d[TCA_DESC_COUNT]*a.gqa;  // at most TCA_ATTN_PARTIAL_ROWS, the builder saw to it
        for (int r0 = 0; r0 < n_rows; r0 += PANEL_ROWS*MAX_PANELS) {
            int n_used = 0;
            for (int r = r0; r < n_rows && n_used < MAX_PANELS; r += PANEL_ROWS, ++n_used) {
                load_queries(a, d, h, r, std::min(PANEL_ROWS, n_rows - r), w.panels[n_used]);
            }
            attend(a, d, n_used, c*TCA_ATTN_CHUNK, j1, w);
            for (int r = r0; r < std::min(n_rows, r0 + n_used*PANEL_ROWS); ++r) {
                const panel & p    = w.panels[(r - r0)/PANEL_ROWS];
                const int     lane = (r - r0)%PANEL_ROWS;
                const int64_t t = d[TCA_DESC_TOKEN] + r/a.gqa;
                const int64_t q = h*a.gqa + r%a.gqa;
                float * out = (float *) ((char *) dst->data + c*dst->nb[1] + q*dst->nb[2] + t*dst->nb[3]);
                for (int64_t i = 0; i < dv; ++i) {
                    out[i] = p.ot[i*PANEL_ROWS + lane];
                }
                out[dv + 0] = p.m[lane];
                out[dv + 1] = p.l[lane];
            }
        }
    });
}

// src: (dst,) partial, desc
void tca_cpu_attn_combine(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const int first = dst->view_src ? 1 : 0;
    const ggml_tensor * partial = dst->src[first + 0];
    const ggml_tensor * desc    = dst->src[first + 1];
    const int     row = tca_op_get_params(dst).row;
    const int64_t dv  = dst->ne[0];
    const int64_t gqa = dst->ne[1]/desc->ne[1];

    for (int64_t s = 0; s < desc->ne[2]; ++s) {
        for (int64_t q = ith; q < dst->ne[1]; q += nth) {
            const int32_t * d = (const int32_t *) ((const char *) desc->data + (q/gqa)*desc->nb[1] + s*desc->nb[2] + row*desc->nb[3]);
            const int64_t n_chunks = (d[TCA_DESC_USED] + TCA_ATTN_CHUNK - 1)/TCA_ATTN_CHUNK;
            for (int64_t t = d[TCA_DESC_TOKEN]; t < d[TCA_DESC_TOKEN] + d[TCA_DESC_COUNT]; ++t) {
                const char * chunks = (const char *) partial->data + q*partial->nb[2] + t*partial->nb[3];
                float * out = (float *) ((char *) dst->data + q*dst->nb[1] + t*dst->nb[2]);

                float max = NO_MAX;
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
                ggml_vec_scale_f32(dv, out, 1.0f/sum);
            }
        }
    }
}
