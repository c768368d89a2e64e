// tca.h - C API of tca-gguf: TCA-Attention budgets, plan, kernels and per-context figures.
//
// Conventions
// - Every function that can fail returns a tca_status. On failure tca_last_error() holds one line of text that names
//   the key, the argument or the file, and what to do. The text is per thread and lives until the next failing call.
// - Arrays are row-major, innermost dimension last in the comments: [n_layer, n_head_kv].
// - The caller owns every buffer it passes; nothing is kept after a call returns unless the comment says so.
// - Sizes called "slots" count tokens of one KV head; "bytes" are bytes.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef _WIN32
#    ifdef TCA_BUILD
#        define TCA_API __declspec(dllexport)
#    else
#        define TCA_API __declspec(dllimport)
#    endif
#else
#    define TCA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct llama_model;
struct ggml_tensor;

enum {
    TCA_FORMAT_VERSION = 1,   // value of the GGUF key tca.version
    TCA_HEAD_DENSE     = -1,  // value in tca.head_config: the head keeps every token
    TCA_HEAD_SLIDING   = -2,  // llama.cpp keeps its layer: sliding-window, recurrent, no attention; no region (every head of it)
    TCA_MAX_BLOCK      = 256,
    TCA_MAX_GROUP      = 8192,
    TCA_MAX_WINDOW     = 1 << 20,
    TCA_MAX_CONFIGS    = 4096,
    TCA_MAX_PROBE      = 8192,
    TCA_ROLLBACK       = 64,  // tca.rollback where a file does not say (at most its tca.group_size)
};

typedef enum tca_status {
    TCA_OK              =  0,
    TCA_NO_BUDGETS      =  1,  // the file or model carries no tca.* keys, or tca.enabled is false
    TCA_ERR_ARGUMENT    = -1,
    TCA_ERR_BUDGETS     = -2,  // a tca.* key is missing, malformed or does not fit the model
    TCA_ERR_UNSUPPORTED = -3,  // the architecture or setting cannot use the ragged cache
    TCA_ERR_IO          = -4,
    TCA_ERR_MEMORY      = -5,
} tca_status;

// Text of the last failure on this thread; "" if there was none.
TCA_API const char * tca_last_error(void);

// One JSON object: {"version", "upstream", "upstream_commit", "patch", "compiler", "simd", "cpu", "cuda"}. Static storage.
// simd: what the CPU backend was compiled for, "none" if there is none; cpu: its file, which names the variant that was chosen.
TCA_API const char * tca_build_info(void);

// ---- budgets ---------------------------------------------------------------------------------------------------

// What the tca.* keys of a GGUF file say. All pointers are borrowed.
struct tca_budgets {
    uint32_t        version;      // TCA_FORMAT_VERSION
    uint32_t        block_size;   // b, tokens in a block, a power of two
    uint32_t        group_size;   // G, tokens compacted together, a multiple of block_size
    uint32_t        window;       // W, the newest tokens, never compacted
    uint32_t        sinks;        // the first tokens, never compacted
    uint32_t        rollback;     // newest tokens that can always be taken back, also over a compaction; at most group_size
    const char *    metric;       // name of the selection metric, one of tca_metric_name()
    uint32_t        n_keep;       // allowed numbers of kept tokens in a block
    const int32_t * keep_counts;  // [n_keep], strictly increasing, 0 <= k <= block_size
    uint32_t        n_configs;
    const int32_t * configs;      // [n_configs, n_keep]: blocks of a group that keep keep_counts[j]; each row sums to G/b
    uint32_t        n_layer;
    uint32_t        n_head_kv;
    const int32_t * head_config;  // [n_layer, n_head_kv]: row of configs, TCA_HEAD_DENSE or TCA_HEAD_SLIDING
    uint32_t        n_probe;      // head_dim_k, for metrics that use a probe; else 0
    const float *   probe;        // [n_layer, n_head_kv, n_probe], finite
};

// Checks every field and every sum. TCA_OK or TCA_ERR_BUDGETS.
TCA_API tca_status tca_budgets_check(const struct tca_budgets * budgets);

// Reads the metadata of a model's GGUF file (no tensor data) and checks its budgets just as the runtime does: its own tca.* keys,
// or those of a file of keys (tca_file_source()).
// TCA_OK: valid. TCA_NO_BUDGETS: none there. TCA_ERR_BUDGETS / TCA_ERR_UNSUPPORTED / TCA_ERR_IO: see tca_last_error().
TCA_API tca_status tca_file_check(const char * path);

// The file whose tca.* keys the runtime takes for a model: `path` itself, or a file of keys that was made for this model (where
// TCA_BUDGETS points, "<stem>.tca.gguf" beside it, or in the user's folder; the rule: native/budgets/tca-source.h).
// TCA_OK: written to source [n_max] with its terminating zero. TCA_NO_BUDGETS: there is none. TCA_ERR_ARGUMENT: n_max is too small.
TCA_API tca_status tca_file_source(const char * path, char * source, size_t n_max);

