// Nodes as data: no address in them, one writer and one reader, what each backend takes, and devices that are refused before a
// cache is made. Nothing here needs a GPU or a network.
#include "check.h"

#include "cuda/tca-cuda-supports.h"
#include "llama/tca-device.h"
#include "metrics/tca-metric.h"
#include "ops/tca-ops.h"
#include "plan/tca-plan.h"
#include "rpc/tca-rpc.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"

#include <functional>

namespace {

// Every node of a layer, over tensors without memory.
struct layer_nodes {
    ggml_context_ptr ctx;
    ggml_tensor * k, * v, * pos, * desc, * q, * k_cur, * v_cur, * dst, * sinks;
    tca_tables    tables;
    ggml_tensor * append, * attn, * attn_into, * partial, * combine, * combine_into, * compact;

    layer_nodes(const tca_layer_shape & s, const char * metric, int rope_type = TCA_ROPE_NEOX) : ctx(ggml_init({ 64*ggml_tensor_overhead(), nullptr, true })) {
        static const int32_t keep[] = { 1, 4, 16 }, configs[] = { 1, 2, 1,   4, 0, 0 };
        static const std::vector<float> freqs(128, 0.5f);
        tca_select_params p = { 16, 64, 3, 2, keep, configs, { rope_type, (int32_t) s.head_dim_k, 1.25f, freqs.data() }, 64, 7,
            tca_metric_find(metric), nullptr };
        ggml_context * c = ctx.get();
        k     = ggml_new_tensor_2d(c, s.type_k, s.head_dim_k, 256);
        v     = ggml_new_tensor_2d(c, s.type_v, s.head_dim_v, 256);
        pos   = ggml_new_tensor_1d(c, GGML_TYPE_I32, 256);
        desc  = ggml_new_tensor_4d(c, GGML_TYPE_I32, TCA_DESC_SIZE, s.n_head_kv, 2, 3);
        q     = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_k, s.n_head,    6);
        k_cur = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_k, s.n_head_kv, 6);
        v_cur = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_v, s.n_head_kv, 6);
        dst   = ggml_new_tensor_3d(c, GGML_TYPE_F32, s.head_dim_v, s.n_head,    6);
        tables = tca_tables_new(c, p, s.head_dim_k, s.n_head_kv, nullptr);
        append       = tca_build_append(c, k, v, pos, k_cur, v_cur, desc, 0);
        sinks        = s.sinks ? ggml_new_tensor_1d(c, GGML_TYPE_F32, s.n_head) : nullptr;
        attn         = tca_build_attn(c, q, k, v, desc, 1, 0.25f, 30.0f, nullptr, sinks);
        attn_into    = tca_build_attn(c, q, k, v, desc, 1, 0.25f, 30.0f, dst, sinks);
        combine      = tca_build_attn_split(c, q, k, v, desc, 2, 0.25f, 30.0f, 5, nullptr, sinks);
        combine_into = tca_build_attn_split(c, q, k, v, desc, 2, 0.25f, 30.0f, 5, dst, sinks);
        partial      = tca_combine_node::of(combine).partial;
        compact      = tca_build_compact(c, k, v, pos, desc, 2, tables, q, 0.25f, 30.0f);
    }

    std::vector<ggml_tensor *> all() const { return { append, attn, attn_into, partial, combine, combine_into, compact }; }
};

const tca_layer_shape PLAIN = { GGML_TYPE_F16, GGML_TYPE_F16, 128, 128, 32, 8 };

} // namespace

TEST(nodes_hold_no_address) {
    for (int i = 0; tca_metric_at(i) != nullptr; ++i) {
        const layer_nodes a(PLAIN, tca_metric_at(i)->name);
        const std::vector<uint8_t> elsewhere(1 << 20);  // so that the second lot lies at other addresses
        const layer_nodes b(PLAIN, tca_metric_at(i)->name);
        CHECK(a.k != b.k, "the two lots are one");
        for (size_t n = 0; n < a.all().size(); ++n) {
            const ggml_tensor * x = a.all()[n], * y = b.all()[n];
            CHECK(x->op == GGML_OP_CUSTOM && tca_op_of(x) != TCA_OP_NONE, "node %zu", n);
            CHECK(memcmp(x->op_params, y->op_params, sizeof(x->op_params)) == 0, "node %zu of %s differs from one at other addresses", n, tca_metric_at(i)->name);
            const uint64_t zero = 0;
            CHECK(memcmp(x->op_params, &zero, sizeof(zero)) == 0, "node %zu has a function", n);
            const int32_t n_tasks = GGML_N_TASKS_MAX;
            CHECK(memcmp((const char *) x->op_params + sizeof(void *), &n_tasks, sizeof(n_tasks)) == 0, "node %zu: tasks", n);
        }
    }
}

