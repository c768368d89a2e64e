// C API: where the time of a forward pass goes, and the machine's limits to hold it against.
#include "tca-error.h"

#include "llama/tca-cpu-backend.h"
#include "ops/tca-ops.h"

#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

struct tca_profile {
    tca_profile_mode     mode = TCA_PROFILE_OFF;
    std::vector<uint8_t> learned;       // class of every node of the graph, in order
    size_t               at = 0;        // node that is asked about next
    bool                 other = false; // a node that is not the learned one was met
    double               seconds[TCA_PROFILE_N_CLASSES] = {};

    std::chrono::steady_clock::time_point started;
};

tca_profile * tca_profile_new(void) {
    return new tca_profile;
}

void tca_profile_free(tca_profile * profile) {
    delete profile;
}

void tca_profile_start(tca_profile * profile, tca_profile_mode mode) {
    profile->mode = mode;
    profile->at   = 0;
    if (mode == TCA_PROFILE_LEARN) {
        profile->learned.clear();
        profile->other = false;
    }
    if (mode == TCA_PROFILE_TIME) {
        std::fill(std::begin(profile->seconds), std::end(profile->seconds), 0.0);
    }
}

tca_status tca_profile_read(const tca_profile * profile, double * seconds) {
    if (profile->other || profile->at != profile->learned.size() || profile->learned.empty()) {
        return tca_fail(TCA_ERR_ARGUMENT, "the forward pass that was timed has another graph than the one that was learned");
    }
    std::copy(std::begin(profile->seconds), std::end(profile->seconds), seconds);
    return TCA_OK;
}

tca_status tca_machine_limits(int32_t n_threads, double * read_bandwidth, double * fma_peak) {
    if (n_threads < 1 || n_threads > 1024) {
        return tca_fail(TCA_ERR_ARGUMENT, "n_threads is " + std::to_string(n_threads) + "; it must be from 1 to 1024");
    }
    const tca_cpu_functions * cpu = tca_cpu_functions_get();
    if (cpu == nullptr) {
        return tca_fail(TCA_ERR_UNSUPPORTED, TCA_NO_CPU_BACKEND);
    }
    *read_bandwidth = cpu->read_bandwidth(n_threads);
    *fma_peak       = cpu->fma_peak(n_threads);
    return TCA_OK;
}

// A node that only looks at memory in another way belongs to the one before it: it must not cut a run of nodes in two.
static uint8_t class_of(const ggml_tensor * t, uint8_t before) {
    switch (t->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return before;
        case GGML_OP_FLASH_ATTN_EXT:
            return TCA_PROFILE_ATTENTION;
        case GGML_OP_SET_ROWS:
            return TCA_PROFILE_APPEND;
        default:
            break;
    }
    switch (tca_op_of(t)) {
        case TCA_OP_ATTN:
        case TCA_OP_ATTN_PARTIAL:
        case TCA_OP_ATTN_COMBINE:
            return TCA_PROFILE_ATTENTION;
        case TCA_OP_APPEND:
            return TCA_PROFILE_APPEND;
        case TCA_OP_COMPACT:
            return TCA_PROFILE_SELECT;
        default:
            // upstream's attention without the fused op: kq, kq_soft_max, kqv, kqv_out (llama-graph.cpp, build_attn_mha)
            return strncmp(t->name, "kq", 2) == 0 ? TCA_PROFILE_ATTENTION : TCA_PROFILE_OTHER;
    }
}

bool tca_profile_eval(ggml_tensor * t, bool ask, void * data) {
    tca_profile & p = *(tca_profile *) data;
    if (!ask) {
        const auto now = std::chrono::steady_clock::now();
        p.seconds[p.learned[p.at - 1]] += std::chrono::duration<double>(now - p.started).count();
        return true;
    }
    if (p.mode == TCA_PROFILE_LEARN) {
        p.learned.push_back(class_of(t, p.learned.empty() ? (uint8_t) TCA_PROFILE_OTHER : p.learned.back()));
        p.at = p.learned.size();
        return false;
    }
    if (p.mode != TCA_PROFILE_TIME || p.learned.empty()) {
        return false;
    }
    const size_t n = p.learned.size(), i = p.at == n ? 0 : p.at;  // another pass over the same graph starts over
    p.at = i + 1;
    if (class_of(t, i == 0 ? (uint8_t) TCA_PROFILE_OTHER : p.learned[i - 1]) != p.learned[i]) {
        p.other = true;
    }
    // nodes up to here are computed together and waited for: the end of a run of one class
    const bool ends = i + 1 == n || p.learned[i + 1] != p.learned[i];
    p.started = std::chrono::steady_clock::now();
    return ends;
}
