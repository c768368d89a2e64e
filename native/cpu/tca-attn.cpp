#include "ops/tca-ops.h"
#include "tca-convert.h"

// ggml-cpu's own headers: this file is compiled into the ggml-cpu target
#include "ggml-cpu-impl.h"
#include "simd-gemm.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int TILE_ROWS = 128;  // query rows that share one conversion of a K and V tile
constexpr int TILE_KEYS = 64;   // slots in a tile; with head_dim 128: K, V, S and O tiles of 32 to 64 KB, all in L2

struct scratch_t {
    std::vector<float> q;   // [TILE_ROWS, head_dim_k], scaled
    std::vector<float> k;   // [TILE_KEYS, head_dim_k]
    std::vector<float> kt;  // [head_dim_k, TILE_KEYS]
    std::vector<float> v;   // [TILE_KEYS, head_dim_v]
    std::vector<float> s;   // [TILE_ROWS, TILE_KEYS]
    std::vector<float> o;   // [TILE_ROWS, head_dim_v]
    std::vector<float> m, l;         // [TILE_ROWS] running maximum and sum
    std::vector<int64_t> visible;    // [TILE_ROWS] slots of the region that the row sees

    void resize(int64_t dk, int64_t dv) {
        q.resize(TILE_ROWS*dk);
        k.resize(TILE_KEYS*dk);
        kt.resize(TILE_KEYS*dk);
        v.resize(TILE_KEYS*dv);
        s.resize(TILE_ROWS*TILE_KEYS);
        o.resize(TILE_ROWS*dv);
        m.resize(TILE_ROWS);
        l.resize(TILE_ROWS);
        visible.resize(TILE_ROWS);
    }
};

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

void transpose(const float * src, float * dst, int n_rows, int n_cols) {
    for (int c0 = 0; c0 < n_cols; c0 += 16) {
        const int c1 = std::min(c0 + 16, n_cols);
        for (int r = 0; r < n_rows; ++r) {
            for (int c = c0; c < c1; ++c) {
                dst[(size_t) c*n_rows + r] = src[(size_t) r*n_cols + c];
            }
        }
    }
}

void load_queries(const attn_args & a, const int32_t * d, int64_t head, int64_t r0, int n_rows, scratch_t & w) {
    const int64_t dk = a.q->ne[0];
    for (int r = 0; r < n_rows; ++r) {
        const int64_t t = (r0 + r)/a.gqa;
        const int64_t g = (r0 + r)%a.gqa;
        const float * src = (const float *) ((const char *) a.q->data + (head*a.gqa + g)*a.q->nb[1] + (d[TCA_DESC_TOKEN] + t)*a.q->nb[2]);
        for (int64_t i = 0; i < dk; ++i) {
            w.q[r*dk + i] = src[i]*a.scale;
        }
        w.visible[r] = d[TCA_DESC_PAST] + t + 1;
    }
}

