// The plan against a simulation that holds a list of tokens per region and moves one token at a time.
#include "check.h"

#include "plan/tca-plan.h"

#include <algorithm>
#include <numeric>

static tca_budgets_data make_budgets(random_t & rng, bool dense = false) {
    tca_budgets_data b;
    b.version    = TCA_FORMAT_VERSION;
    b.block_size = 1u << rng.below(4);
    b.group_size = b.block_size*rng.range(1, 6);
    b.window     = rng.range(1, 40);
    b.sinks      = rng.below(10);
    b.rollback   = rng.below(3) == 0 ? 0 : rng.below(b.group_size + 1);
    b.metric     = "key-diff";
    b.n_layer    = rng.range(1, 3);
    b.n_head_kv  = rng.range(1, 3);
    for (uint32_t k = rng.below(2); k <= b.block_size; k += rng.range(1, 3)) {
        b.keep_counts.push_back(k);
    }
    const int n_blocks = b.group_size/b.block_size;
    for (int c = 0; c < 4; ++c) {
        std::vector<int32_t> row(b.keep_counts.size());
        for (int i = 0; i < n_blocks; ++i) {
            ++row[rng.below(row.size())];
        }
        b.configs.insert(b.configs.end(), row.begin(), row.end());
    }
    for (uint32_t i = 0; i < b.n_layer*b.n_head_kv; ++i) {
        b.head_config.push_back(dense ? -1 : rng.range(-1, 3));
    }
    if (!dense && b.n_layer > 1 && rng.below(3) == 0) {
        const size_t first = rng.below(b.n_layer)*b.n_head_kv;
        std::fill_n(b.head_config.begin() + first, b.n_head_kv, TCA_HEAD_SLIDING);
    }
    return b;
}

// One sequence, token by token, every region a list of token indices.
struct simulation {
    const tca_plan & plan;
    const tca_budgets_data & b;
    tca_seq_state state;
    std::vector<std::vector<uint32_t>> regions;  // [n_layer*n_head_kv]
    int64_t compactions = 0;
    bool    any_sparse  = false;

    explicit simulation(const tca_plan & plan) : plan(plan), b(plan.budgets), regions(b.n_layer*b.n_head_kv) {
        for (size_t i = 0; i < regions.size(); ++i) {
            any_sparse = any_sparse || (stored(i) && kept(i) != b.group_size);
        }
    }

    // a layer with sliding-window attention has no regions: its lists stay empty
    bool stored(size_t i) const { return b.head_config[i] != TCA_HEAD_SLIDING; }

    uint32_t kept(size_t i) const {
        if (b.head_config[i] < 0) {
            return b.group_size;
        }
        uint32_t n = 0;
        for (size_t j = 0; j < b.keep_counts.size(); ++j) {
            n += b.keep_counts[j]*b.configs[b.head_config[i]*b.keep_counts.size() + j];
        }
        return n;
    }

    // true: a group was compacted after this token
    bool token() {
        for (size_t i = 0; i < regions.size(); ++i) {
            if (!stored(i)) {
                continue;
            }
            regions[i].push_back(state.n_tokens);
            CHECK((int64_t) regions[i].size() <= plan.capacity(i/b.n_head_kv, i%b.n_head_kv), "region %zu holds %zu", i, regions[i].size());
        }
        ++state.n_tokens;
        const uint32_t group_end = b.sinks + (state.n_groups + 1)*b.group_size;
        if (!any_sparse || state.n_tokens < group_end + b.window) {
            return false;
        }
        for (size_t i = 0; i < regions.size(); ++i) {
            if (!stored(i)) {
                continue;
            }
            // drop tokens of the group from its end until `kept` are left
            auto & r = regions[i];
            const auto first = std::find(r.begin(), r.end(), group_end - b.group_size);
            CHECK(first != r.end() && first[b.group_size - 1] == group_end - 1, "group %u is not whole", state.n_groups);
            CHECK(first - r.begin() == plan.next_group_slot(i/b.n_head_kv, i%b.n_head_kv, state), "group slot");
            r.erase(first + kept(i), first + b.group_size);
        }
        ++state.n_groups;
        ++compactions;
        return true;
    }

