// Attention of few query rows, as in decode: a lane of a vector is one dimension of the head.
//
// A key is read once, in registers, for all rows; the products of a key with every row are summed over the lanes together
// (tca_dims::reduce), which leaves the scores as S [keys, rows]. The softmax runs over the slots of a whole chunk at once, so
// nothing is rescaled, and P*V keeps all rows of some dimensions in registers. Included by tca-attn.cpp only.
#pragma once

#include "tca-attn.h"
#include "tca-convert.h"
#include "tca-simd.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int DIMS_MAX_ROWS = 8;   // of one pass: what registers hold
constexpr int DIMS_TILE     = 64;  // slots whose rows stay in the first-level cache while the dimensions are walked

// Rows of S: the next power of two, so that they fill vectors.
constexpr int dims_stride(int n_rows) {
    return n_rows <= 1 ? 1 : n_rows <= 2 ? 2 : n_rows <= 4 ? 4 : 8;
}

// Results of one chunk, and scratch that is reused from chunk to chunk.
struct dims_state {
    tca_vector<float> q;                         // [head_dim_k/tca_dims::lanes, n_rows, tca_dims::keys, tca_dims::lanes], scaled
    tca_vector<float> s;                         // [TCA_ATTN_CHUNK + padding, dims_stride(n_rows)]
    tca_vector<float> rows;                      // [DIMS_TILE, head_dim] of types that are not read directly
    tca_vector<float> o;                         // [n_rows, head_dim_v], unnormalised
    float m[DIMS_MAX_ROWS], l[DIMS_MAX_ROWS];     // maximum and sum of the softmax
};

// Rows to prefetch while others are worked on; row_size 0: none.
struct dims_ahead {
    const char * rows;
    size_t       row_size;
};

template <int R> constexpr int dims_vectors()   { return std::max(1, tca_dims::lanes/dims_stride(R)); }  // key vectors of a reduction
template <int R> constexpr int dims_reductions() { return TCA_REGISTERS == 32 && dims_stride(R) == 8 ? 2 : 1; }  // while registers last
template <int R> constexpr int dims_keys()      { return dims_reductions<R>()*dims_vectors<R>()*tca_dims::keys; }

// S of n_keys rows from k on, for R query rows. Writes it up to the next multiple of dims_keys<R>(); what stands behind n_keys
// means nothing. `ahead`: as many rows that are needed later.
template <typename READER, int R, int STEP>
void dims_scores(const float * q, const char * k, size_t row_size, int n_keys, int64_t dk, float * s, const dims_ahead & ahead) {
    using D = tca_dims;
    constexpr int RP = dims_stride(R), P = dims_vectors<R>(), U = dims_reductions<R>(), KEYS = dims_keys<R>();
    for (int j = 0; j < n_keys; j += KEYS) {
        tca_prefetch<2>(ahead.rows + j*ahead.row_size, KEYS*ahead.row_size);
        tca_prefetch<1>(k + (j + 3*KEYS)*row_size, KEYS*row_size);
        const char * row[KEYS];
        for (int i = 0; i < KEYS; ++i) {
            row[i] = k + (j + i)*row_size;
        }
        for (int i = n_keys - j; i < KEYS; ++i) {
            row[i] = row[0];  // nothing behind the last row may be read
        }
        typename D::type acc[U*P*RP];
        for (typename D::type & x : acc) {
            x = D::set1(0.0f);
        }
        const float * qi = q;
        for (int64_t i = 0; i < dk; i += STEP*tca_full::lanes) {
            typename D::type y[U*P][STEP][D::keys];
            for (int u = 0; u < U; ++u) {
                for (int p = 0; p < P; ++p) {
                    const char * rows[D::keys];
                    for (int h = 0; h < D::keys; ++h) {
                        rows[h] = row[(u*D::keys + h)*P + p];
                    }
                    tca_load_keys<STEP>(READER(), rows, i, y[u*P + p]);
                }
            }
            for (int n = 0; n < STEP; ++n) {
                for (int h = 0; h < D::keys; ++h) {
                    for (int r = 0; r < R; ++r) {
                        typename D::type qr = D::load(qi);
                        D::keep(qr);
                        qi += tca_full::lanes;
                        for (int up = 0; up < U*P; ++up) {
                            acc[up*RP + r] = D::fma(acc[up*RP + r], y[up][n][h], qr);
                        }
                    }
                }
            }
        }
        for (int u = 0; u < U; ++u) {
            for (int i = 0; i < P*RP; i += D::lanes) {
                D::store(s + (j + u*P*D::keys)*RP + i, D::reduce(acc + u*P*RP + i));
            }
        }
    }
}

