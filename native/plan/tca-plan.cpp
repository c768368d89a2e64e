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
        capacity = std::max(capacity, t - (n_last - 1)*freed);
    }
    return capacity;
}

tca_plan::tca_plan(tca_budgets_data data, uint32_t n_ctx_seq) : budgets(std::move(data)), n_ctx_seq(n_ctx_seq) {
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

void tca_plan::describe(uint32_t layer, uint32_t stream, const tca_segment & segment, int32_t token, int32_t pos, int32_t * fields) const {
    for (uint32_t h = 0; h < n_head_kv(); ++h) {
        tca_desc d;
        d.offset = stream*slots(layer) + offset(layer, h);
        d.past   = length(layer, h, segment.before);
        d.token  = token;
        d.count  = segment.n_tokens;
        d.pos    = pos;
        d.group  = segment.compacts ? next_group_slot(layer, h, segment.before) : -1;
        d.config = config(layer, h);
        d.write(fields + h*TCA_DESC_SIZE);
    }
}

uint32_t tca_plan::max_segments(uint32_t n_tokens) const {
    return selects ? 1 + (n_tokens + budgets.group_size - 1)/budgets.group_size : 1;
}