    void roll_back_to(uint32_t n_tokens) {
        for (size_t i = 0; i < regions.size(); ++i) {
            auto & r = regions[i];
            for (uint32_t t = state.n_tokens; t > n_tokens && stored(i); --t) {
                CHECK(!r.empty() && r.back() == t - 1, "a token to remove is no longer in the dense part");
                r.pop_back();
            }
        }
        state.n_tokens = n_tokens;
    }

    void check() const {
        for (size_t i = 0; i < regions.size(); ++i) {
            CHECK(plan.length(i/b.n_head_kv, i%b.n_head_kv, state) == (int64_t) regions[i].size(), "T %u groups %u region %zu: %lld != %zu",
                    state.n_tokens, state.n_groups, i, (long long) plan.length(i/b.n_head_kv, i%b.n_head_kv, state), regions[i].size());
        }
        const uint32_t fixed = plan.n_fixed(state);
        CHECK(fixed <= state.n_tokens, "n_fixed %u of %u", fixed, state.n_tokens);
        // every token from n_fixed on is there, in every region, at the end
        for (size_t i = 0; i < regions.size(); ++i) {
            const auto & r = regions[i];
            for (uint32_t t = fixed; t < state.n_tokens && stored(i); ++t) {
                CHECK(r[r.size() - (state.n_tokens - t)] == t, "token %u is not dense", t);
            }
        }
    }
};

static bool same(const tca_seq_state & a, const tca_seq_state & b) {
    return a.n_tokens == b.n_tokens && a.n_groups == b.n_groups;
}

TEST(lengths_token_by_token) {
    int64_t compactions = 0;
    for (int seed = 0; seed < 200; ++seed) {
        random_t rng(seed);
        const uint32_t n_ctx = rng.range(1, 300);
        const tca_plan plan(make_budgets(rng, seed % 20 == 0), n_ctx);
        const tca_budgets b = plan.budgets.view();
        CHECK(tca_budgets_check(&b) == TCA_OK, "%s", tca_last_error());

        simulation sim(plan);
        tca_seq_state state;
        std::vector<int64_t> longest(sim.regions.size());
        while (sim.state.n_tokens < n_ctx) {
            const bool compacted = sim.token();
            const auto segments  = plan.advance(state, 1);
            CHECK(segments.size() == 1 && segments[0].compacts == compacted && same(state, sim.state), "seed %d T %u", seed, state.n_tokens);
            for (size_t i = 0; i < longest.size(); ++i) {
                // right before a compaction the region holds what was removed too
                const int64_t extra = compacted && sim.stored(i) ? b.group_size - sim.kept(i) : 0;
                longest[i] = std::max<int64_t>(longest[i], sim.regions[i].size() + extra);
            }
            sim.check();
            if (sim.any_sparse) {
                CHECK(tca_plan_groups_at(b, state.n_tokens) == state.n_groups, "groups_at");
                for (size_t i = 0; i < longest.size(); ++i) {
                    CHECK(tca_plan_length(&b, i/b.n_head_kv, i%b.n_head_kv, state.n_tokens) == (int64_t) sim.regions[i].size(), "C API length");
                }
            }
        }
        for (size_t i = 0; i < longest.size(); ++i) {
            const bool    drops = sim.stored(i) && sim.kept(i) < b.group_size && tca_plan_groups_at(b, n_ctx) > 0;
            const int64_t want  = longest[i] + (drops ? b.rollback : 0);
            CHECK(plan.capacity(i/b.n_head_kv, i%b.n_head_kv) == want, "seed %d region %zu: capacity %lld, longest %lld", seed, i,
                    (long long) plan.capacity(i/b.n_head_kv, i%b.n_head_kv), (long long) longest[i]);
            CHECK(tca_plan_capacity(&b, i/b.n_head_kv, i%b.n_head_kv, n_ctx) == want, "C API capacity");
        }
        compactions += sim.compactions;
    }
    CHECK(compactions > 1000, "only %lld compactions were seen", (long long) compactions);
}

