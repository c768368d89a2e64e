// Attention of many query rows: a lane of a vector is one row.
//
// Queries are packed once as Q^T [head_dim, rows]; the scores of a tile are S^T [keys, rows], the output O^T [head_dim, rows].
// So K and V are read as they lie, one element broadcast to all rows, and the softmax runs down the columns without any
// horizontal step. Included by tca-attn.cpp only.
#pragma once

#include "tca-attn.h"
#include "tca-convert.h"
#include "tca-simd.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int TILE_KEYS  = 64;                          // slots unpacked together
constexpr int PANEL_ROWS = TCA_TILE_N*tca_full::lanes;  // query rows of one pass of the inner kernel
constexpr int MAX_PANELS = 4;                           // panels that share one unpacked tile

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
    tca_vector<float>   qt;       // [head_dim_k, PANEL_ROWS], scaled, zero in unused lanes
    tca_vector<float>   ot;       // [head_dim_v, PANEL_ROWS], unnormalised
    tca_vector<float>   m, l;     // [PANEL_ROWS] running maximum and sum
    std::vector<int64_t> visible;  // [PANEL_ROWS] slots of the region that the row sees
};

struct scratch_t {
    panel              panels[MAX_PANELS];
    tca_vector<float> k;       // [TILE_KEYS, head_dim_k]
    tca_vector<float> v;       // [TILE_KEYS, head_dim_v]
    tca_vector<float> s;       // [TILE_KEYS, PANEL_ROWS]
    tca_vector<float> shrink;  // [PANEL_ROWS]

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

void load_queries(const tca_attn_args & a, const int32_t * d, int64_t head, int64_t r0, int n_rows, panel & p) {
    const int64_t dk = a.q->ne[0];
    const int64_t dv = a.v->ne[0];

    p.n_rows = n_rows;
    std::fill(p.qt.begin(), p.qt.end(), 0.0f);
    std::fill_n(p.ot.begin(), dv*PANEL_ROWS, 0.0f);
    std::fill(p.m.begin(), p.m.end(), TCA_NO_MAX);
    std::fill(p.l.begin(), p.l.end(), 0.0f);
    for (int r = 0; r < n_rows; ++r) {
        const float * src = a.query(d, head, r0 + r);
        for (int64_t i = 0; i < dk; ++i) {
            p.qt[i*PANEL_ROWS + r] = src[i]*a.scale;
        }
        p.visible[r] = a.visible(d, r0 + r);
    }
    p.min_visible = p.visible[0];  // never decreases from row to row
    p.max_visible = p.visible[n_rows - 1];
}

// Scores of a tile of n_keys slots from slot j of the region on, softmax update, output update.
template <typename V, int N>
void attend_tile(const tca_attn_args & a, panel & p, int64_t j, int n_keys, scratch_t & w) {
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
                s[i*PANEL_ROWS + r] = TCA_MASKED;
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
void attend(const tca_attn_args & a, const int32_t * d, int n_panels, int64_t j0, int64_t j1, scratch_t & w) {
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

} // namespace
