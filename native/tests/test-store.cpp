// The whole store over the plan: sequences of different lengths fed in random micro-batches, append, attention and compaction
// in one graph as the runtime builds it, rollbacks in between; after every step every byte is compared.
#include "store.h"

#include "cpu/tca-observe.h"
#include "cpu/tca-select.h"
#include "plan/tca-plan.h"
#include "reference/tca-reference.h"

#include "ggml-cpp.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>

static const std::vector<ggml_type> TYPES = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };

static tca_budgets_data make_budgets(random_t & rng, int n_head_kv) {
    tca_budgets_data b;
    b.version     = TCA_FORMAT_VERSION;
    b.block_size  = 1 << rng.range(2, 4);
    b.group_size  = b.block_size*rng.range(1, 5);
    b.window      = rng.range(1, 50);
    b.sinks       = rng.below(20);
    b.metric      = "key-diff";
    b.n_layer     = 1;
    b.n_head_kv   = n_head_kv;
    const int block = b.block_size, n_blocks = b.group_size/b.block_size;
    b.keep_counts = { 0, 1, 2, block/2 + 1, block };
    // nothing kept, everything kept by selection, and two mixed ones
    b.configs = { n_blocks, 0, 0, 0, 0,   0, 0, 0, 0, n_blocks };
    for (int c = 0; c < 2; ++c) {
        std::vector<int32_t> row(5);
        for (int i = 0; i < n_blocks; ++i) {
            ++row[rng.below(5)];
        }
        b.configs.insert(b.configs.end(), row.begin(), row.end());
    }
    for (int h = 0; h < n_head_kv; ++h) {
        b.head_config.push_back(h == 0 ? 2 : rng.range(-1, 3));
    }
    return b;
}

struct pipeline_case {
    ggml_type type_k, type_v;
    int dk, dv, n_head_kv, gqa, n_streams, n_ctx;
    tca_rope_type rope;
    int n_rot;
    int hadamard;
    const char * metric = "key-diff";
};

struct pipeline_counts {
    int steps = 0, compactions = 0, rollbacks = 0, multi = 0;
};

