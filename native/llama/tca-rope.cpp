#include "tca-rope.h"

#include "tca-cpu-backend.h"

#include "llama-cparams.h"
#include "llama-hparams.h"
#include "llama-model.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

tca_rope llama_tca_rope(const llama_model & model, const llama_cparams & cparams, int il, std::vector<float> & freqs) {
    const llama_hparams & hparams = model.hparams;
    const int n_rot = hparams.n_rot(il);

    tca_rope rope = { TCA_ROPE_NONE, 0, 1.0f, nullptr };
    freqs.clear();
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || n_rot == 0) {
        return rope;
    }

    ggml_tensor * factors_model = model.get_rope_factors(cparams, il);

    const ggml_init_params params = { 16*ggml_tensor_overhead() + ggml_graph_overhead() + (size_t) (1 << 20), nullptr, false };
    ggml_context_ptr ctx { ggml_init(params) };

    ggml_tensor * x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_rot, 1, 1);
    ggml_tensor * pos = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, 1);
    ((int32_t *) pos->data)[0] = 1;

    ggml_tensor * factors = nullptr;
    if (factors_model != nullptr) {
        factors = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, ggml_nelements(factors_model));
        ggml_backend_tensor_get(factors_model, factors->data, 0, ggml_nbytes(factors));
    }

    const bool neox = hparams.rope_type == LLAMA_ROPE_TYPE_NEOX;
    float * unit = (float *) x->data;
    for (int i = 0; i < n_rot/2; ++i) {
        unit[neox ? i             : 2*i    ] = 1.0f;
        unit[neox ? i + n_rot/2   : 2*i + 1] = 0.0f;
    }

    ggml_tensor * y = ggml_rope_ext(ctx.get(), x, pos, factors, n_rot, hparams.rope_type, cparams.n_ctx_orig_yarn,
            model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il), cparams.yarn_ext_factor,
            cparams.yarn_attn_factor, cparams.yarn_beta_fast, cparams.yarn_beta_slow);
    ggml_cgraph * gf = ggml_new_graph(ctx.get());
    ggml_build_forward_expand(gf, y);
    const ggml_backend_ptr backend = tca_cpu_backend_new(1);
    if (!backend || ggml_backend_graph_compute(backend.get(), gf) != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string("tca: ") + TCA_NO_CPU_BACKEND);
    }

    const float * out = (const float *) y->data;
    freqs.resize(n_rot/2);
    for (int i = 0; i < n_rot/2; ++i) {
        const float c = out[neox ? i           : 2*i    ];
        const float s = out[neox ? i + n_rot/2 : 2*i + 1];
        freqs[i]   = std::atan2(s, c);
        rope.scale = std::hypot(s, c);
    }
    rope.type  = neox ? TCA_ROPE_NEOX : TCA_ROPE_NORM;
    rope.n_rot = n_rot;
    rope.freqs = freqs.data();
    return rope;
}
