// llama_tca_store: the tensors of the ragged KV store and where each sequence lives in them. No batches and no counters: those are
// llama_memory_tca's. Nothing here may run while a graph does.
//
// A layer has one K, one V and one position tensor. A stream (the room of one sequence) is a run of slots of each, cut in one
// region a KV head as the stream's plan says. With equal rooms every stream has its share for good. With shared rooms the
// streams share the slots of one context: a stream grows into what the others leave, and rows move when it does.
#pragma once

#include "ops/tca-ops.h"
#include "plan/tca-plan.h"
#include "tca-tables.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <map>
#include <memory>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_model;

class llama_tca_store {
public:
    struct layer {  // all null for a layer that llama.cpp keeps
        ggml_tensor * k   = nullptr;  // [head_dim_k, n_slots]
        ggml_tensor * v   = nullptr;  // [head_dim_v, n_slots]
        ggml_tensor * pos = nullptr;  // I32 [n_slots]

        tca_tables tables;
    };

    // Rows that are in the store for a stream, whatever has become of its sequence since.
    struct rows {
        tca_seq_state state;
        bool          stash = false;  // the rows that the last compaction dropped are in its stashes
    };

    // Throws std::runtime_error: a device without the ops, a type that does not fit the head size, no memory.
    llama_tca_store(const llama_model & model, const llama_cparams & cparams, ggml_type type_k, ggml_type type_v);

    const tca_plan & full_plan()              const { return *plan_full; }         // of a stream with n_ctx_seq tokens
    const tca_plan & plan(uint32_t s)         const { return *rooms[s].plan; }     // of what the stream has room for now
    int64_t          first_slot(uint32_t s, uint32_t il) const { return rooms[s].first[il]; }
    const layer    & get_layer(int32_t il)    const { return layers[il]; }
    uint32_t         n_stream()               const { return rooms.size(); }
    int              n_chunks(int32_t il)     const;  // in the longest region of the layer (tca_attn_n_chunks)
    int              hadamard_k()             const { return rot_k; }
    int              hadamard_v()             const { return rot_v; }
    const std::vector<float> & hadamard_matrix(int n) const { return hadamard.at(n); }  // [n, n]
    uint64_t         bytes()                  const;
    uint64_t         bytes_dense()            const;

    // Of everything that rows of this store depend on: budgets, types, head sizes.
    uint64_t fingerprint() const;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;
    void clear_data();

    // n_tokens [n_stream]: whether streams of so many tokens fit side by side; and whether they fit where they are now.
    bool fits    (const std::vector<uint32_t> & n_tokens) const;
    bool has_room(const std::vector<uint32_t> & n_tokens) const;

    // Gives every stream room for n_tokens, which must fit, and shares out what is left among those in use; `held` rows move
    // along. [n_stream] each, n_tokens[s] >= held[s].state.n_tokens.
    void make_room(const std::vector<uint32_t> & n_tokens, const std::vector<rows> & held);

    // visit(tensor, offset, size) of the K, V and position rows of every region of stream s, in bytes; of those behind the core of
    // the first n_groups groups alone. Sizes do not depend on the stream's room.
    template <typename F> void for_each_rows(uint32_t s, const tca_seq_state & state, uint32_t n_groups, F && visit) const {
        const tca_plan & p = plan(s);
        for (uint32_t il = 0; il < p.n_layer(); ++il) {
            for (uint32_t h = 0; h < p.n_head_kv() && p.layer_stored(il); ++h) {
                const int64_t skip = n_groups == 0 ? 0 : p.next_group_slot(il, h, { 0, n_groups });
                const int64_t slot = first_slot(s, il) + p.offset(il, h) + skip;
                const int64_t n    = p.length(il, h, state) - skip;
                for (ggml_tensor * t : { layers[il].k, layers[il].v, layers[il].pos }) {
                    const size_t row = t == layers[il].pos ? t->nb[0] : t->nb[1];
                    if (n > 0) {
                        visit(t, slot*row, n*row);
                    }
                }
            }
        }
    }

    // Whether the rows that the last compaction dropped are still set aside, whatever room a stream has.
    bool stash_holds(const tca_seq_state & state) const;

    // Copies the rows of one stream to another, which has room for them.
    void copy(uint32_t from, uint32_t to, const rows & held);

    // Takes the last compaction of a stream back, with its stash, and leaves the rows of its first n_tokens tokens: at least as
    // many as the group before calls for, fewer than the last compaction needed.
    void undo_compaction(uint32_t s, const tca_seq_state & state, uint32_t n_tokens);

private:
    struct room {
        std::shared_ptr<const tca_plan> plan;
        std::vector<int64_t>            first;  // [n_layer] first slot
    };

    const llama_model &             model;
    std::shared_ptr<const tca_plan> plan_full;
    const ggml_type                 type_k;
    const ggml_type                 type_v;
    const uint32_t                  n_ctx;   // tokens of all streams
    const bool                      shared;

    int rot_k = 0;  // size of the Hadamard matrices that keys and values are multiplied with before they are quantized
    int rot_v = 0;
    std::map<int, std::vector<float>> hadamard;

    std::vector<layer>   layers;
    std::vector<room>    rooms;    // [n_stream]
    std::vector<int64_t> n_slots;  // [n_layer]

    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
    llama_tca_tables tables;

    std::vector<room> lay_out(const std::vector<uint32_t> & n_tokens) const;
    bool              overflows(const std::vector<room> & wanted) const;
};

// Slots of layer il in a store of n_seqs streams over n_ctx tokens, shared or in equal parts.
int64_t llama_tca_store_slots(const tca_plan & plan, uint32_t il, uint32_t n_ctx, uint32_t n_seqs, bool shared);