static void run_pipeline(const pipeline_case & c, int n_threads, uint64_t seed, pipeline_counts & counts) {
    random_t rng(seed);
    const tca_plan plan(make_budgets(rng, c.n_head_kv), c.n_ctx);
    const tca_budgets_data & b = plan.budgets;
    const tca_budgets view = b.view();
    CHECK(tca_budgets_check(&view) == TCA_OK, "%s", tca_last_error());

    store_shape s;
    s.type_k = c.type_k;
    s.type_v = c.type_v;
    s.dk = c.dk;
    s.dv = c.dv;
    s.n_head_kv = c.n_head_kv;
    s.gqa   = c.gqa;
    s.guard = rng.below(4);  // 0: regions lie side by side, as in the runtime
    s.scale = 1.0f/std::sqrt((float) c.dk);
    for (int i = 0; i < c.n_streams; ++i) {
        s.capacity.emplace_back();
        for (int h = 0; h < c.n_head_kv; ++h) {
            s.capacity.back().push_back(plan.capacity(0, h));
        }
    }
    test_store store(s, seed);

    std::vector<float> freqs(c.n_rot/2);
    for (int i = 0; i < c.n_rot/2; ++i) {
        freqs[i] = std::pow(10000.0f, -2.0f*i/c.n_rot);
    }
    tca_select_params select = {};
    select.block_size  = b.block_size;
    select.group_size  = b.group_size;
    select.n_keep      = b.keep_counts.size();
    select.n_configs   = b.configs.size()/b.keep_counts.size();
    select.keep_counts = b.keep_counts.data();
    select.configs     = b.configs.data();
    select.rope        = { c.rope, c.rope == TCA_ROPE_NONE ? 0 : c.n_rot, 1.1f, freqs.data() };
    select.hadamard    = c.hadamard;
    select.layer       = seed % 7;
    select.metric      = tca_metric_find(c.metric);
    std::vector<float> probe(c.n_head_kv*c.dk);
    for (float & x : probe) {
        x = rng.normal();
    }
    select.probe = probe.data();

    std::vector<tca_seq_state> states(c.n_streams);
    std::vector<int32_t> pos0(c.n_streams);
    for (int32_t & p : pos0) {
        p = rng.below(3)*1000;
    }
    for (int step = 0; step < 1000; ++step) {
        // the streams that take part, each with the same number of tokens
        std::vector<int> order;
        int room = c.n_ctx;
        for (int i = 0; i < c.n_streams; ++i) {
            if (states[i].n_tokens < (uint32_t) c.n_ctx && (order.empty() || rng.below(3) > 0)) {
                order.push_back(i);
                room = std::min<int>(room, c.n_ctx - states[i].n_tokens);
            }
        }
        if (order.empty()) {
            break;
        }
        static const std::vector<int> sizes = { 1, 1, 2, 7, 8, 9, 16, 33, 64, 97 };
        const int n = std::min(rng.pick(sizes), room);

        micro_batch mb;
        mb.fill(s, n*order.size(), rng);
        for (size_t i = 0; i < order.size(); ++i) {
            int done = 0;
            const uint32_t before = states[order[i]].n_tokens;
            const auto segments = plan.advance(states[order[i]], n);
            for (size_t j = 0; j < segments.size(); ++j) {
                if (mb.segments.size() <= j) {
                    mb.segments.emplace_back(order.size());  // nothing to do for the other sequences, unless they have one too
                }
                test_segment & seg = mb.segments[j][i];
                seg.stream = order[i];
                seg.token  = i*n + done;
                seg.count  = segments[j].n_tokens;
                seg.pos    = pos0[order[i]] + before + done;
                for (int h = 0; h < c.n_head_kv; ++h) {
                    seg.group.push_back(segments[j].compacts ? plan.next_group_slot(0, h, segments[j].before) : -1);
                    seg.config.push_back(plan.config(0, h));
                    counts.compactions += segments[j].compacts;
                }
                done += segments[j].n_tokens;
            }
            counts.multi += segments.size() > 1;
        }
        step_options o;
        o.n_threads = n_threads;
        o.fused     = rng.below(2);
        o.select    = &select;
        store.run(mb, o);
        ++counts.steps;

        for (int i = 0; i < c.n_streams; ++i) {
            for (int h = 0; h < c.n_head_kv; ++h) {
                const region_t & r = store.regions[i][h];
                CHECK((int64_t) r.pos.size() == plan.length(0, h, states[i]), "seed %llu stream %d head %d: %zu slots, the plan says %lld",
                        (unsigned long long) seed, i, h, r.pos.size(), (long long) plan.length(0, h, states[i]));
                CHECK(std::is_sorted(r.pos.begin(), r.pos.end()), "positions are out of order");
                // sinks and everything from n_fixed on
                const uint32_t fixed = plan.n_fixed(states[i]);
                for (uint32_t t = 0; t < std::min(b.sinks, states[i].n_tokens); ++t) {
                    CHECK(r.pos[t] == (int32_t) (pos0[i] + t), "sink %u", t);
                }
                for (uint32_t t = fixed; t < states[i].n_tokens; ++t) {
                    CHECK(r.pos[r.pos.size() - (states[i].n_tokens - t)] == (int32_t) (pos0[i] + t), "recent token %u", t);
                }
            }
        }
        if (rng.below(6) == 0) {
            const int i = rng.below(c.n_streams);
            const uint32_t to = rng.range(plan.n_fixed(states[i]), states[i].n_tokens);
            for (int h = 0; h < c.n_head_kv; ++h) {
                store.truncate(i, h, store.regions[i][h].pos.size() - (states[i].n_tokens - to));
            }
            states[i].n_tokens = to;
            ++counts.rollbacks;
        }
    }
}

static void report(const pipeline_counts & c) {
    printf("       %d micro-batches (%d of more than one segment), %d group compactions, %d rollbacks\n", c.steps, c.multi, c.compactions, c.rollbacks);
    CHECK(c.compactions > 50 && c.rollbacks > 5 && c.multi > 10, "the test no longer reaches what it is for");
}

TEST(every_type) {
    pipeline_counts counts;
    int seed = 0;
    for (const ggml_type type : TYPES) {
        for (const int dim : { 32, 64, 96 }) {
            run_pipeline({ type, type, dim, dim, 2, 2, 2, 250, TCA_ROPE_NEOX, dim, 0 }, 1, ++seed, counts);
        }
    }
    run_pipeline({ GGML_TYPE_F16,  GGML_TYPE_Q8_0, 64, 32, 2, 1, 2, 200, TCA_ROPE_NORM, 64, 0 }, 2, ++seed, counts);
    run_pipeline({ GGML_TYPE_Q4_0, GGML_TYPE_F32,  32, 80, 2, 1, 2, 200, TCA_ROPE_NORM, 32, 0 }, 2, ++seed, counts);
    report(counts);
}

