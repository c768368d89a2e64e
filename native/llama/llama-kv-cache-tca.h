// llama_kv_cache_tca: the ragged KV store as a llama.cpp memory. One stream a sequence, one region a (layer, stream, KV head).
#pragma once

#include "ops/tca-ops.h"
#include "plan/tca-plan.h"
#include "tca-tables.h"

#include "ggml-cpp.h"
#include "llama-batch.h"
#include "llama-memory.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_hparams;
struct llama_model;

class llama_kv_cache_tca : public llama_memory_i {
public:
    struct layer {  // all null for a layer with sliding-window attention, which has no regions
        ggml_tensor * k   = nullptr;  // [head_dim_k, n_stream*slots]
        ggml_tensor * v   = nullptr;  // [head_dim_v, n_stream*slots]
        ggml_tensor * pos = nullptr;  // I32 [n_stream*slots]

        tca_tables tables;
    };

    struct stream {
        tca_seq_state state;
        llama_pos     pos0 = 0;  // position of the first token; positions are consecutive
    };

    // Throws std::runtime_error: a device without the ops, a type that does not fit the head size, no memory.
    llama_kv_cache_tca(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, ggml_type type_v);

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    // Cuts a batch into micro-batches of whole equal shares of its sequences. sequential: only sequences with successive ids
    // share one. False, with a line in the log where it is a caller's mistake, if the cache cannot take the batch.
    bool split(llama_batch_allocr & balloc, uint32_t n_ubatch, bool sequential, std::vector<llama_ubatch> & ubatches) const;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // Whole sequences can go, and tails behind the last compaction; anything else returns false and changes nothing. What is
    // left is in every case what a fresh evaluation of the remaining tokens would have left.
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    // All positions in [seq_pos_min, seq_pos_max] are in the cache (llama.h), and a tail that starts behind seq_pos_min can be
    // removed, which is how llama-server reads it.
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    // own interface
    const tca_plan & get_plan()                 const { return plan; }
    const layer    & get_layer(int32_t il)      const { return layers[il]; }
    const stream   & get_stream(uint32_t s)     const { return streams[s]; }
    stream         & get_stream(uint32_t s)           { return streams[s]; }
    uint32_t         n_stream()                 const { return streams.size(); }
    int              n_chunks(int32_t il)       const;  // in the longest region of the layer (tca_attn_n_chunks)
    int              hadamard_k()               const { return rot_k; }
    int              hadamard_v()               const { return rot_v; }
    const std::vector<float> & hadamard_matrix(int n) const { return hadamard.at(n); }  // [n, n]
    uint64_t         bytes()                    const;
    uint64_t         bytes_dense()              const;

    // Sequences that the micro-batch under way compacts; none between micro-batches.
    void set_compacting(std::vector<uint32_t> seqs) { compacting = std::move(seqs); }

    // Does what seq_cp() put off. No graph may be running.
    void copy_pending_streams() const;
    bool has_pending_copies() const { return !copies.empty(); }

private:
    const llama_model & model;
    const tca_plan      plan;
    const ggml_type     type_k;
    const ggml_type     type_v;

    int rot_k = 0;  // size of the Hadamard matrices that keys and values are multiplied with before they are quantized
    int rot_v = 0;
    std::map<int, std::vector<float>> hadamard;

    std::vector<layer>  layers;
    std::vector<stream> streams;
    std::vector<uint32_t> compacting;

    struct stream_copy {
        uint32_t      from;
        uint32_t      to;
        tca_seq_state state;  // of the source when seq_cp() was called
    };
    mutable std::vector<stream_copy> copies;  // in order, done before the next graph or state access

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    llama_tca_tables tables;

    bool can_rm(const stream & s, llama_pos p0, llama_pos p1) const;
    void rm    (stream & s, llama_pos p0, llama_pos p1);

    // visit(layer, first slot, length) of every region of stream s
    template <typename F> void for_each_region(uint32_t s, const tca_seq_state & state, F && visit) const;
};

class llama_kv_cache_tca_context : public llama_memory_context_i {
public:
    // One segment of every sequence of the micro-batch; sequences without one have n_tokens == 0.
    struct seq_segment {
        uint32_t    stream;
        uint32_t    token;   // first token in the micro-batch
        llama_pos   pos;
        tca_segment seg;
    };
    using step = std::vector<std::vector<seq_segment>>;  // [n_segments][n_seqs]

    explicit llama_kv_cache_tca_context(llama_memory_status status);
    explicit llama_kv_cache_tca_context(llama_kv_cache_tca * kv);                                     // full cache, for reserving
    llama_kv_cache_tca_context(llama_kv_cache_tca * kv, llama_memory_status status);                  // update
    llama_kv_cache_tca_context(llama_kv_cache_tca * kv, std::vector<llama_ubatch> ubatches);          // batch

    ~llama_kv_cache_tca_context() override;

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override { return ubatches[i_cur]; }

    const llama_kv_cache_tca * get_kv() const { return kv; }

    // Segments of the current micro-batch, set by apply(); while reserving, the worst case for this ubatch.
    uint32_t     n_segments(const llama_ubatch & ubatch) const;
    const step & get_step() const { return cur; }

private:
    llama_memory_status       status;
    llama_kv_cache_tca *      kv = nullptr;
    std::vector<llama_ubatch> ubatches;
    size_t                    i_cur = 0;
    step                      cur;
    bool                      reserving = false;
};