// o[r, i..] += sum over keys of p[key, r]*v[key, i..] for N vectors of dimensions
template <typename READER, int R, int N>
inline void dims_weigh(const float * p, const char * v, size_t row_size, int n_keys, int64_t i, int64_t dv, float * o,
        const dims_ahead & ahead) {
    using V = tca_full;
    constexpr int RP = dims_stride(R);
    typename V::type acc[R][N];
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            acc[r][n] = V::load(o + r*dv + i + n*V::lanes);
        }
    }
    for (int j = 0; j < n_keys; ++j) {
        tca_prefetch<2>(ahead.rows + j*ahead.row_size, ahead.row_size);
        typename V::type x[N];
        READER::template load<N>(v + j*row_size, i, x);
        for (int r = 0; r < R; ++r) {
            const typename V::type weight = V::set1(p[j*RP + r]);
            for (int n = 0; n < N; ++n) {
                acc[r][n] = V::fma(acc[r][n], weight, x[n]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            V::store(o + r*dv + i + n*V::lanes, acc[r][n]);
        }
    }
}

// S [n, RP] to weights in place, n*RP a multiple of the vectors' period; maximum and sum of every row.
template <int RP>
inline void dims_softmax(float * s, int n, float * m, float * l) {
    using V = tca_full;
    constexpr int W      = std::max(1, RP/V::lanes);   // vectors until the rows repeat
    constexpr int PERIOD = W*V::lanes;
    constexpr int CHAINS = 4;                          // independent maxima
    const int     total  = n*RP;

    float lanes[PERIOD];
    typename V::type max[CHAINS][W], sum[W];
    for (int w = 0; w < W; ++w) {
        sum[w] = V::set1(0.0f);
        for (int c = 0; c < CHAINS; ++c) {
            max[c][w] = V::set1(TCA_NO_MAX);
        }
    }
    int i = 0;
    for (; i + CHAINS*PERIOD <= total; i += CHAINS*PERIOD) {
        for (int c = 0; c < CHAINS; ++c) {
            for (int w = 0; w < W; ++w) {
                max[c][w] = V::max(max[c][w], V::load(s + i + c*PERIOD + w*V::lanes));
            }
        }
    }
    for (; i < total; i += PERIOD) {
        for (int w = 0; w < W; ++w) {
            max[0][w] = V::max(max[0][w], V::load(s + i + w*V::lanes));
        }
    }
    for (int w = 0; w < W; ++w) {
        V::store(lanes + w*V::lanes, V::max(V::max(max[0][w], max[1][w]), V::max(max[2][w], max[3][w])));
    }
    for (int r = 0; r < RP; ++r) {
        m[r] = lanes[r];
        for (int at = r + RP; at < PERIOD; at += RP) {
            m[r] = std::max(m[r], lanes[at]);
        }
        for (int at = r; at < PERIOD; at += RP) {
            lanes[at] = m[r];
        }
    }
    for (int w = 0; w < W; ++w) {
        max[0][w] = V::load(lanes + w*V::lanes);
    }
    for (i = 0; i < total; i += PERIOD) {
        for (int w = 0; w < W; ++w) {
            const typename V::type e = V::exp(V::sub(V::load(s + i + w*V::lanes), max[0][w]));
            V::store(s + i + w*V::lanes, e);
            sum[w] = V::add(sum[w], e);
        }
    }
    for (int w = 0; w < W; ++w) {
        V::store(lanes + w*V::lanes, sum[w]);
    }
    for (int r = 0; r < RP; ++r) {
        l[r] = 0.0f;
        for (int at = r; at < PERIOD; at += RP) {
            l[r] += lanes[at];
        }
    }
}

// Calls f(first row, rows, row size, number of rows, reader) with rows in a form that the reader understands: where they lie, or
// unpacked tile by tile.
template <typename F>
void dims_tiles(ggml_type type, const char * rows, size_t row_size, int n, int64_t dim, tca_vector<float> & unpacked, F && f) {
    const auto direct = [&](auto reader) {
        for (int j = 0; j < n; j += DIMS_TILE) {
            f(j, rows + j*row_size, row_size, std::min(DIMS_TILE, n - j), reader);
        }
    };
    switch (type) {
        case GGML_TYPE_F32:  direct(tca_row_reader<GGML_TYPE_F32 >()); return;
#ifdef TCA_READS_ROWS
        case GGML_TYPE_F16:  direct(tca_row_reader<GGML_TYPE_F16 >()); return;
        case GGML_TYPE_BF16: direct(tca_row_reader<GGML_TYPE_BF16>()); return;
        case GGML_TYPE_Q8_0: direct(tca_row_reader<GGML_TYPE_Q8_0>()); return;
        case GGML_TYPE_Q4_0: direct(tca_row_reader<GGML_TYPE_Q4_0>()); return;
#endif
        default: break;
    }
    unpacked.resize(DIMS_TILE*dim);
    for (int j = 0; j < n; j += DIMS_TILE) {
        const int n_tile = std::min(DIMS_TILE, n - j);
        tca_rows_to_f32(type, rows + j*row_size, unpacked.data(), n_tile*dim);
        f(j, (const char *) unpacked.data(), dim*sizeof(float), n_tile, tca_row_reader<GGML_TYPE_F32>());
    }
}

// The slots [j0, j1) of a region, at most TCA_ATTN_CHUNK, past rows [r0, r0 + R).
template <int R>
void dims_run(const tca_attn_args & a, const int32_t * d, int64_t r0, int64_t j0, int64_t j1, dims_state & w) {
    using V = tca_full;
    constexpr int RP   = dims_stride(R);
    constexpr int KEYS = dims_keys<R>();
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];
    const int64_t first = d[TCA_DESC_OFFSET] + j0;
    const int     n     = j1 - j0;
    const char  * k     = (const char *) a.k->data + first*a.k->nb[1];
    const char  * v     = (const char *) a.v->data + first*a.v->nb[1];
    float * s = w.s.data();

    // V comes in while the scores are computed, the next chunk's K while V is worked on: memory is never idle
    dims_tiles(a.k->type, k, a.k->nb[1], n, dk, w.rows, [&](int j, const char * rows, size_t row_size, int n_tile, auto reader) {
        const dims_ahead ahead = { v + j*a.v->nb[1], a.v->nb[1] };
        dims_scores<decltype(reader), R, decltype(reader)::step>(w.q.data(), rows, row_size, n_tile, dk, s + j*RP, ahead);
    });

    if (a.softcap != 0.0f) {
        for (int i = 0; i < n*RP; ++i) {
            s[i] = a.softcap*tanhf(s[i]/a.softcap);
        }
    }
    const int n_padded = (n + KEYS - 1)/KEYS*KEYS;
    std::fill(s + n*RP, s + n_padded*RP, TCA_MASKED);
    for (int r = 0; r < R && a.visible(d, r0 + r) < j1; ++r) {
        for (int64_t j = std::max<int64_t>(a.visible(d, r0 + r) - j0, 0); j < n; ++j) {
            s[j*RP + r] = TCA_MASKED;
        }
    }
    dims_softmax<RP>(s, n_padded, w.m, w.l);

    constexpr int N = TCA_REGISTERS == 32 ? (R > 4 ? 2 : 4) : (R > 4 ? 1 : 2);
    std::fill_n(w.o.begin(), R*dv, 0.0f);
    dims_tiles(a.v->type, v, a.v->nb[1], n, dv, w.rows, [&](int j, const char * rows, size_t row_size, int n_tile, auto reader) {
        dims_ahead ahead = { k + (n + j)*a.k->nb[1], j1 < d[TCA_DESC_USED] ? a.k->nb[1] : 0 };
        int64_t i = 0;
        for (; i + N*V::lanes <= dv; i += N*V::lanes) {
            dims_weigh<decltype(reader), R, N>(s + j*RP, rows, row_size, n_tile, i, dv, w.o.data(), ahead);
            ahead.row_size = 0;
        }
        for (; i < dv; i += V::lanes) {
            dims_weigh<decltype(reader), R, 1>(s + j*RP, rows, row_size, n_tile, i, dv, w.o.data(), ahead);
            ahead.row_size = 0;
        }
    });
}