TEST(every_rotation) {
    pipeline_counts counts;
    int seed = 100;
    for (const tca_rope_type rope : { TCA_ROPE_NONE, TCA_ROPE_NORM, TCA_ROPE_NEOX }) {
        for (const int n_rot : { 2, 32, 64 }) {
            run_pipeline({ GGML_TYPE_F16, GGML_TYPE_F16, 64, 64, 2, 2, 1, 250, rope, n_rot, 0 }, 1, ++seed, counts);
        }
    }
    for (const int hadamard : { 64, 128 }) {  // keys of quantized caches were multiplied with Hadamard matrices
        run_pipeline({ GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, 128, 128, 2, 1, 1, 250, TCA_ROPE_NEOX, 128, hadamard }, 2, ++seed, counts);
        run_pipeline({ GGML_TYPE_Q4_0, GGML_TYPE_Q4_0, 192, 64,  2, 1, 1, 250, TCA_ROPE_NORM, 64,  64 }, 2, ++seed, counts);
    }
    report(counts);
}

TEST(every_metric) {
    pipeline_counts counts;
    int seed = 150;
    for (int i = 0; tca_metric_at(i) != nullptr; ++i) {
        const char * name = tca_metric_at(i)->name;
        run_pipeline({ GGML_TYPE_F16,  GGML_TYPE_F16,  64, 32, 3, 2, 2, 250, TCA_ROPE_NEOX, 64, 0,  name }, 2, ++seed, counts);
        run_pipeline({ GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, 64, 64, 2, 1, 1, 250, TCA_ROPE_NORM, 64, 64, name }, 1, ++seed, counts);
    }
    report(counts);
}

TEST(many_streams_heads_and_threads) {
    pipeline_counts counts;
    int seed = 200;
    for (int n_threads = 1; n_threads <= 5; ++n_threads) {
        run_pipeline({ GGML_TYPE_F16, GGML_TYPE_F16, 32, 32, 5, 3, 4, 160, TCA_ROPE_NEOX, 32, 0 }, n_threads, ++seed, counts);
    }
    for (int i = 0; i < 12; ++i) {
        run_pipeline({ GGML_TYPE_F32, GGML_TYPE_F32, 8, 8, 1 + i % 4, 1 + i % 3, 1 + i % 3, 500, TCA_ROPE_NORM, 8, 0 }, 1 + i % 2, ++seed, counts);
    }
    report(counts);
}