TEST(any_split_into_micro_batches_gives_the_same_state) {
    for (int seed = 0; seed < 300; ++seed) {
        random_t rng(1000 + seed);
        const uint32_t n_ctx = rng.range(20, 400);
        const tca_plan plan(make_budgets(rng), n_ctx);
        for (int n_ubatch : { 1, 2, 7, 16, 64, 512, -1 }) {
            simulation sim(plan);
            tca_seq_state state;
            while (state.n_tokens < n_ctx) {
                const uint32_t n = std::min<uint32_t>(n_ubatch < 0 ? rng.range(1, 90) : n_ubatch, n_ctx - state.n_tokens);
                const auto segments = plan.advance(state, n);
                CHECK(segments.size() <= plan.max_segments(n), "%zu segments, at most %u were promised", segments.size(), plan.max_segments(n));
                uint32_t done = 0;
                for (const tca_segment & seg : segments) {
                    CHECK(same(seg.before, sim.state) && seg.n_tokens >= 1, "segment starts at T %u", seg.before.n_tokens);
                    for (uint32_t t = 0; t < seg.n_tokens; ++t) {
                        const bool last = t + 1 == seg.n_tokens;
                        CHECK(sim.token() == (last && seg.compacts), "a compaction lies inside a segment");
                    }
                    done += seg.n_tokens;
                }
                CHECK(done == n && same(state, sim.state), "seed %d", seed);
                sim.check();
            }
        }
    }
}

TEST(rollbacks_leave_what_a_fresh_run_leaves) {
    int64_t n_rollbacks = 0, to_the_edge = 0;
    for (int seed = 0; seed < 300; ++seed) {
        random_t rng(2000 + seed);
        const uint32_t n_ctx = rng.range(50, 400);
        const tca_plan plan(make_budgets(rng), n_ctx);
        const tca_budgets b = plan.budgets.view();
        simulation sim(plan);
        tca_seq_state state;
        for (int step = 0; step < 60; ++step) {
            const uint32_t n = std::min<uint32_t>(rng.range(1, 60), n_ctx - state.n_tokens);
            for (const tca_segment & seg : plan.advance(state, n)) {
                for (uint32_t t = 0; t < seg.n_tokens; ++t) {
                    CHECK(sim.token() == (seg.compacts && t + 1 == seg.n_tokens), "compaction after a rollback");
                }
            }
            sim.check();
            if (rng.below(2) == 0) {
                const uint32_t to = rng.range(plan.n_fixed(state), state.n_tokens);
                sim.roll_back_to(to);
                state.n_tokens = to;
                ++n_rollbacks;
                CHECK(state.n_groups == (sim.any_sparse ? tca_plan_groups_at(b, to) : 0), "groups after a rollback");
                CHECK(plan.possible(state), "a rollback leaves what no run of tokens leaves");
                if (state.n_groups > 0) {
                    CHECK(!plan.possible({ plan.n_fixed(state) - 1, state.n_groups }), "one token more could have gone");
                    to_the_edge += to == plan.n_fixed(state);
                }
                sim.check();
            }
        }
        CHECK(same(state, sim.state), "seed %d", seed);
    }
    CHECK(n_rollbacks > 5000 && to_the_edge > 100, "%lld rollbacks, %lld to the edge", (long long) n_rollbacks, (long long) to_the_edge);
}

// The rows that a compaction drops wait at the end of their region: nothing that the sequence needs may lie there while
// stash_holds() says so, and it has to say so for `rollback` tokens at least, wherever in the context the compaction was.
TEST(what_was_dropped_stays_as_long_as_it_is_promised) {
    int64_t n_held = 0, n_gone = 0;
    for (int seed = 0; seed < 300; ++seed) {
        random_t rng(5000 + seed);
        const uint32_t n_ctx = rng.range(50, 400);
        const tca_plan plan(make_budgets(rng), n_ctx);
        tca_seq_state state;
        CHECK(!plan.stash_holds(state), "nothing was dropped");
        while (state.n_tokens < n_ctx) {
            plan.advance(state, 1);
            if (state.n_groups == 0) {
                continue;
            }
            bool whole = true;
            for (uint32_t il = 0; il < plan.n_layer(); ++il) {
                for (uint32_t h = 0; h < plan.n_head_kv(); ++h) {
                    const int64_t n = plan.budgets.group_size - plan.kept(il, h);
                    if (plan.config(il, h) < 0) {
                        continue;
                    }
                    CHECK(plan.stash(il, h) + n == plan.capacity(il, h) && plan.stash(il, h) >= 0, "the end of the region");
                    whole = whole && plan.length(il, h, state) <= plan.stash(il, h);
                }
            }
            CHECK(plan.stash_holds(state) == whole, "seed %d T %u", seed, state.n_tokens);
            const uint32_t since = state.n_tokens - plan.n_fixed(state);
            CHECK(whole || since > plan.budgets.rollback, "seed %d: gone after %u of %u tokens", seed, since, plan.budgets.rollback);
            (whole ? n_held : n_gone) += 1;
        }
    }
    CHECK(n_held > 10000 && n_gone > 500, "%lld held, %lld gone", (long long) n_held, (long long) n_gone);
}

