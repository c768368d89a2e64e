#include "tca-device.h"

#include "metrics/tca-metric.h"
#include "rpc/tca-rpc.h"

#include "ggml-cpp.h"

#include <cstring>
#include <vector>

namespace {

// The nodes of a layer over tensors without memory.
struct probe_nodes {
    ggml_context_ptr ctx;
    ggml_tensor * append;
    std::vector<ggml_tensor *> others;

    probe_nodes(const tca_layer_shape & s, const tca_select_params * params) : ctx(ggml_init({ 32*ggml_tensor_overhead(), nullptr, true })) {
        ggml_context * c = ctx.get();
        ggml_tensor * k    = ggml_new_tensor_2d(c, s.type_k, s.head_dim_k, 64);
        ggml_tensor * v    = ggml_new_tensor_2d(c, s.type_v, s.head_dim_v, 64);
        ggml_tensor * pos  = ggml_new_tensor_1d(c, GGML_TYPE_I32, 64);
        ggml_tensor * desc = ggml_new_tensor_4d(c, GGML_TYPE_I32, TCA_DESC_SIZE, s.n_head_kv, 1, 1);
        ggml_tensor * q    = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_k, s.n_head,    1);
        ggml_tensor * kc   = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_k, s.n_head_kv, 1);
        ggml_tensor * vc   = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_v, s.n_head_kv, 1);
        append = tca_build_append(c, k, v, pos, kc, vc, desc, 0);
        if (params == nullptr) {
            return;
        }
        ggml_tensor * sinks   = s.sinks ? ggml_new_tensor_1d(c, GGML_TYPE_F32, s.n_head) : nullptr;
        ggml_tensor * combine = tca_build_attn_split(c, q, k, v, desc, 0, 1.0f, 0.0f, 1, nullptr, sinks);
        others = {
            tca_build_attn(c, q, k, v, desc, 0, 1.0f, 0.0f, nullptr, sinks),
            tca_combine_node::of(combine).partial,
            combine,
            tca_build_compact(c, k, v, pos, desc, 0, tca_tables_new(c, *params, s.head_dim_k, s.n_head_kv, nullptr), q, 1.0f, 0.0f),
        };
    }
};

} // namespace

std::string tca_types_problem(const tca_layer_shape & s) {
    for (const bool is_k : { true, false }) {
        const ggml_type type     = is_k ? s.type_k : s.type_v;
        const int64_t   head_dim = is_k ? s.head_dim_k : s.head_dim_v;
        const std::string what = std::string(is_k ? "K" : "V") + " cache type " + ggml_type_name(type);
        if (head_dim % ggml_blck_size(type) != 0) {
            return what + " needs a head size divisible by " + std::to_string(ggml_blck_size(type)) + ", this model has " +
                std::to_string(head_dim) + "; use f16";
        }
        tca_layer_shape alone = s;
        alone.type_k = alone.type_v = type;
        alone.head_dim_k = alone.head_dim_v = head_dim;
        const probe_nodes nodes(alone, nullptr);
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        if (cpu == nullptr || !ggml_backend_dev_supports_op(cpu, nodes.append)) {
            return what + " is not supported; use f16, q8_0 or q4_0";
        }
    }
    return "";
}

std::string tca_device_problem(ggml_backend_dev_t dev, const tca_layer_shape & s, const tca_select_params & params) {
    const std::string device = std::string("device ") + ggml_backend_dev_name(dev) + " (" + ggml_backend_dev_description(dev) + ")";
    const std::string advice = "; keep the KV cache on the CPU (--no-kv-offload), keep the layers there (-ngl 0), or load with "
        "--override-kv tca.enabled=bool:false";
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);
    const bool remote = reg && strcmp(ggml_backend_reg_name(reg), "RPC") == 0;
    const auto server = remote ? (tca_rpc_status_fn) ggml_backend_reg_get_proc_address(reg, "tca_rpc_status") : nullptr;
    if (remote && server == nullptr) {
        // such a device takes every node that it is asked about, whatever runs at the other end
        return device + " is reached by an RPC backend that is not of this build" + advice;
    }
    const probe_nodes nodes(s, &params);
    bool runs = ggml_backend_dev_supports_op(dev, nodes.append);
    for (ggml_tensor * node : nodes.others) {
        runs = runs && ggml_backend_dev_supports_op(dev, node);
    }
    if (remote && !runs) {
        const std::string start = "; start it there with: tca-gguf exec rpc-server";
        switch (server(ggml_backend_dev_description(dev))) {
            case TCA_RPC_LOST:        return device + ": the server is gone";
            case TCA_RPC_FOREIGN:     return device + ": the server there is not tca-gguf's" + start + advice;
            case TCA_RPC_OTHER_BUILD: return device + ": the server there is another build of tca-gguf; install the same on both machines" + advice;
            case TCA_RPC_SAME_BUILD:  break;  // it cannot run them
        }
    }
    return runs ? "" : device + " cannot run the TCA ops with this model (" + std::to_string(s.n_head) + " heads over " +
        std::to_string(s.n_head_kv) + " KV heads of " + std::to_string(s.head_dim_k) + (s.sinks ? ", with attention sinks" : "") + "), K " + ggml_type_name(s.type_k) + ", V " +
        ggml_type_name(s.type_v) + " and metric " + params.metric->name + advice;
}