// Needles through the real thing: with every head dense, or keeping all by selection, a key of any age is found. With a head
// that drops them the output is that of the slots that are left (checked in run()).
TEST(needles_survive_compaction_that_keeps_them) {
    const uint32_t sinks = 4, window = 12, group = 16;
    for (const int n_ubatch : { 1, 5, 16, 64 }) {
        tca_budgets_data b;
        b.version     = TCA_FORMAT_VERSION;
        b.block_size  = 4;
        b.group_size  = group;
        b.window      = window;
        b.sinks       = sinks;
        b.metric      = "key-diff";
        b.keep_counts = { 1, 4 };
        b.configs     = { 0, 4,   4, 0 };
        b.n_layer     = 1;
        b.n_head_kv   = 3;
        b.head_config = { TCA_HEAD_DENSE, 0, 1 };  // dense, keeps all by selection, keeps one of four
        const uint32_t n_ctx = 120;
        const tca_plan plan(b, n_ctx);

        store_shape s;
        s.dk = s.dv = 32;
        s.n_head_kv = 3;
        s.scale = 1.0f;
        s.capacity = { { plan.capacity(0, 0), plan.capacity(0, 1), plan.capacity(0, 2) } };
        test_store store(s, 5);
        tca_select_params select = {};
        select.block_size  = b.block_size;
        select.group_size  = b.group_size;
        select.n_keep      = 2;
        select.n_configs   = b.configs.size()/b.keep_counts.size();
        select.keep_counts = b.keep_counts.data();
        select.configs     = b.configs.data();
        select.rope.type   = TCA_ROPE_NONE;
        select.rope.scale  = 1.0f;
        select.metric      = tca_metric_find("key-diff");

        // every token is a needle: a direction of its own and its number as the value
        random_t rng(3);
        std::vector<std::vector<float>> direction(n_ctx + 40, std::vector<float>(32));
        for (auto & x : direction) {
            double norm = 0.0;
            for (float & value : x) {
                value = rng.normal();
                norm += value*value;
            }
            for (float & value : x) {
                value *= 12.0/std::sqrt(norm);
            }
        }
        tca_seq_state state;
        std::vector<bool> found(n_ctx, false);
        while (state.n_tokens < n_ctx) {
            const int      n     = std::min<uint32_t>(n_ubatch, n_ctx - state.n_tokens);
            const uint32_t first = state.n_tokens;
            micro_batch mb;
            mb.fill(s, n, rng);
            std::vector<uint32_t> target(n);
            for (int t = 0; t < n; ++t) {
                const uint32_t now = first + t;
                // edges of sinks, groups and window; oneself; the next token, which must not be seen
                const std::vector<uint32_t> edges = { 0, sinks - 1, sinks, sinks + group - 1, sinks + group, sinks + 2*group - 1, sinks + 2*group,
                    now - window, now - window + 1, now, now + 1, now/64*64, now/64*64 - 1, (uint32_t) rng.below(now + 1) };
                do {
                    target[t] = rng.pick(edges);
                } while (target[t] > now + 1);
                for (int h = 0; h < 3; ++h) {
                    for (int i = 0; i < 32; ++i) {
                        mb.k[(t*3 + h)*32 + i] = direction[now][i];
                        mb.v[(t*3 + h)*32 + i] = 10.0f*(now + 1);
                        mb.q[(t*3 + h)*32 + i] = direction[target[t]][i];
                    }
                }
            }
            int done = 0;
            for (const tca_segment & part : plan.advance(state, n)) {
                test_segment seg;
                seg.token = done;
                seg.count = part.n_tokens;
                seg.pos   = first + done;
                for (int h = 0; h < 3; ++h) {
                    seg.group.push_back(part.compacts ? plan.next_group_slot(0, h, part.before) : -1);
                    seg.config.push_back(b.head_config[h]);
                }
                mb.segments.push_back({ seg });
                done += part.n_tokens;
            }
            step_options o;
            o.select = &select;
            const step_result r = store.run(mb, o);
            for (int t = 0; t < n; ++t) {
                const uint32_t now = first + t;
                for (int h = 0; h < 2; ++h) {
                    const float out = r.out[(t*3 + h)*32];
                    if (target[t] <= now) {
                        CHECK(std::fabs(out - 10.0f*(target[t] + 1)) < 2.0f, "n_ubatch %d: token %u, head %d: needle %u is lost: %f", n_ubatch, now, h, target[t], out);
                        found[target[t]] = true;
                    } else {
                        CHECK(std::fabs(out - 10.0f*(target[t] + 1)) > 2.0f, "n_ubatch %d: token %u sees token %u", n_ubatch, now, target[t]);
                    }
                }
            }
        }
        const int n_found = std::count(found.begin(), found.end(), true);
        CHECK(n_found > 20 && state.n_groups == (n_ctx - sinks - window)/group, "%d needles, %u groups", n_found, state.n_groups);
    }
}

// A group moves over itself: what is kept, from nothing to all, at both ends of it.
TEST(compaction_alone) {
    int n = 0;
    for (const ggml_type type : TYPES) {
        for (const int keep : { 0, 1, 7, 8 }) {
            for (const int64_t behind : { 0, 1, 5, 100 }) {  // rows behind the group
                store_shape s;
                s.type_k = s.type_v = type;
                s.dk = s.dv = 32;
                s.n_head_kv = 3;
                s.guard = 2;
                const int64_t group = 24, before = 5;
                s.capacity = { { before + group + behind + 1, before + group + behind + 1, before + group + behind + 1 },
                               { before + group + behind + 1, before + group + behind + 1, before + group + behind + 1 } };
                test_store store(s, ++n);
                random_t rng(n);
                for (int stream = 0; stream < 2; ++stream) {
                    for (int h = 0; h < 3; ++h) {
                        store.fill(stream, h, before + group + behind, 0, rng);
                    }
                }
                const std::vector<int32_t> keep_counts = { keep, 9 }, configs = { 3, 0 };
                tca_select_params select = {};
                select.block_size  = 8;
                select.group_size  = group;
                select.n_keep      = 2;
                select.n_configs   = 1;
                select.keep_counts = keep_counts.data();
                select.configs     = configs.data();
                select.rope.type   = TCA_ROPE_NONE;
                select.rope.scale  = 1.0f;
                select.metric      = tca_metric_find("key-diff");
                // only stream 1, and of it only heads 0 and 2: nothing else may move
                micro_batch mb;
                mb.fill(s, 1, rng);
                test_segment seg;
                seg.stream = 1;
                seg.count  = 1;
                seg.pos    = before + group + behind;
                seg.group  = { before, before, before };
                seg.config = { 0, TCA_HEAD_DENSE, 0 };
                mb.segments = { { seg } };
                step_options o;
                o.n_threads = 1 + n % 3;
                o.select    = &select;
                store.run(mb, o);
                CHECK((int64_t) store.regions[1][0].pos.size() == before + 3*keep + behind + 1, "length");
                CHECK((int64_t) store.regions[1][1].pos.size() == before + group + behind + 1, "the dense head changed");
            }
        }
    }
}

