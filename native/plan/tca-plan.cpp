#include "tca-plan.h"

#include "ops/tca-ops.h"

#include <algorithm>

uint32_t tca_plan_groups_at(const tca_budgets & b, uint32_t n_tokens) {
    const uint64_t dense = (uint64_t) b.sinks + b.window;
    return n_tokens < dense ? 0 : (n_tokens - dense)/b.group_size;
}

int64_t tca_plan_capacity_for(const tca_budgets & b, int32_t kept, uint32_t n_ctx) {
    const int64_t freed = (int64_t) b.group_size - kept;
    if (n_ctx == 0) {
        return 0;
    }
    // A region is longest right before a compaction, or at the very end. Lengths at successive compactions rise by `kept`
    // (>= 0), so the last one before n_ctx and n_ctx itself are the only candidates.
    const int64_t n_last    = tca_plan_groups_at(b, n_ctx);
    int64_t       capacity  = (int64_t) n_ctx - n_last*freed;
    if (n_last > 0) {
        const int64_t t = (int64_t) b.sinks + b.window + n_last*b.group_size;
        capacity = std::max(capacity, t - (n_last - 1)*freed) + (freed > 0 ? b.rollback : 0);
    }
    return capacity;
}

int64_t tca_plan_shared_capacity_for(const tca_budgets & b, int32_t kept, uint32_t n_ctx, uint32_t n_seqs) {
    // The length right before a compaction, the longest for its number of tokens t, is t with r = kept/G of what lies behind the
    // first sinks + window + G tokens: a line in t, so that a sum over sequences depends on the sum of their tokens alone.
    const int64_t freed = (int64_t) b.group_size - kept;
    const int64_t first = (int64_t) b.sinks + b.window + b.group_size;
    const int64_t n_may = std::min<int64_t>(n_seqs, n_ctx/first);  // sequences that can be long enough to compact a group
    const int64_t dense = (int64_t) n_ctx;
    const int64_t lines = (n_seqs*first*freed + (int64_t) kept*n_ctx)/b.group_size + 1;
    return std::min(dense, lines) + (freed > 0 ? n_may*b.rollback : 0);
}

tca_plan::tca_plan(tca_budgets_data data, uint32_t n_ctx_seq) :
        shared_budgets(std::make_shared<const tca_budgets_data>(std::move(data))), budgets(*shared_budgets), n_ctx_seq(n_ctx_seq) {
    lay_out();
}

tca_plan::tca_plan(const tca_plan & other, uint32_t n_ctx_seq) :
        shared_budgets(other.shared_budgets), budgets(*shared_budgets), n_ctx_seq(n_ctx_seq) {
    lay_out();
}

void tca_plan::lay_out() {
    const tca_budgets b = budgets.view();
    const size_t n = (size_t) b.n_layer*b.n_head_kv;

    kept_counts.resize(n);
    configs.resize(n);
    capacities.resize(n);
    offsets.resize(n);
    layer_slots.assign(b.n_layer, 0);
    layer_selects.assign(b.n_layer, false);

    for (uint32_t il = 0; il < b.n_layer; ++il) {
        for (uint32_t h = 0; h < b.n_head_kv; ++h) {
            const size_t i = index(il, h);
            kept_counts[i] = tca_config_kept(b, b.head_config[i]);
            capacities[i]  = layer_stored(il) ? tca_plan_capacity_for(b, kept_counts[i], n_ctx_seq) : 0;
            offsets[i]     = layer_slots[il];
            layer_slots[il] += capacities[i];
            configs[i]     = kept_counts[i] == (int32_t) b.group_size ? (int32_t) TCA_HEAD_DENSE : b.head_config[i];
            if (configs[i] >= 0) {
                layer_selects[il] = true;
                selects           = true;
            }
        }
    }
}

int64_t tca_plan::length(uint32_t layer, uint32_t head, const tca_seq_state & s) const {
    if (!layer_stored(layer)) {
        return 0;
    }
    return (int64_t) s.n_tokens - (int64_t) s.n_groups*((int64_t) budgets.group_size - kept(layer, head));
}

int64_t tca_plan::stash_ends(uint32_t n_groups) const {
    int64_t n_tokens = n_ctx_seq;
    for (uint32_t il = 0; il < n_layer(); ++il) {
        for (uint32_t h = 0; h < n_head_kv() && layer_compacts(il); ++h) {
            const int64_t freed = (int64_t) budgets.group_size - kept(il, h);
            if (freed > 0) {
                n_tokens = std::min(n_tokens, stash(il, h) + n_groups*freed);
            }
        }
    }
    return n_tokens;
}

int64_t tca_plan::next_group_slot(uint32_t layer, uint32_t head, const tca_seq_state & s) const {
    return (int64_t) budgets.sinks + (int64_t) s.n_groups*kept(layer, head);
}

uint32_t tca_plan::n_fixed(const tca_seq_state & s) const {
    return s.n_groups == 0 ? 0 : budgets.sinks + budgets.window + s.n_groups*budgets.group_size;
}

bool tca_plan::possible(const tca_seq_state & s) const {
    return s.n_tokens <= n_ctx_seq && s.n_groups == (selects ? tca_plan_groups_at(budgets.view(), s.n_tokens) : 0);
}

std::vector<tca_segment> tca_plan::advance(tca_seq_state & s, uint32_t n_tokens) const {
    std::vector<tca_segment> res;
    while (n_tokens > 0) {
        tca_segment seg = { s, n_tokens, false };
        if (selects) {
            const uint64_t next = (uint64_t) budgets.sinks + budgets.window + (uint64_t) (s.n_groups + 1)*budgets.group_size;
            if (s.n_tokens + (uint64_t) n_tokens >= next) {
                seg.n_tokens = next - s.n_tokens;
                seg.compacts = true;
            }
        }
        res.push_back(seg);
        s.n_tokens += seg.n_tokens;
        s.n_groups += seg.compacts ? 1 : 0;
        n_tokens   -= seg.n_tokens;
    }
    return res;
}

void tca_plan::describe(uint32_t layer, int64_t first_slot, const tca_segment & segment, int32_t token, int32_t pos, int32_t * fields) const {
    for (uint32_t h = 0; h < n_head_kv(); ++h) {
        tca_desc d;
        d.offset = first_slot + offset(layer, h);
        d.past   = length(layer, h, segment.before);
        d.token  = token;
        d.count  = segment.n_tokens;
        d.pos    = pos;
        d.group  = segment.compacts ? next_group_slot(layer, h, segment.before) : -1;
        d.config = config(layer, h);
        d.stash  = segment.compacts ? stash(layer, h) : -1;
        d.write(fields + h*TCA_DESC_SIZE);
    }
}

uint32_t tca_plan::max_segments(uint32_t n_tokens) const {
    return selects ? 1 + (n_tokens + budgets.group_size - 1)/budgets.group_size : 1;
}
