// The ggml ops of TCA: append, attend, combine, compact. A node holds an operation and numbers (tca_op_params) and its sources
// are tensors: no address of this process is in it, so it can be run by a backend that was loaded later, or on another machine.
//
// The nodes are GGML_OP_CUSTOM with a NULL function: ggml itself needs no new op, its tables and its CUSTOM paths (allocation,
// number of tasks, splitting over backends) stay as they are, and what tells our nodes from others is the magic number.
// Builders and readers live in ggml-base and know no backend; a backend implements supports(device, node) and
// forward(context, node) over the readers below.
//
// Words
//   slot         a row of the store: one token of one KV head       region   the slots of a (sequence, KV head)
//   segment      tokens of a micro-batch up to the next compaction   group    the tokens that are compacted together
//   block        block_size tokens of a group                        config   how many blocks of a group keep how many tokens
//   desc row     what a segment does to the regions of a layer       query row  one (query token, query head of the GQA group)
//   chunk        slots of a region that one unit of ATTN_PARTIAL works on
//
// The ragged store of a layer is three tensors with one slot a token and KV head:
//   k    [head_dim_k, n_slots]  f32, f16, bf16 or quantized     v    [head_dim_v, n_slots]     pos  I32 [n_slots]
// Each (sequence, KV head) owns a contiguous region of it. What an op does to the regions stands in a descriptor, an I32
// graph input [TCA_DESC_SIZE, n_head_kv, n_seqs, n_rows], filled by the host before every micro-batch; an op reads one of
// its rows. Nothing is read back from the device.
#pragma once

#include "tca.h"

#include "ggml.h"

enum tca_desc_field {
    TCA_DESC_OFFSET,  // first slot of the region
    TCA_DESC_PAST,    // slots in use before the tokens of this segment
    TCA_DESC_TOKEN,   // first token of the segment in the micro-batch
    TCA_DESC_COUNT,   // tokens of the segment; 0: nothing to do for this sequence
    TCA_DESC_POS,     // position of the first token; they are consecutive
    TCA_DESC_GROUP,   // slot in the region where the group to compact after the segment starts; -1: none
    TCA_DESC_CONFIG,  // row of tca_tables::configs; TCA_HEAD_DENSE: the head keeps everything
    TCA_DESC_USED,    // slots in use after the segment's tokens (PAST + COUNT)
    TCA_DESC_STASH,   // slot in the region where the rows that the compaction drops are set aside, in their order; -1: nowhere
    TCA_DESC_SIZE,
};

// What a segment does to one region, before it is written down.
struct tca_desc {
    int64_t offset = 0;
    int64_t past   = 0;
    int32_t token  = 0;
    int32_t count  = 0;
    int32_t pos    = 0;
    int64_t group  = -1;
    int32_t config = TCA_HEAD_DENSE;
    int64_t stash  = -1;

    void write(int32_t * fields) const;  // [TCA_DESC_SIZE]
};

// Fields of (sequence, KV head) in a row of a descriptor that lies in host memory.
const int32_t * tca_desc_of(const struct ggml_tensor * desc, int row, int64_t seq, int64_t head);

struct tca_metric;

// How the tokens of a layer's groups are chosen, as the host holds it. Tables and nodes are made from it and copy what they need.
struct tca_select_params {
    int32_t         block_size;
    int32_t         group_size;
    int32_t         n_keep;
    int32_t         n_configs;
    const int32_t * keep_counts;  // [n_keep]
    const int32_t * configs;      // [n_configs, n_keep]
    struct tca_rope rope;
    int32_t         hadamard;     // keys were multiplied by Hadamard matrices of this size (quantized caches); 0: not
    int32_t         layer;
    const struct tca_metric * metric;
    const float *   probe;        // [n_head_kv, head_dim_k], if the metric uses one
};

// The tables of a layer's compaction nodes as tensors, and the numbers beside them.
struct tca_tables {
    struct ggml_tensor * configs = nullptr;  // I32 [n_keep, 1 + n_configs]: the keep counts, then the rows of configs
    struct ggml_tensor * freqs   = nullptr;  // F32 [n_rot/2] radians a position; NULL: the metric sees no keys, or they are not rotated
    struct ggml_tensor * probe   = nullptr;  // F32 [head_dim_k, n_head_kv]; NULL: the metric uses none

    // What a node keeps of tca_select_params in its op_params.
    struct numbers {
        int32_t metric;      // enum tca_metric_id
        int32_t layer;
        int32_t block_size;
        int32_t group_size;
        int32_t hadamard;
        int32_t rope_type;   // enum tca_rope_type
        float   rope_scale;
    } n = {};
};

// New tensors in ctx (at most 3) for what params.metric looks at. configs: a table to share, as layers of one store do; NULL: its
// own. Fill them with tca_tables_set() once they are allocated.
struct tca_tables tca_tables_new(struct ggml_context * ctx, const struct tca_select_params & params, int64_t head_dim_k,
        int64_t n_head_kv, struct ggml_tensor * configs);
void tca_tables_set(const struct tca_tables & tables, const struct tca_select_params & params);

enum tca_op : int32_t {
    TCA_OP_NONE,
    TCA_OP_APPEND,
    TCA_OP_ATTN,          // one pass over each region for many queries
    TCA_OP_ATTN_PARTIAL,  // a few queries: regions cut in chunks of TCA_ATTN_CHUNK slots
    TCA_OP_ATTN_COMBINE,
    TCA_OP_COMPACT,
};