// What a group gets from the last queries, against the reference, one region of a random shape each: equal keys, keys and queries
// of zeros, numbers that are none.
TEST(observed_attention) {
    ggml_cpu_init();  // tables that the f16 conversions need
    random_t rng(17);
    int n_broken = 0, n_ties = 0;
    for (int i = 0; i < 300; ++i) {
        const ggml_type type = rng.pick(TYPES);
        const int dim = fits(type, 80) ? rng.pick<int>({ 32, 64, 80, 128 }) : rng.pick<int>({ 32, 64, 128 });
        const int n_head_kv = rng.range(1, 3), gqa = rng.range(1, 5), head = rng.below(n_head_kv), n_head = n_head_kv*gqa;
        const int count = rng.pick<int>({ 1, 2, 31, 32, 33, 70 }), token = rng.below(4), offset = rng.below(3);
        const int n = 16*rng.range(1, 4), used = n + count + rng.below(200);
        const float scale = 0.2f, softcap = rng.below(3) == 0 ? 20.0f : 0.0f;
        const int kind = i % 6;  // 0, 1: random

        std::vector<float> k((size_t) (offset + used)*dim), q((size_t) (token + count)*n_head*dim);
        for (float & x : k) { x = kind == 2 ? 0.0f : rng.normal(); }
        for (float & x : q) { x = kind == 3 ? 0.0f : rng.normal(); }
        for (int slot = 1; kind == 4 && slot < offset + used; ++slot) {
            if (rng.below(2)) {
                std::copy_n(&k[(size_t) slot/7*7*dim], dim, &k[(size_t) slot*dim]);
            }
        }
        const bool broken = kind == 5 && !ggml_is_quantized(type);
        if (broken) {
            (rng.below(2) ? k : q)[rng.below(std::min(k.size(), q.size()))] = rng.pick<float>({ NAN, INFINITY, -INFINITY });
        }
        const ggml_context_ptr ctx { ggml_init({ 4*ggml_tensor_overhead(), nullptr, true }) };
        ggml_tensor * tq = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, dim, n_head, token + count);
        ggml_tensor * tk = ggml_new_tensor_2d(ctx.get(), type, dim, offset + used);
        std::vector<uint8_t> rows(ggml_nbytes(tk));
        ggml_get_type_traits_cpu(type)->from_float(k.data(), rows.data(), k.size());
        tq->data = q.data();
        tk->data = rows.data();
        int32_t d[TCA_DESC_SIZE] = {};
        d[TCA_DESC_OFFSET] = offset;
        d[TCA_DESC_TOKEN]  = token;
        d[TCA_DESC_COUNT]  = count;
        d[TCA_DESC_GROUP]  = rng.below(used - n + 1);
        d[TCA_DESC_USED]   = used;

        tca_observe_scratch scratch;
        std::vector<double> got(n), want(used), scores(n);
        tca_observe(tq, tk, d, head, n_head_kv, scale, softcap, n, scratch, got.data());

        std::vector<float> stored(k);
        if (type != GGML_TYPE_F32) {
            ggml_get_type_traits(type)->to_float(rows.data(), stored.data(), stored.size());
        }
        const int newest = std::min(count, (int) TCA_OBSERVED_QUERIES);
        tca_reference_observe(&q[(size_t) (token + count - newest)*n_head*dim], &stored[(size_t) offset*dim], newest, n_head, head*gqa, gqa,
                dim, used, scale, softcap, want.data());

        const std::vector<int32_t> positions(n, 0);
        const tca_group g = { n, dim, dim, 0, 0, nullptr, nullptr, positions.data(), nullptr, nullptr };
        tca_select_scratch select_scratch;
        tca_importance(*tca_metric_find("observed-attn"), g, 0, got.data(), select_scratch, scores.data());
        for (int t = 0; t < n; ++t) {
            const double expected = want[d[TCA_DESC_GROUP] + t];
            CHECK(std::isfinite(scores[t]), "case %d: token %d is %g", i, t, scores[t]);
            CHECK(std::isfinite(got[t]) == std::isfinite(expected), "case %d: token %d is %g, not %g", i, t, got[t], expected);
            const double score = std::isfinite(expected) ? expected : 0.0;
            CHECK(std::fabs(scores[t] - score) <= 1e-12*(1.0 + score), "case %d: token %d gets %.17g, not %.17g", i, t, scores[t], score);
            n_broken += !std::isfinite(expected);
            // equal keys that the same queries see tie exactly
            const uint8_t * row = rows.data() + (offset + d[TCA_DESC_GROUP] + t)*tk->nb[1];
            if (t > 0 && d[TCA_DESC_GROUP] + t <= used - newest && memcmp(row, row - tk->nb[1], tk->nb[1]) == 0) {
                CHECK(scores[t] == scores[t - 1], "case %d: equal tokens %d get %.17g and %.17g", i, t, scores[t], scores[t - 1]);
                ++n_ties;
            }
        }
    }
    CHECK(n_broken > 100 && n_ties > 1000, "the test no longer reaches what it is for: %d, %d", n_broken, n_ties);
}