// Whether this kernel is the one to use: two passes over a chunk, the second out of the cache, still beat the other kernel.
inline bool dims_serves(const tca_attn_args & a, int64_t n_rows) {
    return n_rows <= 2*DIMS_MAX_ROWS && a.k->ne[0] % tca_full::lanes == 0 && a.v->ne[0] % tca_full::lanes == 0;
}

// Rows [r0, r0 + n_rows) of the queries of a (sequence, KV head) over the slots [j0, j1) of its region, at most TCA_ATTN_CHUNK;
// results in `w`.
void dims_attend(const tca_attn_args & a, const int32_t * d, int64_t head, int64_t r0, int n_rows, int64_t j0, int64_t j1, dims_state & w) {
    constexpr int lanes = tca_dims::lanes;
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];
    w.q.resize(dk*n_rows*tca_dims::keys);
    w.s.resize((TCA_ATTN_CHUNK + DIMS_TILE)*DIMS_MAX_ROWS);
    w.o.resize(dv*n_rows);
    for (int r = 0; r < n_rows; ++r) {
        const float * src = a.query(d, head, r0 + r);
        for (int64_t i = 0; i < dk; i += lanes) {
            float * to = &w.q[(i*n_rows + r*lanes)*tca_dims::keys];
            for (int l = 0; l < tca_full::lanes; ++l) {
                to[l] = src[i + l%lanes]*a.scale;
            }
        }
    }
    switch (n_rows) {
        case 1: dims_run<1>(a, d, r0, j0, j1, w); break;
        case 2: dims_run<2>(a, d, r0, j0, j1, w); break;
        case 3: dims_run<3>(a, d, r0, j0, j1, w); break;
        case 4: dims_run<4>(a, d, r0, j0, j1, w); break;
        case 5: dims_run<5>(a, d, r0, j0, j1, w); break;
        case 6: dims_run<6>(a, d, r0, j0, j1, w); break;
        case 7: dims_run<7>(a, d, r0, j0, j1, w); break;
        case 8: dims_run<8>(a, d, r0, j0, j1, w); break;
    }
}

} // namespace