// Sequences that share a context of n_ctx tokens must fit side by side however they share it.
TEST(shared_rooms_fit) {
    double tightest = 0.0;
    for (int seed = 0; seed < 400; ++seed) {
        random_t rng(6000 + seed);
        const uint32_t n_ctx = rng.range(1, 2000), n_seqs = rng.range(1, 6);
        const tca_budgets_data data = make_budgets(rng);
        const tca_budgets b = data.view();
        for (int round = 0; round < 40; ++round) {
            std::vector<uint32_t> n_tokens(n_seqs, 0);
            uint32_t left = n_ctx;
            for (uint32_t & n : n_tokens) {
                n = round % 2 ? n_ctx/n_seqs : rng.below(left + 1);  // equal shares take the most slots
                left -= n;
            }
            for (uint32_t i = 0; i < b.n_layer*b.n_head_kv; ++i) {
                if (b.head_config[i] == TCA_HEAD_SLIDING) {
                    continue;
                }
                const int32_t kept = tca_config_kept(b, b.head_config[i]);
                int64_t sum = 0;
                for (uint32_t n : n_tokens) {
                    sum += tca_plan_capacity_for(b, kept, n);
                }
                const int64_t room = tca_plan_shared_capacity_for(b, kept, n_ctx, n_seqs);
                CHECK(sum <= room, "seed %d: %lld slots, room for %lld", seed, (long long) sum, (long long) room);
                CHECK(tca_plan_capacity_for(b, kept, n_ctx) <= room, "one sequence with all of it");
                tightest = std::max(tightest, (double) sum/room);
            }
        }
    }
    CHECK(tightest > 0.99, "the bound is loose: %g", tightest);
}

// A saved state comes from outside: its counters must be ones that tokens can lead to, or a region would overflow.
TEST(possible_states_are_those_that_can_be_reached) {
    for (int seed = 0; seed < 60; ++seed) {
        random_t rng(4000 + seed);
        const uint32_t n_ctx = rng.range(20, 200);
        const tca_plan plan(make_budgets(rng, seed % 15 == 0), n_ctx);
        const uint32_t group = plan.budgets.group_size, n_max = n_ctx/group + 3;
        std::vector<bool> reached((n_ctx + 1)*n_max, false);
        tca_seq_state state;
        for (uint32_t t = 0; t <= n_ctx; ++t) {
            reached[t*n_max + state.n_groups] = true;
            plan.advance(state, t < n_ctx);
        }
        for (uint32_t n_tokens = 0; n_tokens <= n_ctx; ++n_tokens) {
            for (uint32_t n_groups = 0; n_groups < n_max; ++n_groups) {
                const tca_seq_state s = { n_tokens, n_groups };
                CHECK(plan.possible(s) == reached[n_tokens*n_max + n_groups], "seed %d: T %u, %u groups", seed, n_tokens, n_groups);
                for (uint32_t i = 0; plan.possible(s) && i < plan.n_layer()*plan.n_head_kv(); ++i) {
                    const uint32_t il = i/plan.n_head_kv(), h = i%plan.n_head_kv();
                    CHECK(plan.length(il, h, s) >= 0 && plan.length(il, h, s) <= plan.capacity(il, h), "a possible state overflows");
                }
            }
        }
        for (const tca_seq_state & s : { tca_seq_state { n_ctx + 1, 0 }, { UINT32_MAX, 0 }, { n_ctx, UINT32_MAX }, { UINT32_MAX, UINT32_MAX },
                { 0, 1u << 31 }, { n_ctx, UINT32_MAX/group } }) {
            CHECK(!plan.possible(s), "T %u, %u groups", s.n_tokens, s.n_groups);
        }
    }
}