TEST(other_custom_nodes_are_not_ours) {
    const ggml_context_ptr ctx { ggml_init({ 8*ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor * x = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_F32, 4);
    const auto fun = [](ggml_tensor *, int, int, void *) {};
    ggml_tensor * custom = ggml_custom_4d(ctx.get(), GGML_TYPE_F32, 4, 1, 1, 1, &x, 1, fun, 1, nullptr);
    CHECK(tca_op_of(custom) == TCA_OP_NONE && tca_op_of(x) == TCA_OP_NONE, "not ours");
    const layer_nodes a(PLAIN, "key-diff");
    ggml_tensor * node = a.append;
    for (const auto & [at, what] : { std::make_pair(0, "with a function"), std::make_pair(16, "of another version") }) {
        ggml_tensor copy = *node;
        ((uint8_t *) copy.op_params)[at] ^= 1;
        CHECK(tca_op_of(&copy) == TCA_OP_NONE, "a node %s is taken", what);
    }
}

TEST(one_reader_of_sources_and_numbers) {
    for (const char * metric : { "key-probe", "observed-attn", "key-diff+observed", "streaming", "value-norm" }) {
        for (const int rope : { (int) TCA_ROPE_NONE, (int) TCA_ROPE_NORM }) {
            const layer_nodes a(PLAIN, metric, rope);
            const unsigned needs = tca_metric_find(metric)->needs;
            const tca_append_node append = tca_append_node::of(a.append);
            CHECK(append.k == a.k && append.v == a.v && append.pos == a.pos && append.k_cur == a.k_cur && append.v_cur == a.v_cur &&
                    append.desc == a.desc && append.row == 0, "append");
            for (ggml_tensor * node : { a.attn, a.attn_into, a.partial, tca_combine_node::of(a.combine_into).partial }) {
                const tca_attn_node x = tca_attn_node::of(node);
                const bool split = tca_op_of(node) == TCA_OP_ATTN_PARTIAL;
                CHECK(x.q == a.q && x.k == a.k && x.v == a.v && x.desc == a.desc && x.gqa == 4, "attn");
                CHECK(x.row == (split ? 2 : 1) && x.scale == 0.25f && x.softcap == 30.0f && x.n_chunks == (split ? 5 : 0), "attn's numbers");
            }
            CHECK(a.attn_into->view_src == a.dst && a.combine_into->view_src == a.dst && a.attn->view_src == nullptr, "in place");
            for (ggml_tensor * node : { a.combine, a.combine_into }) {
                const tca_combine_node x = tca_combine_node::of(node);
                CHECK(tca_op_of(x.partial) == TCA_OP_ATTN_PARTIAL && x.desc == a.desc && x.row == 2, "combine");
            }
            const tca_compact_node c = tca_compact_node::of(a.compact);
            CHECK(c.k == a.k && c.v == a.v && c.pos == a.pos && c.desc == a.desc && c.row == 2, "compact");
            CHECK(c.q == (needs & TCA_NEEDS_QUERIES ? a.q : nullptr), "queries only for metrics that look at them");
            CHECK(c.tables.configs == a.tables.configs && c.tables.configs->ne[0] == 3 && c.tables.configs->ne[1] == 3, "configurations");
            CHECK((c.tables.probe != nullptr) == ((needs & TCA_NEEDS_PROBE) != 0), "probe");
            CHECK((c.tables.freqs != nullptr) == ((needs & TCA_NEEDS_KEYS) && rope != TCA_ROPE_NONE), "frequencies");
            const tca_tables::numbers & n = c.tables.n;
            CHECK(n.metric == tca_metric_find(metric)->id && n.layer == 7 && n.block_size == 16 && n.group_size == 64 && n.hadamard == 64, "numbers");
            CHECK(n.rope_type == (c.tables.freqs ? rope : (int) TCA_ROPE_NONE), "rope");
        }
    }
}

TEST(tables_hold_the_budgets) {
    const int32_t keep[] = { 1, 4, 16 }, configs[] = { 1, 2, 1,   4, 0, 0 };
    const float   freqs[] = { 1.0f, 0.5f, 0.25f, 0.125f };
    std::vector<float> probe(3*8);
    for (size_t i = 0; i < probe.size(); ++i) {
        probe[i] = i;
    }
    const tca_select_params p = { 16, 64, 3, 2, keep, configs, { TCA_ROPE_NORM, 8, 1.5f, freqs }, 0, 3, tca_metric_find("key-probe"), probe.data() };
    const ggml_context_ptr ctx { ggml_init({ 8*ggml_tensor_overhead() + (1 << 16), nullptr, false }) };
    const tca_tables first = tca_tables_new(ctx.get(), p, 8, 3, nullptr), second = tca_tables_new(ctx.get(), p, 8, 3, first.configs);
    CHECK(second.configs == first.configs && second.probe != first.probe, "layers share what is the same for all");
    for (const tca_tables & t : { first, second }) {
        tca_tables_set(t, p);
        CHECK(memcmp(t.configs->data, keep, sizeof(keep)) == 0 && memcmp((char *) t.configs->data + sizeof(keep), configs, sizeof(configs)) == 0, "configs");
        CHECK(memcmp(t.freqs->data, freqs, sizeof(freqs)) == 0 && t.n.rope_scale == 1.5f, "freqs");
        CHECK(memcmp(t.probe->data, probe.data(), probe.size()*sizeof(float)) == 0 && t.probe->ne[0] == 8 && t.probe->ne[1] == 3, "probe");
    }
}

// The descriptor against counting tokens: for every segment of a sequence, what the fields say is what happened.
TEST(the_plan_describes_its_segments) {
    random_t rng(17);
    for (int round = 0; round < 200; ++round) {
        tca_budgets_data b;
        b.version = TCA_FORMAT_VERSION;
        b.block_size = 4;
        b.group_size = 16;
        b.window = rng.below(3)*7 + 1;
        b.sinks  = rng.below(5);
        b.metric = "key-diff";
        b.keep_counts = { 1, 4 };
        b.configs     = { 0, 4,   4, 0,   2, 2 };  // the first keeps everything
        b.n_layer     = 2;
        b.n_head_kv   = 3;
        for (int i = 0; i < 6; ++i) {
            b.head_config.push_back(rng.range(-1, 2));
        }
        const tca_plan plan(b, 150);
        const int32_t kept[] = { 16, 4, 10 };
        const uint32_t stream = rng.below(3);
        const int32_t  pos0   = rng.below(2)*500;

        struct count { int64_t slots = 0; } counts[2][3];
        tca_seq_state state;
        uint32_t groups = 0;
        while (state.n_tokens < 150) {
            const uint32_t n = std::min<uint32_t>(1 + rng.below(40), 150 - state.n_tokens);
            int32_t token = rng.below(5);
            for (const tca_segment & seg : plan.advance(state, n)) {
                for (uint32_t il = 0; il < 2; ++il) {
                    int32_t rows[3*TCA_DESC_SIZE + 1];
                    rows[3*TCA_DESC_SIZE] = -77;
                    plan.describe(il, stream*plan.slots(il), seg, token, pos0 + seg.before.n_tokens, rows);
                    CHECK(rows[3*TCA_DESC_SIZE] == -77, "wrote behind the row");
                    for (uint32_t h = 0; h < 3; ++h) {
                        const int32_t * d = rows + h*TCA_DESC_SIZE;
                        const int32_t config = b.head_config[il*3 + h], keeps = config < 0 ? 16 : kept[config];
                        CHECK(d[TCA_DESC_OFFSET] == stream*plan.slots(il) + plan.offset(il, h), "offset");
                        CHECK(d[TCA_DESC_PAST] == counts[il][h].slots, "past %d, counted %lld", d[TCA_DESC_PAST], (long long) counts[il][h].slots);
                        CHECK(d[TCA_DESC_TOKEN] == token && d[TCA_DESC_COUNT] == (int32_t) seg.n_tokens, "token, count");
                        CHECK(d[TCA_DESC_USED] == d[TCA_DESC_PAST] + d[TCA_DESC_COUNT], "used");
                        CHECK(d[TCA_DESC_POS] == (int32_t) (pos0 + seg.before.n_tokens), "pos");
                        CHECK(d[TCA_DESC_GROUP] == (seg.compacts ? (int32_t) (b.sinks + groups*keeps) : -1), "group");
                        CHECK(d[TCA_DESC_CONFIG] == (keeps == 16 ? (int32_t) TCA_HEAD_DENSE : config), "a row that keeps everything is dense");
                        CHECK(d[TCA_DESC_CONFIG] == plan.config(il, h), "config");
                        CHECK(d[TCA_DESC_STASH] == (seg.compacts ? (int32_t) (plan.capacity(il, h) - (16 - keeps)) : -1), "stash");
                        counts[il][h].slots += (int64_t) seg.n_tokens - (seg.compacts ? 16 - keeps : 0);
                    }
                }
                groups += seg.compacts;
                token  += seg.n_tokens;
            }
        }
    }
    // a sequence without a segment in this step
    int32_t d[TCA_DESC_SIZE];
    tca_desc().write(d);
    CHECK(d[TCA_DESC_COUNT] == 0 && d[TCA_DESC_USED] == 0 && d[TCA_DESC_GROUP] == -1 && d[TCA_DESC_CONFIG] == TCA_HEAD_DENSE && d[TCA_DESC_STASH] == -1, "nothing to do");
}

TEST(one_split_rule) {
    CHECK(tca_attn_splits(1, 64, 1) && !tca_attn_splits(1, 65, 1), "64 rows of one token");
    CHECK(tca_attn_splits(16, 32, 8) && !tca_attn_splits(17, 32, 8), "64 rows of 16 tokens");
    CHECK(tca_attn_splits(64, 8, 8) && !tca_attn_splits(65, 8, 8), "64 tokens");
}

// ---- which backend takes what ------------------------------------------------------------------------------------------

static bool takes_all(const std::function<bool(const ggml_tensor *)> & supports, const tca_layer_shape & s, const char * metric = "key-probe") {
    const layer_nodes nodes(s, metric);
    bool all = true;
    for (const ggml_tensor * node : nodes.all()) {
        all = all && supports(node);
    }
    return all;
}

TEST(cuda_takes_what_its_kernels_were_written_for) {
    const auto on = [](int cc) { return [cc](const ggml_tensor * node) { return tca_cuda_supports(cc, node); }; };
    CHECK(takes_all(on(800), PLAIN) && takes_all(on(900), PLAIN) && takes_all(on(1200), PLAIN), "the plain case");
    for (const int cc : { 0, 500, 610, 700, 750, 799 }) {  // cp.async and mma.m16n8k16 begin with 8.0
        const layer_nodes nodes(PLAIN, "key-probe");
        for (const ggml_tensor * node : nodes.all()) {
            CHECK(!tca_cuda_supports(cc, node), "compute capability %d takes %s", cc, node->name);
        }
    }
    for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
        const ggml_type type = (ggml_type) i;
        if (ggml_blck_size(type) == 0 || 128 % ggml_blck_size(type) != 0) {
            continue;
        }
        const bool known = type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || type == GGML_TYPE_Q8_0 || type == GGML_TYPE_Q4_0;
        for (const bool is_k : { true, false }) {
            tca_layer_shape s = PLAIN;
            (is_k ? s.type_k : s.type_v) = type;
            const layer_nodes nodes(s, "key-probe");
            for (const ggml_tensor * node : { nodes.append, nodes.attn, nodes.partial, nodes.compact }) {
                CHECK(tca_cuda_supports(900, node) == known, "%s as %s", ggml_type_name(type), is_k ? "K" : "V");
            }
        }
    }
    for (const auto & [heads, heads_kv, runs] : { std::make_tuple(16, 1, true), std::make_tuple(17, 1, false), std::make_tuple(71, 1, false),
            std::make_tuple(128, 8, true), std::make_tuple(136, 8, false) }) {
        tca_layer_shape s = PLAIN;
        s.n_head    = heads;
        s.n_head_kv = heads_kv;
        CHECK(takes_all(on(900), s) == runs, "%d heads over %d", heads, heads_kv);
        CHECK(takes_all(on(900), s, "observed-attn") == runs, "%d heads over %d, observed", heads, heads_kv);
    }
    for (const int dim : { 32, 64, 72, 80, 96, 112, 128, 192, 256 }) {
        tca_layer_shape s = PLAIN;
        s.head_dim_k = s.head_dim_v = dim;
        CHECK(takes_all(on(900), s) == (dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256), "head size %d", dim);
    }
    for (int i = 0; tca_metric_at(i) != nullptr; ++i) {
        CHECK(takes_all(on(900), PLAIN, tca_metric_at(i)->name), "%s", tca_metric_at(i)->name);
    }
}

TEST(attention_sinks_are_a_source_that_cuda_refuses) {
    tca_layer_shape s = PLAIN;
    s.sinks = true;
    const layer_nodes with(s, "key-probe"), without(PLAIN, "key-probe");
    for (const ggml_tensor * node : { with.attn, with.attn_into }) {
        CHECK(tca_attn_node::of(node).sinks == with.sinks && !tca_cuda_supports(900, node), "%s", node->name);
    }
    for (const ggml_tensor * node : { with.combine, with.combine_into }) {
        CHECK(tca_combine_node::of(node).sinks == with.sinks && !tca_cuda_supports(900, node), "%s", node->name);
    }
    CHECK(tca_attn_node::of(with.partial).sinks == nullptr && tca_cuda_supports(900, with.partial), "a part of the softmax has no sink yet");
    CHECK(tca_attn_node::of(without.attn).sinks == nullptr && tca_combine_node::of(without.combine_into).sinks == nullptr, "none");
}

TEST(cpu_takes_every_type_that_it_reads_and_writes) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto supports = [cpu](const ggml_tensor * node) { return ggml_backend_dev_supports_op(cpu, node); };
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
        tca_layer_shape s = PLAIN;
        s.type_k = s.type_v = type;
        CHECK(takes_all(supports, s) && tca_types_problem(s).empty(), "%s", ggml_type_name(type));
    }
    for (const ggml_type type : { GGML_TYPE_IQ2_XXS, GGML_TYPE_IQ1_S, GGML_TYPE_IQ2_S }) {  // cannot be written on the fly
        tca_layer_shape s = PLAIN;
        s.head_dim_k = s.head_dim_v = 256;
        s.type_v = type;
        CHECK(!takes_all(supports, s), "%s", ggml_type_name(type));
        const std::string problem = tca_types_problem(s);
        CHECK(problem == std::string("V cache type ") + ggml_type_name(type) + " is not supported; use f16, q8_0 or q4_0", "%s", problem.c_str());
    }
    tca_layer_shape s = PLAIN;
    s.type_k = GGML_TYPE_Q8_0;
    s.head_dim_k = 80;
    CHECK(tca_types_problem(s) == "K cache type q8_0 needs a head size divisible by 32, this model has 80; use f16", "%s", tca_types_problem(s).c_str());

    layer_nodes nodes(PLAIN, "key-diff");
    tca_op_params params = tca_op_get_params(nodes.compact);
    params.select.metric = 1000;
    memcpy(nodes.compact->op_params, &params, sizeof(params));
    CHECK(!supports(nodes.compact), "a metric that nobody knows");
    params = tca_op_get_params(nodes.append);
    params.op = (tca_op) 99;
    memcpy(nodes.append->op_params, &params, sizeof(params));
    CHECK(!supports(nodes.append), "an operation that nobody knows");
}

