// What a TCA node carries: its numbers, and its sources by name.
#include "tca-ops.h"

#include "ggml-impl.h"

#include <cstddef>
#include <cstring>
#include <type_traits>

static_assert(sizeof(tca_op_params) <= GGML_MAX_OP_PARAMS, "op_params too small");
static_assert(std::is_trivially_copyable<tca_op_params>::value, "op_params are bytes");
static_assert(offsetof(tca_op_params, no_function) == offsetof(ggml_custom_op_params, fun) &&
    sizeof(tca_op_params::no_function) == sizeof(ggml_custom_op_params::fun), "where ggml keeps the function");
static_assert(offsetof(tca_op_params, n_tasks) == offsetof(ggml_custom_op_params, n_tasks), "where ggml keeps the number of tasks");

tca_op_params tca_op_get_params(const ggml_tensor * node) {
    tca_op_params params;
    memcpy(&params, node->op_params, sizeof(params));
    return params;
}

tca_op tca_op_of(const ggml_tensor * node) {
    if (node->op != GGML_OP_CUSTOM) {
        return TCA_OP_NONE;
    }
    const tca_op_params params = tca_op_get_params(node);
    return params.magic == TCA_MAGIC && params.no_function == 0 ? params.op : TCA_OP_NONE;
}

// The first source behind the destination that an in-place node carries.
static ggml_tensor * const * sources(const ggml_tensor * node) {
    return node->src + (node->view_src ? 1 : 0);
}

tca_append_node tca_append_node::of(const ggml_tensor * node) {
    ggml_tensor * const * src = node->src;  // k is the destination
    return { src[0], src[1], src[2], src[3], src[4], src[5], tca_op_get_params(node).row };
}

tca_attn_node tca_attn_node::of(const ggml_tensor * node) {
    ggml_tensor * const * src = sources(node);
    const tca_op_params   p   = tca_op_get_params(node);
    ggml_tensor * sinks = p.op == TCA_OP_ATTN ? src[4] : nullptr;
    return { src[0], src[1], src[2], src[3], sinks, p.row, p.scale, p.softcap, p.n_chunks, src[0]->ne[1]/src[3]->ne[1] };
}

tca_combine_node tca_combine_node::of(const ggml_tensor * node) {
    ggml_tensor * const * src = sources(node);
    return { src[0], src[1], src[2], tca_op_get_params(node).row };
}

tca_compact_node tca_compact_node::of(const ggml_tensor * node) {
    ggml_tensor * const * src = node->src;  // k is the destination
    const tca_op_params   p   = tca_op_get_params(node);
    return { src[0], src[1], src[2], src[3], { src[4], src[5], src[6], p.select }, src[7], p.row, p.scale, p.softcap };
}

void tca_desc::write(int32_t * fields) const {
    fields[TCA_DESC_OFFSET] = offset;
    fields[TCA_DESC_PAST]   = past;
    fields[TCA_DESC_TOKEN]  = token;
    fields[TCA_DESC_COUNT]  = count;
    fields[TCA_DESC_POS]    = pos;
    fields[TCA_DESC_GROUP]  = group;
    fields[TCA_DESC_CONFIG] = config;
    fields[TCA_DESC_USED]   = past + count;
    fields[TCA_DESC_STASH]  = stash;
}

const int32_t * tca_desc_of(const ggml_tensor * desc, int row, int64_t seq, int64_t head) {
    return (const int32_t *) ((const char *) desc->data + head*desc->nb[1] + seq*desc->nb[2] + row*desc->nb[3]);
}