TEST(regions_tile_the_store) {
    for (int seed = 0; seed < 100; ++seed) {
        random_t rng(3000 + seed);
        const tca_plan plan(make_budgets(rng), rng.range(0, 5000));
        for (uint32_t il = 0; il < plan.n_layer(); ++il) {
            int64_t at = 0;
            bool    any = false;
            for (uint32_t h = 0; h < plan.n_head_kv(); ++h) {
                CHECK(plan.offset(il, h) == at, "regions overlap or leave a hole");
                at += plan.capacity(il, h);
                any = any || (plan.layer_stored(il) && plan.kept(il, h) != (int32_t) plan.budgets.group_size);
            }
            CHECK(plan.slots(il) == at && plan.layer_compacts(il) == any, "layer %u", il);
        }
    }
}

TEST(most_segments_is_reached) {
    random_t rng(7);
    tca_budgets_data b = make_budgets(rng);
    b.sinks = 3;
    b.head_config.assign(b.head_config.size(), 0);
    b.configs.assign(b.configs.size(), 0);
    for (size_t c = 0; c < b.configs.size(); c += b.keep_counts.size()) {
        b.configs[c] = b.group_size/b.block_size;  // the smallest count: sparse for sure
    }
    const tca_plan plan(b, 1 << 20);
    for (uint32_t n : { 1u, 2u, b.group_size - 1, b.group_size, b.group_size + 1, 5*b.group_size + 1 }) {
        size_t most = 0;
        for (uint32_t start = 0; start < 200; ++start) {
            tca_seq_state state;
            plan.advance(state, start);
            most = std::max(most, plan.advance(state, n).size());
        }
        // n = 1 can end on a compaction but never go past it; so can every n = 1 + multiple of G
        const uint32_t promised = plan.max_segments(n);
        CHECK(most <= promised && most + 1 >= promised, "n %u: %zu of %u", n, most, promised);
    }
    tca_budgets_data dense = b;
    dense.head_config.assign(dense.head_config.size(), TCA_HEAD_DENSE);
    const tca_plan plan_dense(dense, 1000);
    tca_seq_state state;
    const auto segments = plan_dense.advance(state, 1000);
    CHECK(segments.size() == 1 && !segments[0].compacts && plan_dense.max_segments(1000) == 1 && plan_dense.n_fixed(state) == 0, "dense");
}

// Exact integers in 128 bits.
static __int128 exact_length(const tca_budgets_data & b, int64_t kept, __int128 t) {
    const __int128 dense  = (__int128) b.sinks + b.window;
    const __int128 groups = t < dense ? 0 : (t - dense)/b.group_size;
    return t - groups*(b.group_size - kept);
}

