// What a TCA node carries, for every backend; lives in ggml-base.
#include "tca-ops.h"

#include <cstring>

// ggml keeps { function, n_tasks, userdata } at the start of a custom node's op_params
struct custom_header {
    ggml_custom_op_t fun;
    int              n_tasks;
    void           * userdata;
};

static_assert(sizeof(custom_header) + sizeof(tca_op_params) <= GGML_MAX_OP_PARAMS, "op_params too small");

void tca_op_set_params(ggml_tensor * node, const tca_op_params & params) {
    memcpy((char *) node->op_params + sizeof(custom_header), &params, sizeof(params));
}

tca_op_params tca_op_get_params(const ggml_tensor * node) {
    tca_op_params params;
    memcpy(&params, (const char *) node->op_params + sizeof(custom_header), sizeof(params));
    return params;
}

tca_op tca_op_of(const ggml_tensor * node) {
    if (node->op != GGML_OP_CUSTOM) {
        return TCA_OP_NONE;
    }
    const tca_op_params params = tca_op_get_params(node);
    return params.magic == TCA_MAGIC ? (tca_op) params.op : TCA_OP_NONE;
}

const tca_select_params * tca_op_select_params(const ggml_tensor * node) {
    custom_header header;
    memcpy(&header, node->op_params, sizeof(header));
    return (const tca_select_params *) header.userdata;
}