// What tells a model's weights from another's, 16 hex digits and a zero: see tca_identity() in native/budgets/tca-source.h.
TCA_API tca_status tca_file_identity(const char * path, char identity[17]);

// Where embed-budgets puts a file of keys: beside the model by its path, or by its identity in the user's folder.
// TCA_ERR_ARGUMENT: n_max is too small, or the user has no folder.
TCA_API tca_status tca_file_beside(const char * path, char * beside, size_t n_max);
TCA_API tca_status tca_user_budgets(char * folder, size_t n_max);

// Tokens that one group of G leaves behind under config row `config`: sum_j keep_counts[j]*configs[config][j], G if dense.
// Negative tca_status on failure.
TCA_API int32_t tca_budgets_kept_per_group(const struct tca_budgets * budgets, int32_t config);

// ---- plan: integers only, no model, no tensors -----------------------------------------------------------------

// Slots in use in a head's region after n_tokens tokens of a sequence were processed.
TCA_API int64_t tca_plan_length(const struct tca_budgets * budgets, uint32_t layer, uint32_t head, uint32_t n_tokens);

// Slots that a head's region needs so that any sequence of up to n_ctx tokens fits at every step.
TCA_API int64_t tca_plan_capacity(const struct tca_budgets * budgets, uint32_t layer, uint32_t head, uint32_t n_ctx);

// Number of leading groups that are compacted once n_tokens tokens were processed.
TCA_API int64_t tca_plan_groups(const struct tca_budgets * budgets, uint32_t n_tokens);

// Bytes of the ragged store (K, V and slot positions) of one sequence of n_ctx tokens, and of a dense K and V cache, both of
// the layers in the ragged store only (not TCA_HEAD_SLIDING).
// type_k, type_v: enum ggml_type. Row sizes are those of ggml. Either output may be NULL.
TCA_API tca_status tca_plan_bytes(const struct tca_budgets * budgets, uint32_t head_dim_k, uint32_t head_dim_v,
        int type_k, int type_v, uint32_t n_ctx, uint64_t * bytes_tca, uint64_t * bytes_dense);

// ---- a model ---------------------------------------------------------------------------------------------------

// Contexts made from `model` from now on use `budgets` (copied) in place of what the file says; NULL: the stock cache.
// Contexts that exist keep the cache they have. The weights stay as they are, which is what comparing budgets needs.
// TCA_ERR_BUDGETS, TCA_ERR_UNSUPPORTED: nothing is changed. Not to be called while a context is being made.
TCA_API tca_status tca_model_set_budgets(struct llama_model * model, const struct tca_budgets * budgets);

// What the budgets of a model look like, as the runtime sees it. Layers in the ragged store all have the same heads.
struct tca_model_shape {
    uint32_t n_layer;      // rows of head_config
    uint32_t n_stored;     // layers in the ragged store; llama.cpp keeps the others (TCA_HEAD_SLIDING)
    uint32_t n_head;       // query heads of a stored layer, the most
    uint32_t n_head_kv;    // KV heads of a stored layer
    uint32_t head_dim_k;   // elements of one key of one head, and of one value
    uint32_t head_dim_v;
    uint32_t n_ctx_train;
    uint32_t n_swa;        // tokens that sliding-window layers see; 0: there are none
    uint32_t sliding_k;    // elements of the keys of one token in all sliding-window layers together, and of its values
    uint32_t sliding_v;
};

// stored [n_max], n_layer at most are written: whether each layer is in the ragged store. TCA_ERR_UNSUPPORTED: the reason is in
// tca_last_error(), and *shape is zero.
TCA_API tca_status tca_model_get_shape(const struct llama_model * model, struct tca_model_shape * shape, bool * stored, uint32_t n_max);

// The same of a model file, from its metadata alone. TCA_ERR_IO: llama.cpp cannot read it.
TCA_API tca_status tca_file_get_shape(const char * path, struct tca_model_shape * shape, bool * stored, uint32_t n_max);

// The same of a context's model.
TCA_API tca_status tca_context_get_shape(const struct llama_context * ctx, struct tca_model_shape * shape, bool * stored, uint32_t n_max);

// How an architecture's graph asks for its attention input, a set of bits.
enum {
    TCA_ARCH_KV     = 1,  // every layer alike
    TCA_ARCH_ISWA   = 2,  // some layers slide
    TCA_ARCH_HYBRID = 4,  // some layers are recurrent
    TCA_ARCH_LATENT = 8,  // latent attention (MLA): one KV head a layer
};