// ---- devices, before a cache is made -----------------------------------------------------------------------------------

namespace {

// A device that only answers questions.
struct fake_device {
    ggml_backend_reg    reg = {};
    ggml_backend_device dev = {};
    std::string reg_name;
    std::function<bool(const ggml_tensor *)> supports;
    int n_asked = 0;

    fake_device(const char * name, std::function<bool(const ggml_tensor *)> f) : reg_name(name), supports(std::move(f)) {
        reg.context = this;
        reg.iface.get_name = [](ggml_backend_reg_t r) { return ((fake_device *) r->context)->reg_name.c_str(); };
        dev.context = this;
        dev.reg     = &reg;
        dev.iface.get_name        = [](ggml_backend_dev_t) { return "FAKE0"; };
        dev.iface.get_description = [](ggml_backend_dev_t) { return "a device of the tests"; };
        dev.iface.supports_op     = [](ggml_backend_dev_t d, const ggml_tensor * op) {
            fake_device & self = *(fake_device *) d->context;
            ++self.n_asked;
            return self.supports(op);
        };
    }
};

} // namespace

static std::string problem_of(fake_device & device, const tca_layer_shape & s) {
    static const int32_t keep[] = { 1, 4 }, configs[] = { 2, 2 };
    const tca_select_params p = { 16, 64, 2, 1, keep, configs, { TCA_ROPE_NEOX, 128, 1.0f, nullptr }, 0, 0, tca_metric_find("key-diff"), nullptr };
    return tca_device_problem(&device.dev, s, p);
}

