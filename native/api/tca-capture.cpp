// C API: Q, K and V of every layer during a forward pass over the stock cache, for calibration.
#include "tca-error.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <cmath>
#include <cstring>
#include <vector>

struct tca_capture {
    tca_capture_fn fn;
    void         * user_data;
    int            layer = 0;

    std::vector<float>   q, k, v, sinks;
    std::vector<uint8_t> raw;
};

tca_capture * tca_capture_new(tca_capture_fn fn, void * user_data) {
    tca_capture * capture = new tca_capture;
    capture->fn        = fn;
    capture->user_data = user_data;
    return capture;
}

void tca_capture_free(tca_capture * capture) {
    delete capture;
}

// Copies t [dim, n_rows, n_heads], whatever its strides and type, to dst as [n_heads, n_used, dim] f32.
static void fetch(const ggml_tensor * t, int64_t n_used, std::vector<uint8_t> & raw, std::vector<float> & dst) {
    const int64_t dim = t->ne[0], n_heads = t->ne[2];
    const size_t  row = ggml_row_size(t->type, dim);
    dst.resize(n_heads*n_used*dim);

    // one read of the whole byte range the view covers, then rows are picked from it
    const size_t n_bytes = (n_heads - 1)*t->nb[2] + (n_used - 1)*t->nb[1] + row;
    raw.resize(n_bytes);
    ggml_backend_tensor_get(t, raw.data(), 0, n_bytes);
    for (int64_t h = 0; h < n_heads; ++h) {
        for (int64_t r = 0; r < n_used; ++r) {
            const uint8_t * src = raw.data() + h*t->nb[2] + r*t->nb[1];
            float * out = &dst[(h*n_used + r)*dim];
            if (t->type == GGML_TYPE_F32) {
                memcpy(out, src, row);
            } else {
                ggml_get_type_traits(t->type)->to_float(src, out, dim);
            }
        }
    }
}

// Keys that the last query sees: those of a sequence that is alone in the cache stand at its start, in order. The mask of the
// stock cache [n_kv, n_tokens] knows how many they are; K itself is padded.
static int32_t count_keys(const ggml_tensor * mask, int64_t n_tokens, std::vector<uint8_t> & raw) {
    raw.resize(mask->nb[1]);
    ggml_backend_tensor_get(mask, raw.data(), (n_tokens - 1)*mask->nb[1], mask->nb[1]);
    int64_t n = mask->ne[0];
    const auto hidden = [&](int64_t i) {
        return std::isinf(mask->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(((const ggml_fp16_t *) raw.data())[i]) : ((const float *) raw.data())[i]);
    };
    while (n > 0 && hidden(n - 1)) {
        --n;
    }
    return n;
}

bool tca_capture_eval(ggml_tensor * t, bool ask, void * data) {
    if (t->op != GGML_OP_FLASH_ATTN_EXT) {
        return !ask;  // asked: not interested; told: go on
    }
    if (ask) {
        return true;
    }
    tca_capture & c = *(tca_capture *) data;

    const ggml_tensor * q = t->src[0];  // [head_dim_k, n_tokens, n_head]
    const ggml_tensor * k = t->src[1];  // [head_dim_k, n_kv, n_head_kv], padded at the end
    const ggml_tensor * v = t->src[2];

    // "cache_k_l<layer>" is what the view of K was taken from; on its way to another device it is copied as "DEVICE#name#number"
    const ggml_tensor * store = k->view_src ? k->view_src : k;
    const char * name = strstr(store->name, "cache_k_l");
    if (name == nullptr || sscanf(name, "cache_k_l%d", &c.layer) != 1) {
        return false;
    }

    tca_layer_qkv layer = {};
    layer.layer      = c.layer;
    layer.n_tokens   = q->ne[1];
    layer.n_kv       = t->src[3] ? count_keys(t->src[3], q->ne[1], c.raw) : q->ne[1];
    layer.n_head     = q->ne[2];
    layer.n_head_kv  = k->ne[2];
    layer.head_dim_k = k->ne[0];
    layer.head_dim_v = v->ne[0];
    memcpy(&layer.scale,   (const float *) t->op_params + 0, sizeof(float));
    memcpy(&layer.softcap, (const float *) t->op_params + 2, sizeof(float));

    if (const ggml_tensor * sinks = t->src[4]) {  // [n_head]
        c.sinks.resize(ggml_nelements(sinks));
        ggml_backend_tensor_get(sinks, c.sinks.data(), 0, ggml_nbytes(sinks));
        layer.sinks = c.sinks.data();
    }
    fetch(q, layer.n_tokens, c.raw, c.q);
    fetch(k, layer.n_kv,     c.raw, c.k);
    fetch(v, layer.n_kv,     c.raw, c.v);
    layer.q = c.q.data();
    layer.k = c.k.data();
    layer.v = c.v.data();
    return c.fn(&layer, c.user_data);
}