struct tca_arch {
    const char * name;    // value of general.architecture
    uint32_t     inputs;  // those that are served; 0: budgets of such a model are refused at load
    const char * remark;  // the reason, or what to know; may be ""
};

// The i-th architecture of llama.cpp; false past the last. Static storage.
TCA_API bool tca_arch_info(int32_t i, struct tca_arch * arch);

// ---- a context -------------------------------------------------------------------------------------------------

struct tca_context_info {
    bool     active;           // the ragged cache is in use; false: the stock cache, and the fields up to kv_bytes_dense are 0
    uint32_t n_layer;
    uint32_t n_head_kv;
    uint32_t n_stream;         // sequences that can live side by side
    uint32_t n_ctx_seq;        // tokens a sequence may hold
    uint64_t kv_bytes;         // allocated for K, V and positions
    uint64_t kv_bytes_dense;   // what the stock cache would allocate for the same layers, n_ctx and types
    uint64_t memory_bytes;        // allocated for all layers, those with sliding windows too; set for the stock cache as well
    uint64_t memory_bytes_stock;  // what llama.cpp's own cache would allocate for all of them (without swa_full)
};

TCA_API tca_status tca_context_get_info(const struct llama_context * ctx, struct tca_context_info * info);

// Tokens processed and groups compacted in a sequence.
TCA_API tca_status tca_context_sequence(const struct llama_context * ctx, int32_t seq_id,
        uint32_t * n_tokens, uint32_t * n_groups);

// Slots in use in a region (0: the layer has none, TCA_HEAD_SLIDING); negative tca_status on failure.
TCA_API int64_t tca_context_region_length(const struct llama_context * ctx, uint32_t layer, int32_t seq_id, uint32_t head);

// Copies the positions of the slots of a region, oldest first, to positions [n_max]. Returns how many the region holds
// (at most n_max are written); negative tca_status on failure. Waits for pending work of the context.
TCA_API int64_t tca_context_positions(struct llama_context * ctx, uint32_t layer, int32_t seq_id, uint32_t head,
        int32_t * positions, int64_t n_max);

// ---- selection and attention on plain arrays -------------------------------------------------------------------

enum tca_rope_type { TCA_ROPE_NONE = 0, TCA_ROPE_NORM = 1, TCA_ROPE_NEOX = 2 };

// Rotary embedding of one layer, all scaling folded in: pair i of a key at position p was rotated by p*freqs[i].
struct tca_rope {
    int32_t       type;    // enum tca_rope_type; NORM pairs (2i, 2i+1), NEOX pairs (i, i + n_rot/2)
    int32_t       n_rot;   // rotated leading dimensions, even
    float         scale;   // magnitude the rotation multiplied the rotated part with (YaRN attention factor), > 0
    const float * freqs;   // [n_rot/2], radians a position
};

// Which implementation answers: the plain scalar reference or the op that the runtime uses.
enum tca_impl { TCA_IMPL_REFERENCE = 0, TCA_IMPL_CPU = 1 };

// Name of the i-th selection metric, a value of tca.metric; NULL past the last. Static storage.
TCA_API const char * tca_metric_name(int32_t i);

// Whether the metric of this name looks at the queries of a running model: tca_select() refuses it, and calibration has no use
// for it. False for unknown names.
TCA_API bool tca_metric_needs_queries(const char * name);

// One group of one KV head, as the store holds it. All pointers are borrowed.
struct tca_group {
    int32_t                 n_tokens;
    int32_t                 head_dim_k;
    int32_t                 head_dim_v;  // with values only
    int32_t                 layer;       // which head it is, for metrics that tell heads apart
    int32_t                 head;
    const float *           keys;        // [n_tokens, head_dim_k], after RoPE
    const float *           values;      // [n_tokens, head_dim_v]; NULL: metrics that look at values are refused
    const int32_t *         positions;   // [n_tokens], increasing
    const struct tca_rope * rope;        // NULL: the keys carry no rotation
    const float *           probe;       // [head_dim_k]; NULL: metrics that use one are refused
};

// Scores and selects the tokens of a group of blocks*block_size tokens (design: paper section "online selection").
//   counts    [n_keep] blocks that keep keep_counts[j]
//   kept      [n_tokens] out: indices of the kept tokens, increasing
//   scores    [n_tokens] out, may be NULL: importance of every token
// Returns the number of kept tokens (sum_j keep_counts[j]*counts[j]); negative tca_status on failure.
TCA_API int32_t tca_select(enum tca_impl impl, const char * metric, const struct tca_group * group, int32_t block_size,
        int32_t n_keep, const int32_t * keep_counts, const int32_t * counts, int32_t * kept, float * scores);