TEST(devices_are_asked_with_the_layers_real_shapes) {
    fake_device hopper("CUDA", [](const ggml_tensor * op) { return tca_cuda_supports(900, op); });
    CHECK(problem_of(hopper, PLAIN).empty() && hopper.n_asked == 5, "%d nodes: %s", hopper.n_asked, problem_of(hopper, PLAIN).c_str());
    tca_layer_shape falcon = { GGML_TYPE_F16, GGML_TYPE_F16, 64, 64, 71, 1 };
    const std::string problem = problem_of(hopper, falcon);
    CHECK(problem.find("device FAKE0 (a device of the tests) cannot run") == 0 && problem.find("71 heads over 1 KV heads of 64") != std::string::npos &&
            problem.find("--no-kv-offload") != std::string::npos, "%s", problem.c_str());
    falcon.n_head = 16;
    CHECK(problem_of(hopper, falcon).empty(), "16 to one");

    fake_device turing("CUDA", [](const ggml_tensor * op) { return tca_cuda_supports(750, op); });
    CHECK(!problem_of(turing, PLAIN).empty(), "compute capability 7.5");

    // each node counts
    for (int refused = 0; refused < 5; ++refused) {
        int n = 0;
        fake_device picky("X", [&](const ggml_tensor *) { return n++ != refused; });
        CHECK(!problem_of(picky, PLAIN).empty(), "node %d is refused", refused);
    }
}

