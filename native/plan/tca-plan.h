// The plan: how many slots every region needs and holds. Integers only, no model, no tensors.
//
// A sequence keeps two counters: T, the tokens processed, and n_c, the groups compacted. Group g holds the tokens
// [sinks + g*G, sinks + (g+1)*G) and is compacted as soon as T reaches sinks + window + (g+1)*G. What a query sees depends
// therefore on its index alone, never on how the tokens were cut into micro-batches. A head that keeps m of the G tokens of
// a group has T - n_c*(G - m) slots in use; a dense head has m = G.
//
// The G - m rows that a compaction drops are not lost at once: they are set aside in the last G - m slots of the region, its
// stash, and stay there until the region has grown into them. A region has `rollback` slots more than it ever uses, so at the
// least that many tokens can be taken back over a compaction, and more as long as the context is not full.
#pragma once

#include "budgets/tca-budgets.h"

#include <cstdint>
#include <memory>
#include <vector>

// Counters of one sequence.
struct tca_seq_state {
    uint32_t n_tokens = 0;   // T
    uint32_t n_groups = 0;   // n_c
};

// A run of tokens of one sequence that ends at the latest where a group is compacted.
struct tca_segment {
    tca_seq_state before;    // counters when it starts
    uint32_t      n_tokens;  // tokens appended, >= 1
    bool          compacts;  // group before.n_groups is compacted after them
};

class tca_plan {
public:
    tca_plan(tca_budgets_data budgets, uint32_t n_ctx_seq);
    tca_plan(const tca_plan & other, uint32_t n_ctx_seq);  // the same budgets with room for other sequences

    const std::shared_ptr<const tca_budgets_data> shared_budgets;
    const tca_budgets_data &                      budgets;
    const uint32_t                                n_ctx_seq;

    uint32_t n_layer()   const { return budgets.n_layer;   }
    uint32_t n_head_kv() const { return budgets.n_head_kv; }

    // Slots of the region, fixed for the life of the cache.
    int64_t capacity(uint32_t layer, uint32_t head) const { return capacities[index(layer, head)]; }

    // First slot of the region inside one sequence's part of the layer's store, and the size of that part.
    int64_t offset(uint32_t layer, uint32_t head) const { return offsets[index(layer, head)]; }
    int64_t slots (uint32_t layer)                const { return layer_slots[layer]; }

    // Slots in use.
    int64_t length(uint32_t layer, uint32_t head, const tca_seq_state & state) const;

    // First slot, in the region, of the stash: the last G - kept slots. Capacity if the head drops nothing.
    int64_t stash(uint32_t layer, uint32_t head) const { return capacity(layer, head) - ((int64_t) budgets.group_size - kept(layer, head)); }

    // Whether the stash of the last compaction is whole in every region: none has grown into it since.
    bool stash_holds(const tca_seq_state & state) const { return state.n_groups > 0 && state.n_tokens <= stash_ends(state.n_groups); }

    // Tokens kept of a group.
    int32_t kept(uint32_t layer, uint32_t head) const { return kept_counts[index(layer, head)]; }

    // Row of the configurations; TCA_HEAD_DENSE also for a row that keeps everything: nothing is to be selected then.
    // TCA_HEAD_SLIDING: the head has no region.
    int32_t config(uint32_t layer, uint32_t head) const { return configs[index(layer, head)]; }

    bool layer_compacts(uint32_t layer) const { return layer_selects[layer]; }

    // Whether the layer has regions; one with sliding-window attention has none: 0 slots, 0 length.
    bool layer_stored(uint32_t layer) const { return budgets.head_config[index(layer, 0)] != TCA_HEAD_SLIDING; }

    // First slot, in any region, of the group that is compacted next (the same for every head only if it keeps the same).
    int64_t next_group_slot(uint32_t layer, uint32_t head, const tca_seq_state & state) const;

    // Number of leading tokens that a removal of a tail must leave, 0 if nothing was compacted: with fewer, the last group would
    // be compacted where a fresh evaluation of what remains has not compacted it.
    uint32_t n_fixed(const tca_seq_state & state) const;

    // Whether a sequence can be in this state: it fits the context, and just those groups are compacted that n_tokens call for.
    bool possible(const tca_seq_state & state) const;

    // Cuts n_tokens into segments and moves the state past them.
    std::vector<tca_segment> advance(tca_seq_state & state, uint32_t n_tokens) const;

    // Most segments that n_tokens tokens of one sequence can be cut into.
    uint32_t max_segments(uint32_t n_tokens) const;

    // Writes what a segment of a sequence does to the regions of a layer: a row of the descriptor for one sequence, fields
    // [n_head_kv, TCA_DESC_SIZE]. first_slot: of the sequence's part of the layer's store. token, pos: the segment's first token in the micro-batch, and its position.
    void describe(uint32_t layer, int64_t first_slot, const tca_segment & segment, int32_t token, int32_t pos, int32_t * fields) const;

private:
    size_t index(uint32_t layer, uint32_t head) const { return (size_t) layer*budgets.n_head_kv + head; }

    void lay_out();

    // Tokens that a sequence with n_groups groups may have for stash_holds().
    int64_t stash_ends(uint32_t n_groups) const;

    bool                 selects = false;  // some head is not dense
    std::vector<bool>    layer_selects;
    std::vector<int32_t> kept_counts;      // [n_layer, n_head_kv]
    std::vector<int32_t> configs;          // [n_layer, n_head_kv]
    std::vector<int64_t> capacities;       // [n_layer, n_head_kv]
    std::vector<int64_t> offsets;          // [n_layer, n_head_kv]
    std::vector<int64_t> layer_slots;      // [n_layer]
};

// Groups compacted after n_tokens tokens.
uint32_t tca_plan_groups_at(const tca_budgets & budgets, uint32_t n_tokens);

// Slots of a region for any sequence of up to n_ctx tokens, of a head that keeps `kept` tokens of a group: its largest length,
// and the rollback where a group can be compacted. Rises with n_ctx.
int64_t tca_plan_capacity_for(const tca_budgets & budgets, int32_t kept, uint32_t n_ctx);

// An upper bound of the sum of tca_plan_capacity_for() over n_seqs sequences of n_ctx tokens in all, however they share them.
int64_t tca_plan_shared_capacity_for(const tca_budgets & budgets, int32_t kept, uint32_t n_ctx, uint32_t n_seqs);