// Ragged attention over one region per KV head, bottom-right causal: query t sees slots [0, lengths[h] - n_tokens + t].
//   q        [n_tokens, n_head, head_dim_k] f32
//   k        regions one after another, each [lengths[h], head_dim_k] of type_k; v likewise with head_dim_v of type_v
//   lengths  [n_head_kv] slots in each region, the n_tokens newest included
//   out      [n_tokens, n_head, head_dim_v] f32
//   scale    multiplies q.k; softcap: 0, or c in c*tanh(s/c)
//   sinks    [n_head] or NULL: a score of each query head that takes its share of the softmax and adds no value
// Query head i belongs to KV head i/(n_head/n_head_kv).
TCA_API tca_status tca_attention(enum tca_impl impl, const float * q, const void * k, const void * v,
        int type_k, int type_v, int32_t n_tokens, int32_t n_head, int32_t n_head_kv, int32_t head_dim_k,
        int32_t head_dim_v, const int64_t * lengths, float scale, float softcap, const float * sinks,
        int32_t n_threads, float * out);

// Rotary embedding of a layer as this context applies it. freqs [n_max] is filled and rope->freqs points to it.
TCA_API tca_status tca_context_rope(const struct llama_context * ctx, uint32_t layer, struct tca_rope * rope,
        float * freqs, int32_t n_max);

// ---- capture of Q, K, V during a forward pass (calibration) ----------------------------------------------------

// One layer's attention inputs of one micro-batch of the only sequence in the dense cache. Valid only during the callback.
struct tca_layer_qkv {
    int32_t       layer;
    int32_t       n_tokens;   // queries
    int32_t       n_kv;       // keys, the n_tokens newest included
    int32_t       n_head;
    int32_t       n_head_kv;
    int32_t       head_dim_k;
    int32_t       head_dim_v;
    float         scale;
    float         softcap;
    const float * sinks;      // [n_head] learned attention sinks, as tca_attention() takes them; NULL without
    const float * q;          // [n_head, n_tokens, head_dim_k], after RoPE
    const float * k;          // [n_head_kv, n_kv, head_dim_k], after RoPE, as the cache stores it
    const float * v;          // [n_head_kv, n_kv, head_dim_v]
};

// Return false to abort the forward pass.
typedef bool (*tca_capture_fn)(const struct tca_layer_qkv * layer, void * user_data);

struct tca_capture;
TCA_API struct tca_capture * tca_capture_new(tca_capture_fn fn, void * user_data);
TCA_API void                 tca_capture_free(struct tca_capture * capture);

// Put this into llama_context_params.cb_eval, and the capture into cb_eval_user_data. The context must use the stock cache
// with flash attention enabled. Nodes other than attention run untouched; memory beside the model is one layer's Q, K, V.
TCA_API bool tca_capture_eval(struct ggml_tensor * tensor, bool ask, void * capture);

// ---- measuring -------------------------------------------------------------------------------------------------

// What the machine can do at best with n_threads threads (1 to 1024): bytes/s read from memory, and f32 operations/s in the
// vectors that the CPU kernels use, a multiply-add counting as two. Best of several runs; takes about half a second.
TCA_API tca_status tca_machine_limits(int32_t n_threads, double * read_bandwidth, double * fma_peak);

// Where the time of a forward pass goes, with either cache. The graph is computed in as few parts as keep the classes apart
// (two a layer more than usual), so attention is timed as it runs and not node by node.
enum tca_profile_class {
    TCA_PROFILE_ATTENTION,  // scores, softmax, output
    TCA_PROFILE_APPEND,     // new keys and values into the cache
    TCA_PROFILE_SELECT,     // selection and compaction
    TCA_PROFILE_OTHER,      // everything else
    TCA_PROFILE_N_CLASSES,
};

enum tca_profile_mode {
    TCA_PROFILE_OFF,        // the callback changes nothing and costs nothing that could be measured
    TCA_PROFILE_LEARN,      // the next pass shows which nodes the graph has
    TCA_PROFILE_TIME,       // passes over that same graph are timed
};

struct tca_profile;
TCA_API struct tca_profile * tca_profile_new(void);
TCA_API void                 tca_profile_free(struct tca_profile * profile);

// Sets the mode; LEARN forgets the graph, TIME sets all seconds to 0. Exactly one micro-batch is decoded after LEARN.
TCA_API void tca_profile_start(struct tca_profile * profile, enum tca_profile_mode mode);

// Seconds since TIME was started, seconds [TCA_PROFILE_N_CLASSES]. TCA_ERR_ARGUMENT: the graph was another one than learned.
TCA_API tca_status tca_profile_read(const struct tca_profile * profile, double * seconds);

// Put this into llama_context_params.cb_eval, and the profile into cb_eval_user_data.
TCA_API bool tca_profile_eval(struct ggml_tensor * tensor, bool ask, void * profile);

#ifdef __cplusplus
}
#endif