// A token that the last queries look at stays, in every block and whichever head of the GQA group looks; what only earlier
// queries of the segment look at goes.
TEST(what_the_last_queries_look_at_stays) {
    int n = 0;
    for (const ggml_type type : TYPES) {
        for (const float softcap : { 0.0f, 50.0f }) {
            for (const int gqa : { 1, 3 }) {
                const int block = 8, n_blocks = 8, group = block*n_blocks, before = 5, past = before + group + 9, count = 40, dim = 32;
                store_shape s;
                s.type_k = s.type_v = type;
                s.dk = s.dv = dim;
                s.n_head_kv = 2;
                s.gqa       = gqa;
                s.scale     = 1.0f;
                s.softcap   = softcap;
                s.capacity  = { { past + count, past + count } };
                test_store store(s, ++n);
                random_t rng(n);
                micro_batch mb;
                mb.fill(s, count, rng);
                test_segment seg;
                seg.count  = count;
                seg.pos    = past;
                seg.group  = { before, before };
                seg.config = { 0, 0 };
                mb.segments = { { seg } };

                const auto needle = [&](int b, int h) { return before + b*block + (3*b + h) % block; };
                const auto decoy  = [&](int b, int h) { return before + b*block + (3*b + h + 4) % block; };
                for (int h = 0; h < 2; ++h) {
                    std::vector<std::vector<float>> keys(past, std::vector<float>(dim));
                    for (int slot = 0; slot < past; ++slot) {
                        double norm = 0.0;
                        for (float & x : keys[slot]) {
                            x = rng.normal();
                            norm += x*x;
                        }
                        for (float & x : keys[slot]) {
                            x *= 5.0/std::sqrt(norm);
                        }
                        store.append(store.regions[0][h], keys[slot].data(), keys[slot].data(), slot);
                    }
                    for (int t = 0; t < count; ++t) {
                        for (int g = 0; g < gqa; ++g) {
                            const int  b    = (t + g) % n_blocks;
                            const auto & at = keys[t < count - TCA_OBSERVED_QUERIES ? decoy(b, h) : needle(b, h)];
                            for (int e = 0; e < dim; ++e) {
                                mb.q[((size_t) (t*2 + h)*gqa + g)*dim + e] = at[e];
                            }
                        }
                    }
                }
                const int32_t keep = 1, config = n_blocks;
                tca_select_params select = {};
                select.block_size  = block;
                select.group_size  = group;
                select.n_keep      = 1;
                select.n_configs   = 1;
                select.keep_counts = &keep;
                select.configs     = &config;
                select.rope.type   = TCA_ROPE_NONE;
                select.rope.scale  = 1.0f;
                select.metric      = tca_metric_find("observed-attn");
                step_options o;
                o.select = &select;
                store.run(mb, o);
                for (int h = 0; h < 2; ++h) {
                    const std::vector<int32_t> & pos = store.regions[0][h].pos;
                    for (int b = 0; b < n_blocks; ++b) {
                        CHECK(std::binary_search(pos.begin(), pos.end(), needle(b, h)), "%s: needle %d of head %d is lost", s.name().c_str(), b, h);
                    }
                    CHECK((int) pos.size() == past + count - group + n_blocks, "length");
                }
            }
        }
    }
}

int main(int argc, char ** argv) {
    return run_tests(argc, argv);
}