// Such a device says yes to everything, and ships op_params as they are.
TEST(another_machine_is_refused_without_being_sent_a_node) {
    fake_device rpc("RPC", [](const ggml_tensor *) { return true; });
    const std::string problem = problem_of(rpc, PLAIN);
    CHECK(problem.find("an RPC backend that is not of this build") != std::string::npos && rpc.n_asked == 0, "%s", problem.c_str());

    // with a backend of ours, the server's greeting decides
    static tca_rpc_status status;
    status = TCA_RPC_SAME_BUILD;
    rpc.reg.iface.get_proc_address = [](ggml_backend_reg_t, const char * name) {
        const tca_rpc_status_fn fn = [](const char * endpoint) { return strcmp(endpoint, "a device of the tests") == 0 ? status : TCA_RPC_LOST; };
        return strcmp(name, "tca_rpc_status") == 0 ? (void *) fn : nullptr;
    };
    CHECK(problem_of(rpc, PLAIN).empty(), "%s", problem_of(rpc, PLAIN).c_str());
    rpc.supports = [](const ggml_tensor *) { return false; };
    for (const auto & [is, says] : { std::make_pair(TCA_RPC_FOREIGN, "is not tca-gguf's; start it there with: tca-gguf exec rpc-server"),
            std::make_pair(TCA_RPC_OTHER_BUILD, "another build of tca-gguf"), std::make_pair(TCA_RPC_LOST, "the server is gone"),
            std::make_pair(TCA_RPC_SAME_BUILD, "cannot run the TCA ops") }) {
        status = is;
        CHECK(problem_of(rpc, PLAIN).find(says) != std::string::npos, "%s", problem_of(rpc, PLAIN).c_str());
    }
}

int main(int argc, char ** argv) {
    return run_tests(argc, argv);
}
