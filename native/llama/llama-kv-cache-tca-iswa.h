// The memory of models that mix sliding-window and full attention (iSWA): the stock iSWA cache holds the sliding-window layers,
// the ragged cache the others.
#pragma once

#include "llama-kv-cache-tca.h"

#include "llama-kv-cache-iswa.h"

class llama_kv_cache_tca_iswa : public llama_memory_i {
public:
    // Throws std::runtime_error as llama_kv_cache_tca does.
    llama_kv_cache_tca_iswa(const llama_model & model, const llama_cparams & cparams, const llama_memory_params & params);

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override { return false; }

    void clear(bool data) override;

    // False, and nothing changed, for what the ragged cache cannot remove, and for a tail so long that the sliding-window layers
    // no longer hold the window before it.
    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    // As llama-server reads it: a tail from p on can be removed if seq_pos_min < p - n_swa (seq_pos_min < p with swa_full).
    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    // A saved state always holds both caches: LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY relies on full layers that never evict.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    const llama_kv_cache_tca * get_tca() const { return &tca; }

    // Bytes that the sliding-window layers take beyond what they take in llama.cpp's own cache (without swa_full).
    uint64_t bytes_beyond_stock() const;

private:
    const uint32_t      n_swa;
    const bool          swa_full;  // what the caller asked for; the stock part is never full size
    const uint32_t      stock_cells;  // of a sequence's sliding-window layers in llama.cpp's own cache
    llama_kv_cache_iswa iswa;  // its cache of full-attention layers has cells but no layers
    llama_kv_cache_tca  tca;

    // First position from which a tail of the sequence can be removed; pos_max + 1: none.
    llama_pos first_removable(llama_seq_id seq_id) const;

    bool window_held(llama_seq_id seq_id, llama_pos p0) const;
};

// A stock iSWA context for the stock graph input, with the ragged cache's context beside it.
class llama_kv_cache_tca_iswa_context : public llama_kv_cache_iswa_context {
public:
    explicit llama_kv_cache_tca_iswa_context(llama_memory_status status);
    llama_kv_cache_tca_iswa_context(llama_kv_cache_iswa * iswa, llama_memory_context_ptr tca);                                       // full
    llama_kv_cache_tca_iswa_context(llama_kv_cache_iswa * iswa, llama_memory_context_ptr tca, llama_context * lctx, bool optimize);  // update
    llama_kv_cache_tca_iswa_context(llama_kv_cache_iswa * iswa, llama_memory_context_ptr tca, slot_info_vec_t sinfos_base,
            slot_info_vec_t sinfos_swa, std::vector<llama_ubatch> ubatches);                                                         // batch

    bool next()  override;
    bool apply() override;

    llama_memory_status get_status() const override;

    const llama_kv_cache_tca_context * get_tca() const { return static_cast<const llama_kv_cache_tca_context *>(tca.get()); }

private:
    llama_memory_context_ptr tca;  // a llama_kv_cache_tca_context
};

// The ragged cache's part of a context or of a memory; nullptr for the stock ones.
const llama_kv_cache_tca_context * llama_tca_context_of(const llama_memory_context_i * mctx);
const llama_kv_cache_tca         * llama_tca_cache_of  (const llama_memory_i * memory);

// What a memory has allocated for all of its layers, and what llama.cpp's own cache would take for the same model, context,
// sequences and types. Both are the same for a stock memory.
struct llama_tca_bytes {
    uint64_t allocated;
    uint64_t stock;
};

llama_tca_bytes llama_tca_count_bytes(const llama_memory_i & memory);
