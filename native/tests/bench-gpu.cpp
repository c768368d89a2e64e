// Prefill and decode of one model file on the GPU, one line of JSON a depth: the context is filled once, decode is timed at each
// depth on the way, and the fill between depths is timed as prefill.
//
//   tca-bench-gpu MODEL f16|q8_0 DEPTH,DEPTH,... [ubatch]
//
// "kv_driver" is what the driver's free memory fell by when the context was created, less what a context of one
// micro-batch takes: the compute buffers, and the KV of that one micro-batch, cancel out.
#include "llama.h"

#include "ggml-backend.h"
#include "tca.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR || strstr(text, "tca: ragged")) {
        fputs(text, stderr);
    }
}

struct run_t {
    llama_context * ctx;
    int n_vocab, n_past = 0;
    uint64_t seed = 1;

    llama_token token() {
        seed = seed*6364136223846793005ull + 1442695040888963407ull;
        return (seed >> 33) % n_vocab;
    }

    // n tokens in micro-batches; seconds
    double feed(int n, int batch) {
        const double start = now();
        while (n > 0) {
            std::vector<llama_token> tokens(std::min(n, batch));
            for (llama_token & t : tokens) { t = token(); }
            if (llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) != 0) {
                fprintf(stderr, "llama_decode failed\n");
                exit(1);
            }
            if (batch == 1) {
                llama_synchronize(ctx);
            }
            n      -= tokens.size();
            n_past += tokens.size();
        }
        llama_synchronize(ctx);
        return now() - start;
    }
};

int main(int argc, char ** argv) {
    if (argc < 4) {
        fprintf(stderr, "usage: %s MODEL f16|q8_0 DEPTH,... [ubatch]\n", argv[0]);
        return 1;
    }
    llama_log_set(quiet, nullptr);
    ggml_backend_load_all();
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_GPU);
    if (dev == nullptr) {
        printf("skip   bench-gpu: no GPU\n");
        return 0;
    }
    std::vector<int> depths;
    for (const char * p = argv[3]; *p; p += strspn(p, ",")) {
        depths.push_back(strtol(p, (char **) &p, 10));
    }
    const int  n_decode = 64, n_ubatch = argc > 4 ? atoi(argv[4]) : 2048;
    const ggml_type type = strcmp(argv[2], "q8_0") == 0 ? GGML_TYPE_Q8_0 : GGML_TYPE_F16;

    llama_model_params mp = llama_model_default_params();
    mp.n_gpu_layers = 999;
    llama_model * model = llama_model_load_from_file(argv[1], mp);
    if (model == nullptr) {
        return 1;
    }
    llama_context_params cp = llama_context_default_params();
    cp.n_batch = cp.n_ubatch = n_ubatch;
    cp.n_seq_max       = 1;
    cp.type_k          = cp.type_v = type;
    cp.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    cp.no_perf         = true;

    size_t before, total, used[2];
    llama_context * ctx = nullptr;
    const int sizes[2] = { n_ubatch, depths.back() };
    for (int i = 0; i < 2; ++i) {
        cp.n_ctx = sizes[i] + (i ? (int) depths.size()*(n_decode + 8) + 256 : 0);
        cp.n_ctx = (cp.n_ctx + 255)/256*256;
        if (ctx) {
            llama_free(ctx);
        }
        size_t after;
        ggml_backend_dev_memory(dev, &before, &total);
        ctx = llama_init_from_model(model, cp);
        if (ctx == nullptr) {
            return 1;
        }
        ggml_backend_dev_memory(dev, &after, &total);
        used[i] = before - after;
    }

    tca_context_info info = {};
    tca_context_get_info(ctx, &info);
    run_t run { ctx, llama_vocab_n_tokens(llama_model_get_vocab(model)) };
    run.feed(4096, n_ubatch);  // warm up: kernels, memory pools, CUDA graphs
    run.feed(16, 1);
    llama_memory_clear(llama_get_memory(ctx), true);
    run.n_past = 0;

    double prefill = 0.0;
    int    n_prefill = 0;
    for (int depth : depths) {
        const int n = depth - run.n_past;
        const double seconds = run.feed(n, n_ubatch);
        prefill   += seconds;
        n_prefill += n;
        run.feed(8, 1);
        const double decode = run.feed(n_decode, 1);
        printf("{\"model\": \"%s\", \"tca\": %s, \"kv\": \"%s\", \"ubatch\": %d, \"depth\": %d, \"prompt_tps\": %.1f, \"fill_tps\": %.1f, "
                "\"decode_tps\": %.2f, \"kv_driver\": %zu, \"kv_alloc\": %llu, \"kv_dense\": %llu}\n", argv[1], info.active ? "true" : "false",
                argv[2], n_ubatch, depth, n_prefill/prefill, n/seconds, n_decode/decode, used[1] - used[0],
                (unsigned long long) info.kv_bytes, (unsigned long long) info.kv_bytes_dense);
        fflush(stdout);
    }
    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