enum {
    TCA_ATTN_CHUNK        = 512,  // slots a unit of ATTN_PARTIAL works on; results do not depend on the number of threads
    TCA_OBSERVED_QUERIES  = 32,   // last queries of a segment that metrics with TCA_NEEDS_QUERIES look at
    TCA_ATTN_PARTIAL_ROWS = 64,   // PARTIAL serves up to this many query rows of a KV head
};

// Whether attention of n_tokens tokens a sequence is split over the slots (tca_build_attn_split) or done in one pass.
inline bool tca_attn_splits(int64_t n_tokens, int64_t n_head, int64_t n_head_kv) {
    return n_tokens*(n_head/n_head_kv) <= TCA_ATTN_PARTIAL_ROWS;
}

// Chunks that the partial results of a region of n_slots need room for: those of the CPU, and more and shorter ones for a GPU,
// which wants work for all its parts at short lengths, too.
inline int tca_attn_n_chunks(int64_t n_slots) {
    const int64_t n = (n_slots + TCA_ATTN_CHUNK - 1)/TCA_ATTN_CHUNK, n_short = (n_slots + TCA_ATTN_CHUNK/4 - 1)/(TCA_ATTN_CHUNK/4);
    return (int) (n > 128 ? n : n_short < 128 ? n_short : 128);
}

constexpr uint32_t TCA_MAGIC = 0x33414354;  // "TCA3"; another one for each change of what a node means

// All of a node's op_params. The first 24 bytes are where ggml keeps { function, n_tasks, userdata } of a GGML_OP_CUSTOM node.
struct tca_op_params {
    uint64_t no_function;  // 0
    int32_t  n_tasks;      // GGML_N_TASKS_MAX: as many as there are threads
    tca_op   op;
    uint32_t magic;
    int32_t  row;          // row of the descriptor
    float    scale;
    float    softcap;
    int32_t  n_chunks;     // PARTIAL, COMBINE
    tca_tables::numbers select;  // COMPACT
};

// TCA_OP_NONE for any other node.
enum tca_op          tca_op_of        (const struct ggml_tensor * node);
struct tca_op_params tca_op_get_params(const struct ggml_tensor * node);

// Sources of a node by name, whether it works in place (its destination is then its first source) or not.
struct tca_append_node {
    struct ggml_tensor * k, * v, * pos;
    struct ggml_tensor * k_cur, * v_cur, * desc;
    int row;

    static tca_append_node of(const struct ggml_tensor * node);
};

struct tca_attn_node {  // ATTN and PARTIAL
    struct ggml_tensor * q, * k, * v, * desc;
    struct ggml_tensor * sinks;  // ATTN: NULL without
    int     row;
    float   scale;
    float   softcap;
    int     n_chunks;
    int64_t gqa;  // query heads a KV head

    static tca_attn_node of(const struct ggml_tensor * node);
};

struct tca_combine_node {
    struct ggml_tensor * partial, * desc;
    struct ggml_tensor * sinks;  // NULL without
    int row;

    static tca_combine_node of(const struct ggml_tensor * node);
};

struct tca_compact_node {
    struct ggml_tensor * k, * v, * pos, * desc;
    struct tca_tables    tables;
    struct ggml_tensor * q;  // NULL unless the metric has TCA_NEEDS_QUERIES
    int   row;
    float scale;
    float softcap;

    static tca_compact_node of(const struct ggml_tensor * node);
};

// Writes the segment's rows of k_cur and v_cur at the ends of the regions, converted to the store's types, and their positions.
//   k_cur [head_dim_k, n_head_kv, n_tokens] f32, v_cur likewise; rows contiguous.   Result: view of k.
struct ggml_tensor * tca_build_append(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * pos, struct ggml_tensor * k_cur, struct ggml_tensor * v_cur, struct ggml_tensor * desc, int row);

// Attention of the segment's queries over the regions, bottom-right causal: token t sees PAST + t + 1 slots.
//   q [head_dim_k, n_head, n_tokens] f32.   Result [head_dim_v, n_head, n_tokens] f32.
// dst: result of an earlier segment of the same micro-batch to write into, or NULL.
// sinks: F32 [n_head], a score of every head that takes its share of the softmax and adds no value (learned attention sinks), or NULL.
struct ggml_tensor * tca_build_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * desc, int row, float scale, float softcap, struct ggml_tensor * dst,
        struct ggml_tensor * sinks = nullptr);

// The same for few queries (tca_attn_splits), as two nodes: partial results per chunk of slots, then their combination.
// n_chunks: tca_attn_n_chunks of the longest region of the layer.
struct ggml_tensor * tca_build_attn_split(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * desc, int row, float scale, float softcap, int n_chunks,
        struct ggml_tensor * dst, struct ggml_tensor * sinks = nullptr);

// Selects the tokens of the group at GROUP that stay, moves them and everything behind the group down, and sets the others aside
// at STASH. In place.
// q, scale, softcap: as the segment's attention has them; q becomes a source only for metrics with TCA_NEEDS_QUERIES, for others
// it may be NULL.   Result: view of k.
struct ggml_tensor * tca_build_compact(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * pos, struct ggml_tensor * desc, int row, const struct tca_tables & tables, struct ggml_tensor * q,
        float scale, float softcap);
