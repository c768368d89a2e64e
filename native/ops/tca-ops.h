// The ggml ops of TCA: append, attend, combine, compact. They are GGML_OP_CUSTOM nodes, so ggml itself needs no new op; a
// backend that implements them recognises the node by tca_op_of().
//
// The ragged store of a layer is three tensors with one row (slot) a token:
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
    TCA_DESC_CONFIG,  // row of tca_select_params::configs
    TCA_DESC_USED,    // slots in use after the segment's tokens (PAST + COUNT)
    TCA_DESC_SIZE,
};

struct tca_metric;

// What selection needs to know about a layer. Owned by the cache, outlives every graph that refers to it.
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

enum tca_op {
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
    TCA_ATTN_PARTIAL_ROWS = 64,   // PARTIAL is used up to this many (query token, query head of the GQA group) pairs
};

// Chunks that the partial results of a region of n_slots need room for: those of the CPU, and more and shorter ones for a GPU,
// which wants work for all its parts at short lengths, too.
inline int tca_attn_n_chunks(int64_t n_slots) {
    const int64_t n = (n_slots + TCA_ATTN_CHUNK - 1)/TCA_ATTN_CHUNK, n_short = (n_slots + TCA_ATTN_CHUNK/4 - 1)/(TCA_ATTN_CHUNK/4);
    return (int) (n > 64 ? n : n_short < 64 ? n_short : 64);
}

// Behind the generic header that ggml_custom_4d writes to op_params.
struct tca_op_params {
    uint32_t    magic;
    int32_t     op;        // enum tca_op
    int32_t     row;       // row of the descriptor
    float       scale;
    float       softcap;
    int32_t     n_chunks;  // PARTIAL, COMBINE
};

constexpr uint32_t TCA_MAGIC = 0x31414354;  // "TCA1"

// TCA_OP_NONE for any other node.
enum tca_op            tca_op_of        (const struct ggml_tensor * node);
struct tca_op_params   tca_op_get_params(const struct ggml_tensor * node);
void                   tca_op_set_params(struct ggml_tensor * node, const struct tca_op_params & params);
const tca_select_params * tca_op_select_params(const struct ggml_tensor * node);

// Writes the segment's rows of k_cur and v_cur at the ends of the regions, converted to the store's types, and their positions.
//   k_cur [head_dim_k, n_head_kv, n_tokens] f32, v_cur likewise; rows contiguous.   Result: view of k.
struct ggml_tensor * tca_build_append(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * pos, struct ggml_tensor * k_cur, struct ggml_tensor * v_cur, struct ggml_tensor * desc, int row);

// Attention of the segment's queries over the regions, bottom-right causal: token t sees PAST + t + 1 slots.
//   q [head_dim_k, n_head, n_tokens] f32.   Result [head_dim_v, n_head, n_tokens] f32.
// dst: result of an earlier segment of the same micro-batch to write into, or NULL. after: the append node (ordering).
struct ggml_tensor * tca_build_attn(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * desc, int row, float scale, float softcap, struct ggml_tensor * dst);

// The same for few queries, as two nodes: partial results per chunk of slots, then their combination.
// n_chunks: tca_attn_n_chunks of the longest region of the layer.
struct ggml_tensor * tca_build_attn_split(struct ggml_context * ctx, struct ggml_tensor * q, struct ggml_tensor * k,
        struct ggml_tensor * v, struct ggml_tensor * desc, int row, float scale, float softcap, int n_chunks,
        struct ggml_tensor * dst);

// Selects the tokens of the group at GROUP that stay, moves them and everything behind the group down. In place.
// q, scale, softcap: as the segment's attention has them; q becomes a source only for metrics with TCA_NEEDS_QUERIES, for others
// it may be NULL.   Result: view of k.
struct ggml_tensor * tca_build_compact(struct ggml_context * ctx, struct ggml_tensor * k, struct ggml_tensor * v,
        struct ggml_tensor * pos, struct ggml_tensor * desc, int row, const tca_select_params * params, struct ggml_tensor * q,
        float scale, float softcap);

// Vector extension the CPU kernels were compiled for: "avx512", "avx2", "neon" or "generic".
const char * tca_cpu_simd(void);

// Best of several runs on n_threads threads: bytes/s read from memory; f32 operations/s, a multiply-add counting as two.
double tca_cpu_read_bandwidth(int n_threads);
double tca_cpu_fma_peak      (int n_threads);

// CPU kernels (ggml_custom_op_t).
void tca_cpu_append      (struct ggml_tensor * dst, int ith, int nth, void * userdata);
void tca_cpu_attn        (struct ggml_tensor * dst, int ith, int nth, void * userdata);
void tca_cpu_attn_partial(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void tca_cpu_attn_combine(struct ggml_tensor * dst, int ith, int nth, void * userdata);
void tca_cpu_compact     (struct ggml_tensor * dst, int ith, int nth, void * userdata);