TEST(no_overflow_at_the_largest_sizes) {
    for (uint32_t window : { 1u, 496u, (uint32_t) TCA_MAX_WINDOW }) {
        for (uint32_t sinks : { 0u, 16u, (uint32_t) TCA_MAX_WINDOW }) {
            for (uint32_t group : { 256u, (uint32_t) TCA_MAX_GROUP }) {
                tca_budgets_data b;
                b.version     = TCA_FORMAT_VERSION;
                b.block_size  = TCA_MAX_BLOCK;
                b.group_size  = group;
                b.window      = window;
                b.sinks       = sinks;
                b.metric      = "key-diff";
                b.keep_counts = { 0, 1, 255, 256 };
                const int32_t n = group/TCA_MAX_BLOCK;
                b.configs     = { n, 0, 0, 0,   0, n, 0, 0,   0, 0, n, 0,   0, 0, 0, n };
                b.n_layer     = 1;
                b.n_head_kv   = 5;
                b.head_config = { 0, 1, 2, 3, TCA_HEAD_DENSE };
                const tca_budgets view = b.view();
                CHECK(tca_budgets_check(&view) == TCA_OK, "%s", tca_last_error());

                for (uint64_t n_ctx : { 1ull, 1ull << 21, (1ull << 31) - 1, 1ull << 31, (1ull << 31) + 1, (1ull << 32) - 1 }) {
                    const tca_plan plan(b, n_ctx);
                    for (uint32_t h = 0; h < 5; ++h) {
                        const int64_t kept = plan.kept(0, h);
                        CHECK(plan.capacity(0, h) > 0 && plan.capacity(0, h) <= (int64_t) n_ctx + plan.budgets.rollback, "capacity %lld", (long long) plan.capacity(0, h));
                        const uint64_t steps[] = { 1, 2, group, 1ull << 20, 1ull << 24, n_ctx/2, n_ctx - 1, n_ctx };
                        for (uint64_t t : steps) {
                            if (t > n_ctx) {
                                continue;
                            }
                            const __int128 want = exact_length(b, kept, t);
                            CHECK(tca_plan_length(&view, 0, h, t) == (int64_t) want && want <= plan.capacity(0, h),
                                    "T %llu head %u: %lld", (unsigned long long) t, h, (long long) tca_plan_length(&view, 0, h, t));
                        }
                    }
                    // one huge step of a sequence whose every group was compacted in time
                    tca_seq_state state;
                    state.n_groups = tca_plan_groups_at(view, n_ctx);
                    state.n_tokens = n_ctx;
                    CHECK(plan.n_fixed(state) <= n_ctx, "n_fixed %u", plan.n_fixed(state));
                    uint64_t bytes = 0, dense = 0;
                    CHECK(tca_plan_bytes(&view, 256, 256, 1, 1, n_ctx, &bytes, &dense) == TCA_OK, "%s", tca_last_error());
                    CHECK(dense == (uint64_t) n_ctx*5*1024 && bytes <= dense + (uint64_t) n_ctx*5*4, "bytes %llu", (unsigned long long) bytes);
                }
                // micro-batches across 2^31 and up to 2^32 - 1
                const tca_plan plan(b, UINT32_MAX);
                for (uint64_t end : { 1ull << 31, (1ull << 32) - 1 }) {
                    tca_seq_state state;
                    state.n_tokens = end - 3*group;
                    state.n_groups = tca_plan_groups_at(view, state.n_tokens);
                    uint32_t done = 0;
                    for (const tca_segment & seg : plan.advance(state, 3*group)) {
                        done += seg.n_tokens;
                    }
                    CHECK(done == 3*group && state.n_tokens == end && state.n_groups == tca_plan_groups_at(view, end), "T %u", state.n_tokens);
                }
            }
        }
    }
}

TEST(c_api_refuses_what_does_not_exist) {
    random_t rng(11);
    tca_budgets_data b = make_budgets(rng);
    const tca_budgets view = b.view();
    CHECK(tca_plan_length(&view, b.n_layer, 0, 1) < 0 && strstr(tca_last_error(), "layer"), "%s", tca_last_error());
    CHECK(tca_plan_capacity(&view, 0, b.n_head_kv, 1) < 0 && strstr(tca_last_error(), "KV head"), "%s", tca_last_error());
    CHECK(tca_budgets_kept_per_group(&view, 4) < 0 && strstr(tca_last_error(), "configuration 4"), "%s", tca_last_error());
    CHECK(tca_budgets_kept_per_group(&view, -2) < 0, "%s", tca_last_error());
    CHECK(tca_budgets_kept_per_group(&view, TCA_HEAD_DENSE) == (int32_t) b.group_size, "dense");
    uint64_t bytes = 0;
    CHECK(tca_plan_bytes(&view, 64, 64, -1, 1, 10, &bytes, nullptr) == TCA_ERR_ARGUMENT, "type -1");
    CHECK(tca_plan_bytes(&view, 64, 64, 1, 9999, 10, &bytes, nullptr) == TCA_ERR_ARGUMENT, "type 9999");
    CHECK(tca_plan_bytes(&view, 80, 64, 8, 1, 10, &bytes, nullptr) == TCA_ERR_ARGUMENT, "q8_0 needs multiples of 32");
    CHECK(tca_plan_bytes(&view, 0, 64, 1, 1, 10, &bytes, nullptr) == TCA_ERR_ARGUMENT, "no head size");
    CHECK(tca_plan_bytes(&view, 64, 64, 1, 1, 10, nullptr, nullptr) == TCA_OK, "outputs may be NULL");
    b.version = 9;
    const tca_budgets wrong = b.view();
    CHECK(tca_plan_groups(&wrong, 5) < 0 && tca_plan_bytes(&wrong, 64, 64, 1, 1, 10, &bytes, nullptr) == TCA_ERR_BUDGETS, "version");
    CHECK(strstr(tca_last_error(), "tca.version"), "%s", tca_last_error());
}

int main(int argc, char ** argv) {
    return run_tests(argc, argv);
}
