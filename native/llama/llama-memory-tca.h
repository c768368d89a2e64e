// llama_memory_tca: the ragged store for the layers that carry budgets, and any stock memory for the rest of the model (none,
// sliding-window, ...). One owner of the sequences: both parts hold the same tokens after every call, or the call is refused.
//
// What holds of a sequence at any time: its state is the one that an evaluation of its tokens from nothing leaves. A sequence is
// therefore its tokens; which groups are compacted follows from their number.
#pragma once

#include "tca-store.h"

#include "llama-batch.h"
#include "llama-memory.h"

#include <functional>
#include <memory>
#include <vector>

class llama_kv_cache;

struct llama_tca_bytes {
    uint64_t allocated;
    uint64_t stock;
};

// The stock memory beside the store.
struct llama_tca_rest {
    llama_memory_ptr memory;  // null: every layer is in the store

    // with sliding-window layers: their cells, and how many of the newest tokens the next one sees (itself included)
    const llama_kv_cache * sliding = nullptr;
    uint32_t               n_swa   = 0;
    uint64_t               n_cells_stock = 0;  // cells that llama.cpp's own cache has for them

    // A context of the memory over one micro-batch in equal shares of its sequences, cut for it; null: it cuts batches so itself.
    std::function<llama_memory_context_ptr(const llama_ubatch &)> take;
    bool sequential = false;  // it takes sequences with successive ids only
};

class llama_memory_tca : public llama_memory_i {
public:
    struct stream {
        tca_seq_state state;
        bool          stash = false;        // the last compaction can be taken back
        llama_pos     pos0  = 0;            // position of the first token; positions are consecutive
        std::vector<llama_token> tokens;    // [n_tokens]; an embedding counts as a token that occurs nowhere else
    };

    // swa_full: what the caller asked for (llama_memory_params). Throws std::runtime_error as llama_tca_store does.
    llama_memory_tca(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, ggml_type type_v, llama_tca_rest rest,
            bool swa_full);

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // Whole sequences can go, and tails behind the last compaction or, over it, the newest `rollback` tokens. Anything else returns
    // false and changes nothing.
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    // As llama-server reads it: a tail from p on can be removed if seq_pos_min < p - n_swa (n_swa 0 without sliding-window layers or
    // with swa_full). More can be, over a compaction: a state does not hold what that needs, so it is no promise for restored ones.
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // A partial state (LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY) holds the tokens behind the core alone, whatever the context. It is
    // restored over a sequence that has the core: one that evaluated the same tokens up to the last compaction of the state.
    // A state that cannot be restored changes nothing. state_read() throws std::runtime_error.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    // own interface
    const llama_tca_store & get_store()              const { return store; }
    const stream    & get_stream(uint32_t s)   const { return streams[s]; }

    // Allocated for all layers, and what llama.cpp's own cache takes for the same model, context, sequences and types.
    llama_tca_bytes bytes() const;

    // Does what seq_rm() and seq_cp() put off. No graph may be running.
    void do_pending() const;

private:
    friend class llama_memory_tca_context;

    // Work on rows, which has to wait for the graph that may be running: done in order before the next one or a state access.
    struct pending {
        enum { COPY, UNDO } what;
        uint32_t        from;
        uint32_t        to;        // COPY
        llama_tca_store::rows held;      // of `from` when it was asked for
        uint32_t        n_tokens;  // UNDO: that stay
    };

    const llama_cparams & cparams;      // of the context, which may change causal_attn between batches
    const bool        causal_always;    // whether attention in both directions concerns the sliding-window layers alone
    llama_tca_rest    rest;
    const uint32_t    n_lead;       // see seq_pos_min
    mutable llama_tca_store store;
    const uint64_t    fingerprint;  // of the store

    std::vector<stream>                  streams;
    mutable std::vector<llama_tca_store::rows> held;        // [n_stream]
    mutable std::vector<pending>         queue;
    std::vector<uint32_t>                wanted;      // [n_stream] tokens of a batch that needs other rooms; empty: none does
    std::vector<uint32_t>                unfinished;  // streams that cannot be taken back if the micro-batch under way fails
    llama_token                          next_embedding = -1;
    llama_context *                      owner          = nullptr;  // known from the first update, before anything is there to copy

    bool holds_batch(const llama_batch & batch, std::vector<uint32_t> & n_tokens) const;
    bool find_room  (const std::vector<uint32_t> & n_tokens);  // false: later, or never

    // First position from which a tail of the sequence can be removed, behind its last compaction or over it; its end: none.
    llama_pos first_removable(llama_seq_id seq_id, bool over_a_compaction) const;

    bool can_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void rm    (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void drop  (llama_seq_id seq_id);

    std::vector<uint32_t> tokens_held() const;  // [n_stream] of every stream and of what waits to be copied to it

    void rest_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags, const std::vector<stream> & restored);

    void append(uint32_t s, const llama_ubatch & ubatch, uint32_t first);
};

class llama_memory_tca_context : public llama_memory_context_i {
public:
    // One segment of one stream. Without tokens: nothing to do for it.
    struct stream_segment {
        uint32_t    stream;
        uint32_t    token;   // first token in the micro-batch
        llama_pos   pos;
        tca_segment seg;
    };
    // [n_segments][n_entries]. Entry i < n_seqs is the first sequence of the micro-batch's i-th set; behind those stand the other
    // sequences of sets of several, which get the same tokens appended and no attention of their own.
    using step = std::vector<std::vector<stream_segment>>;

    llama_memory_tca_context(llama_memory_tca * memory, llama_memory_context_ptr rest, llama_memory_status status);  // full, update, failure
    llama_memory_tca_context(llama_memory_tca * memory, llama_memory_context_ptr rest, std::vector<llama_ubatch> ubatches);  // batch

    ~llama_memory_tca_context() override;

    bool next()  override;
    bool apply() override;

    llama_memory_status  get_status() const override { return status; }
    const llama_ubatch & get_ubatch() const override { return ubatches.empty() ? rest->get_ubatch() : ubatches[i_cur]; }

    const llama_memory_tca       * get_memory() const { return memory; }
    const llama_memory_context_i * get_rest()   const { return rest.get(); }

    // Of the current micro-batch, set by apply(); while reserving, the worst case for this one.
    uint32_t     n_segments(const llama_ubatch & ubatch) const;
    uint32_t     n_entries (const llama_ubatch & ubatch) const;
    bool         compacts() const;
    const step & get_step() const { return cur; }

private:
    enum kind { OTHER, BATCH };

    const kind                what;
    llama_memory_tca *        memory;
    llama_memory_context_ptr  rest;
    llama_memory_status       status;
    std::vector<llama_ubatch> ubatches;  // empty: the rest has cut them
    size_t                    i_cur = 0;
    step                      cur;
};

// Both are the same for a stock memory.
llama_tca_bytes llama_tca_count_bytes(const llama_memory_i & memory);

// nullptr: a stock memory.
const llama_memory_tca * llama_tca_memory_of(const llama_memory_i * memory);