// Online softmax over the slots [j0, j1) of a region for the rows in w.q. Leaves o (unnormalised), m and l in w.
void attend(const attn_args & a, const int32_t * d, int n_rows, int64_t j0, int64_t j1, scratch_t & w) {
    const int64_t dk = a.k->ne[0];
    const int64_t dv = a.v->ne[0];

    std::fill_n(w.o.begin(), n_rows*dv, 0.0f);
    std::fill_n(w.m.begin(), n_rows, -INFINITY);
    std::fill_n(w.l.begin(), n_rows, 0.0f);

    int first = 0;  // first row that still sees something: visible[] never decreases
    for (int64_t j = j0; j < j1; j += TILE_KEYS) {
        const int     n_keys = std::min<int64_t>(TILE_KEYS, j1 - j);
        const int64_t slot   = d[TCA_DESC_OFFSET] + j;
        while (first < n_rows && w.visible[first] <= j) {
            ++first;
        }
        if (first == n_rows) {
            break;
        }
        const int n_active = n_rows - first;

        tca_rows_to_f32(a.k->type, (const char *) a.k->data + slot*a.k->nb[1], w.k.data(), n_keys*dk);
        tca_rows_to_f32(a.v->type, (const char *) a.v->data + slot*a.v->nb[1], w.v.data(), n_keys*dv);
        std::fill(w.k.begin() + n_keys*dk, w.k.end(), 0.0f);
        std::fill(w.v.begin() + n_keys*dv, w.v.end(), 0.0f);
        transpose(w.k.data(), w.kt.data(), TILE_KEYS, dk);

        std::fill_n(w.s.begin() + first*TILE_KEYS, n_active*TILE_KEYS, 0.0f);
        simd_gemm(&w.s[first*TILE_KEYS], &w.q[first*dk], w.kt.data(), n_active, dk, TILE_KEYS);

        for (int r = first; r < n_rows; ++r) {
            float   * s = &w.s[r*TILE_KEYS];
            const int n = std::min<int64_t>(n_keys, w.visible[r] - j);
            if (a.softcap != 0.0f) {
                for (int i = 0; i < n; ++i) {
                    s[i] = a.softcap*tanhf(s[i]/a.softcap);
                }
            }
            float max;
            ggml_vec_max_f32(n, &max, s);
            if (max > w.m[r]) {
                const float shrink = expf(w.m[r] - max);  // 0 for the first tile
                w.m[r]  = max;
                w.l[r] *= shrink;
                ggml_vec_scale_f32(dv, &w.o[r*dv], shrink);
            }
            w.l[r] += ggml_vec_soft_max_f32(n, s, s, w.m[r]);
            std::fill(s + n, s + TILE_KEYS, 0.0f);
        }
        simd_gemm(&w.o[first*dv], &w.s[first*TILE_KEYS], w.v.data(), n_active, TILE_KEYS, dv);
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

void tca_cpu_attn(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const attn_args a(dst);
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];

    static thread_local scratch_t w;
    w.resize(dk, dv);

    const auto for_each_tile = [&](auto && visit) {
        for (int64_t s = 0; s < a.desc->ne[2]; ++s) {
            for (int64_t h = 0; h < a.desc->ne[1]; ++h) {
                const int32_t * d = a.region(s, h);
                const int64_t n_rows = d[TCA_DESC_COUNT]*a.gqa;
                for (int64_t r0 = 0; r0 < n_rows; r0 += TILE_ROWS) {
                    const int n = std::min<int64_t>(TILE_ROWS, n_rows - r0);
                    visit(d, h, r0, n, (double) n*(d[TCA_DESC_PAST] + (r0 + n - 1)/a.gqa + 1));
                }
            }
        }
    };

    work_split work(ith, nth);
    for_each_tile([&](const int32_t *, int64_t, int64_t, int, double cost) { work.total += cost; });
    for_each_tile([&](const int32_t * d, int64_t h, int64_t r0, int n, double cost) {
        if (!work.mine(cost)) {
            return;
        }
        load_queries(a, d, h, r0, n, w);
        attend(a, d, n, 0, w.visible[n - 1], w);
        for (int r = 0; r < n; ++r) {
            const int64_t t = d[TCA_DESC_TOKEN] + (r0 + r)/a.gqa;
            const int64_t q = h*a.gqa + (r0 + r)%a.gqa;
            float * out = (float *) ((char *) dst->data + q*dst->nb[1] + t*dst->nb[2]);
            const float norm = 1.0f/w.l[r];
            for (int64_t i = 0; i < dv; ++i) {
                out[i] = w.o[r*dv + i]*norm;
            }
        }
    });
}

// dst [head_dim_v + 2, n_chunks, n_head, n_tokens]
void tca_cpu_attn_partial(ggml_tensor * dst, int ith, int nth, void * /*userdata*/) {
    const attn_args a(dst);
    const int64_t dk = a.k->ne[0], dv = a.v->ne[0];

    static thread_local scratch_t w;
    w.resize(dk, dv);

    const auto for_each_chunk = [&](auto && visit) {
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
    for_each_chunk([&](const int32_t *, int64_t, int64_t, int64_t, double cost) { work.total += cost; });
    for_each_chunk([&](const int32_t * d, int64_t h, int64_t c, int64_t j1, double cost) {
        if (!work.mine(cost)) {
            return;
        }
        const int n = d[TCA_DESC_COUNT]*a.gqa;  // <= TCA_ATTN_PARTIAL_ROWS, the builder saw to it
        load_queries(a, d, h, 0, n, w);
        attend(a, d, n, c*TCA_ATTN_CHUNK, j1, w);
        for (int r = 0; r < n; ++r) {
            const int64_t t = d[TCA_DESC_TOKEN] + r/a.gqa;
            const int64_t q = h*a.gqa + r%a.gqa;
            float * out = (float *) ((char *) dst->data + c*dst->nb[1] + q*dst->nb[2] + t*dst->nb[3]);
            std::copy_n(&w.o[r*dv], dv, out);
            out[dv + 0] = w.m[r];
            out[dv + 1] = w.l[r];
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

                float max = -INFINITY;
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
