// Metadata from a file is hostile until it was checked: every wrong key gets one clear error, and no byte pattern does harm.
#include "check.h"

#include "budgets/tca-budgets.h"

#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <functional>
#include <memory>
#include <tuple>

using gguf_ptr = std::unique_ptr<gguf_context, void (*)(gguf_context *)>;

// 2 layers of 3 KV heads, blocks of 8 in groups of 32.
static gguf_ptr make_gguf() {
    gguf_ptr g { gguf_init_empty(), gguf_free };
    gguf_set_val_str(g.get(), "general.architecture", "llama");
    gguf_set_val_u32(g.get(), "llama.block_count", 2);
    gguf_set_val_u32(g.get(), "llama.attention.head_count", 6);
    gguf_set_val_u32(g.get(), "llama.attention.head_count_kv", 3);
    gguf_set_val_u32(g.get(), "tca.version", 1);
    gguf_set_val_bool(g.get(), "tca.enabled", true);
    gguf_set_val_u32(g.get(), "tca.block_size", 8);
    gguf_set_val_u32(g.get(), "tca.group_size", 32);
    gguf_set_val_u32(g.get(), "tca.window", 16);
    gguf_set_val_u32(g.get(), "tca.sinks", 4);
    gguf_set_val_str(g.get(), "tca.metric", "key-diff");
    const int32_t keep_counts[] = { 1, 4, 8 }, configs[] = { 4, 0, 0, 1, 2, 1 }, head_config[] = { 0, 1, -1, 1, 1, 0 };
    gguf_set_arr_data(g.get(), "tca.keep_counts", GGUF_TYPE_INT32, keep_counts, 3);
    gguf_set_arr_data(g.get(), "tca.configs",     GGUF_TYPE_INT32, configs, 6);
    gguf_set_arr_data(g.get(), "tca.head_config", GGUF_TYPE_INT32, head_config, 6);
    gguf_set_val_f32(g.get(), "tca.kept_fraction", 0.5f);
    gguf_set_val_u32(g.get(), "tca.calibration.tokens", 6000);
    return g;
}

static void set_i32(gguf_context * g, const char * key, const std::vector<int32_t> & values) {
    gguf_set_arr_data(g, key, GGUF_TYPE_INT32, values.data(), values.size());
}

struct hostile {
    const char * name;
    tca_status   status;
    const char * words;  // in the error
    std::function<void(gguf_context *)> change;
};

static std::vector<hostile> hostile_cases() {
    std::vector<hostile> cases;
    const auto add = [&](const char * name, const char * words, std::function<void(gguf_context *)> change, tca_status status = TCA_ERR_BUDGETS) {
        cases.push_back({ name, status, words, std::move(change) });
    };
    const auto u32 = [&](const char * name, const char * key, uint32_t value) {
        add(name, key, [key, value](gguf_context * g) { gguf_set_val_u32(g, key, value); });
    };
    const auto i32 = [&](const char * name, const char * key, std::vector<int32_t> values) {
        add(name, key, [key, values](gguf_context * g) { set_i32(g, key, values); });
    };

    for (const char * key : { "tca.version", "tca.block_size", "tca.group_size", "tca.window", "tca.sinks", "tca.metric",
            "tca.keep_counts", "tca.configs", "tca.head_config" }) {
        add("missing", key, [key](gguf_context * g) { gguf_remove_key(g, key); });
        add("wrong type: f32", key, [key](gguf_context * g) { gguf_set_val_f32(g, key, 1.0f); });
        add("wrong type: u64", key, [key](gguf_context * g) { gguf_set_val_u64(g, key, 16); });
        add("wrong type: array of u32", key, [key](gguf_context * g) {
            const uint32_t values[6] = { 1, 1, 1, 1, 1, 1 };
            gguf_set_arr_data(g, key, GGUF_TYPE_UINT32, values, 6);
        });
        add("wrong type: array of strings", key, [key](gguf_context * g) {
            const char * values[] = { "a", "b" };
            gguf_set_arr_str(g, key, values, 2);
        });
    }
    add("wrong type", "tca.enabled", [](gguf_context * g) { gguf_set_val_u32(g, "tca.enabled", 1); });
    add("wrong type", "tca.enabled", [](gguf_context * g) { gguf_set_val_str(g, "tca.enabled", "false"); });

    u32("zero", "tca.version", 0);
    u32("unknown", "tca.version", 2);
    u32("huge", "tca.version", UINT32_MAX);
    add("a later version is named before its other keys", "tca.version is 7", [](gguf_context * g) {
        gguf_set_val_u32(g, "tca.version", 7);
        gguf_set_val_str(g, "tca.configs", "another layout");
        gguf_remove_key(g, "tca.window");
    });

    u32("zero", "tca.block_size", 0);
    u32("no power of two", "tca.block_size", 12);
    u32("too large", "tca.block_size", 512);
    u32("huge", "tca.block_size", 1u << 31);
    u32("huge", "tca.block_size", UINT32_MAX);
    u32("zero", "tca.group_size", 0);
    u32("smaller than a block", "tca.group_size", 4);
    u32("no multiple of a block", "tca.group_size", 36);
    u32("too large", "tca.group_size", 8200);
    u32("huge", "tca.group_size", 0xfffffff8u);
    u32("zero", "tca.window", 0);
    u32("too large", "tca.window", (1 << 20) + 1);
    u32("huge", "tca.window", UINT32_MAX);
    u32("too large", "tca.sinks", (1 << 20) + 1);
    u32("negative as unsigned", "tca.sinks", (uint32_t) -4);

    for (const char * metric : { "", "keydiff", "key-diff ", "Key-diff", "\x1b[2J\n\r\x7f\xff", "%s%s%n" }) {
        add("unknown", "tca.metric", [metric](gguf_context * g) { gguf_set_val_str(g, "tca.metric", metric); });
    }
    const auto f32 = [&](const char * name, std::vector<float> values) {
        add(name, "tca.probe", [values](gguf_context * g) { gguf_set_arr_data(g, "tca.probe", GGUF_TYPE_FLOAT32, values.data(), values.size()); });
    };
    add("needed", "tca.probe", [](gguf_context * g) { gguf_set_val_str(g, "tca.metric", "key-probe"); });
    add("scalar", "tca.probe", [](gguf_context * g) { gguf_set_val_f32(g, "tca.probe", 1.0f); });
    i32("integers", "tca.probe", std::vector<int32_t>(48, 1));
    f32("not a multiple of the heads", std::vector<float>(47, 1.0f));
    f32("NaN", std::vector<float>(48, NAN));
    f32("infinite", std::vector<float>(48, INFINITY));
    f32("larger than any head", std::vector<float>(6*(TCA_MAX_PROBE + 1), 0.0f));
    add("long", "tca.metric", [](gguf_context * g) { gguf_set_val_str(g, "tca.metric", std::string(100000, 'x').c_str()); });

    i32("empty", "tca.keep_counts", {});
    i32("negative", "tca.keep_counts", { -1, 4, 8 });
    i32("larger than a block", "tca.keep_counts", { 1, 4, 9 });
    i32("not increasing", "tca.keep_counts", { 1, 4, 4 });
    i32("decreasing", "tca.keep_counts", { 8, 4, 1 });
    i32("huge", "tca.keep_counts", { 1, 4, INT32_MAX });
    i32("lowest", "tca.keep_counts", { INT32_MIN, 4, 8 });
    i32("more than can differ", "tca.keep_counts", std::vector<int32_t>(300, 1));
    i32("two of three", "tca.configs", { 4, 0, 0, 1 });

    i32("empty", "tca.head_config", {});  // configs that are empty are another case, below
    i32("negative entry", "tca.configs", { 5, -1, 0, 1, 2, 1 });
    i32("sums to less", "tca.configs", { 3, 0, 0, 1, 2, 1 });
    i32("sums to more", "tca.configs", { 4, 0, 1, 1, 2, 1 });
    i32("second row", "tca.configs row 1", {});
    cases.back().change = [](gguf_context * g) { set_i32(g, "tca.configs", { 4, 0, 0, 4, 4, 4 }); };
    i32("sum that wraps to the right one in 32 bits", "tca.configs", { INT32_MAX, INT32_MAX, 6, 1, 2, 1 });
    i32("huge entry", "tca.configs", { INT32_MAX, 0, 0, 1, 2, 1 });
    i32("lowest entry", "tca.configs", { INT32_MIN, 0, 0, 1, 2, 1 });
    add("too many rows", "tca.configs", [](gguf_context * g) {
        std::vector<int32_t> rows;
        for (int i = 0; i < TCA_MAX_CONFIGS + 1; ++i) {
            rows.insert(rows.end(), { 4, 0, 0 });
        }
        set_i32(g, "tca.configs", rows);
    });
    add("more entries than any file needs", "tca.configs", [](gguf_context * g) {
        set_i32(g, "tca.configs", std::vector<int32_t>((size_t) TCA_MAX_CONFIGS*(TCA_MAX_BLOCK + 1) + 1, 0));
    });
    add("no rows, but heads that need one", "tca.head_config", [](gguf_context * g) { set_i32(g, "tca.configs", {}); });

    i32("too short", "tca.head_config", { 0, 1, -1, 1, 1 });
    i32("too long", "tca.head_config", { 0, 1, -1, 1, 1, 0, 0 });
    i32("row that does not exist", "tca.head_config", { 0, 1, 2, 1, 1, 0 });
    i32("below -2", "tca.head_config", { 0, 1, -3, 1, 1, 0 });
    i32("a part of a layer slides", "tca.head_config", { 0, 1, -2, 1, 1, 0 });
    i32("lowest", "tca.head_config", { 0, 1, INT32_MIN, 1, 1, 0 });
    i32("highest", "tca.head_config", { 0, 1, INT32_MAX, 1, 1, 0 });

    // the model's own keys
    add("no architecture", "general.architecture", [](gguf_context * g) { gguf_remove_key(g, "general.architecture"); }, TCA_ERR_IO);
    add("architecture of another type", "general.architecture", [](gguf_context * g) { gguf_set_val_u32(g, "general.architecture", 3); }, TCA_ERR_IO);
    add("another architecture's keys", "number of layers", [](gguf_context * g) { gguf_set_val_str(g, "general.architecture", "qwen2"); }, TCA_ERR_UNSUPPORTED);
    add("no layers", "number of layers", [](gguf_context * g) { gguf_remove_key(g, "llama.block_count"); }, TCA_ERR_UNSUPPORTED);
    add("zero layers", "number of layers", [](gguf_context * g) { gguf_set_val_u32(g, "llama.block_count", 0); }, TCA_ERR_UNSUPPORTED);
    add("negative layers", "number of layers", [](gguf_context * g) { gguf_set_val_i32(g, "llama.block_count", -2); }, TCA_ERR_UNSUPPORTED);
    add("huge layers", "number of layers", [](gguf_context * g) { gguf_set_val_u32(g, "llama.block_count", UINT32_MAX); }, TCA_ERR_UNSUPPORTED);
    add("layers of another type", "number of layers", [](gguf_context * g) { gguf_set_val_f32(g, "llama.block_count", 2.0f); }, TCA_ERR_UNSUPPORTED);
    add("heads per layer", "KV heads", [](gguf_context * g) { set_i32(g, "llama.attention.head_count_kv", { 3, 6 }); }, TCA_ERR_UNSUPPORTED);
    add("heads per layer, none given", "KV heads", [](gguf_context * g) { set_i32(g, "llama.attention.head_count_kv", {}); }, TCA_ERR_UNSUPPORTED);
    add("heads per layer as text", "KV heads", [](gguf_context * g) {
        const char * values[] = { "3", "3" };
        gguf_set_arr_str(g, "llama.attention.head_count_kv", values, 2);
    }, TCA_ERR_UNSUPPORTED);
    add("no heads", "KV heads", [](gguf_context * g) {
        gguf_remove_key(g, "llama.attention.head_count_kv");
        gguf_remove_key(g, "llama.attention.head_count");
    }, TCA_ERR_UNSUPPORTED);
    add("product beyond 32 bits", "tca.head_config", [](gguf_context * g) {
        gguf_set_val_u32(g, "llama.block_count", 65536);
        gguf_set_val_u32(g, "llama.attention.head_count_kv", 65536);
    });
    add("another number of layers", "tca.head_config", [](gguf_context * g) { gguf_set_val_u32(g, "llama.block_count", 3); });
    return cases;
}

TEST(valid_budgets) {
    const gguf_ptr g = make_gguf();
    std::string problem;
    CHECK(tca_gguf_check(g.get(), problem) == TCA_OK && problem.empty(), "%s", problem.c_str());

    tca_budgets_data b;
    bool enabled = false;
    CHECK(tca_budgets_from_gguf(g.get(), 2, 3, b, enabled, problem) == TCA_OK && enabled, "%s", problem.c_str());
    CHECK(b.block_size == 8 && b.group_size == 32 && b.window == 16 && b.sinks == 4 && b.metric == "key-diff" && b.n_layer == 2 &&
            b.n_head_kv == 3 && b.head_config.size() == 6 && b.configs.size() == 6 && b.keep_counts.size() == 3, "fields");
    const tca_budgets view = b.view();
    CHECK(tca_config_kept(view, 0) == 4 && tca_config_kept(view, 1) == 17 && tca_config_kept(view, -1) == 32, "kept per group");
}

TEST(valid_at_the_limits) {
    const std::vector<std::function<void(gguf_context *)>> changes = {
        [](gguf_context * g) {
            const std::vector<float> probe(6*TCA_MAX_PROBE, -1.0f);
            gguf_set_val_str(g, "tca.metric", "key-probe");
            gguf_set_arr_data(g, "tca.probe", GGUF_TYPE_FLOAT32, probe.data(), probe.size());
        },
        [](gguf_context * g) { gguf_remove_key(g, "tca.enabled"); },
        [](gguf_context * g) { gguf_remove_key(g, "tca.kept_fraction"); gguf_remove_key(g, "tca.calibration.tokens"); },
        [](gguf_context * g) { gguf_set_val_u32(g, "tca.sinks", 0); gguf_set_val_u32(g, "tca.window", 1); },
        [](gguf_context * g) { gguf_set_val_u32(g, "tca.sinks", TCA_MAX_WINDOW); gguf_set_val_u32(g, "tca.window", TCA_MAX_WINDOW); },
        [](gguf_context * g) { gguf_set_val_u32(g, "tca.group_size", TCA_MAX_GROUP); set_i32(g, "tca.configs", { 1024, 0, 0, 0, 0, 1024 }); },
        [](gguf_context * g) { gguf_set_val_u32(g, "tca.block_size", 32); set_i32(g, "tca.configs", { 1, 0, 0, 0, 0, 1 }); },
        [](gguf_context * g) { set_i32(g, "tca.keep_counts", { 0, 7, 8 }); },
        [](gguf_context * g) { set_i32(g, "tca.configs", {}); set_i32(g, "tca.head_config", std::vector<int32_t>(6, -1)); },
        [](gguf_context * g) { gguf_set_val_u8(g, "llama.block_count", 2); gguf_set_val_u16(g, "llama.attention.head_count_kv", 3); },
        [](gguf_context * g) { gguf_remove_key(g, "llama.attention.head_count_kv"); gguf_set_val_u32(g, "llama.attention.head_count", 3); },
        [](gguf_context * g) { set_i32(g, "llama.attention.head_count_kv", { 3, 3 }); },
        [](gguf_context * g) { gguf_set_val_str(g, "tca.something.new", "ignored"); },
    };
    for (size_t i = 0; i < changes.size(); ++i) {
        const gguf_ptr g = make_gguf();
        changes[i](g.get());
        std::string problem;
        CHECK(tca_gguf_check(g.get(), problem) == TCA_OK, "case %zu: %s", i, problem.c_str());
    }
}

TEST(no_budgets) {
    std::string problem;
    gguf_ptr g { gguf_init_empty(), gguf_free };
    CHECK(tca_gguf_check(g.get(), problem) == TCA_NO_BUDGETS, "an empty file");
    gguf_set_val_str(g.get(), "tcax", "not ours");
    gguf_set_val_u32(g.get(), "general.tca.version", 1);
    CHECK(tca_gguf_check(g.get(), problem) == TCA_NO_BUDGETS, "keys that only look like ours");
    set_i32(g.get(), "llama.attention.head_count_kv", { 1, 2 });
    CHECK(tca_gguf_check(g.get(), problem) == TCA_NO_BUDGETS, "a model that could not carry budgets carries none");

    // switched off: the runtime leaves the other keys alone, whatever they are
    g = make_gguf();
    gguf_set_val_bool(g.get(), "tca.enabled", false);
    CHECK(tca_gguf_check(g.get(), problem) == TCA_NO_BUDGETS, "switched off");
    gguf_remove_key(g.get(), "tca.configs");
    CHECK(tca_gguf_check(g.get(), problem) == TCA_NO_BUDGETS, "switched off and broken");
}

TEST(hostile_metadata) {
    const std::vector<hostile> cases = hostile_cases();
    CHECK(cases.size() >= 40, "%zu cases", cases.size());
    for (const hostile & c : cases) {
        const gguf_ptr g = make_gguf();
        c.change(g.get());
        std::string problem;
        const tca_status status = tca_gguf_check(g.get(), problem);
        CHECK(status == c.status, "%s (%s): status %d, '%s'", c.name, c.words, status, problem.c_str());
        CHECK(problem.find(c.words) != std::string::npos, "%s: '%s' does not name %s", c.name, problem.c_str(), c.words);
        CHECK(problem.size() < 300 && std::all_of(problem.begin(), problem.end(), [](char x) { return x >= 0x20 && x < 0x7f; }),
                "%s (%s): not one printable line", c.name, c.words);

        // a failure leaves what the caller had
        tca_budgets_data b;
        b.window = 77;
        bool enabled;
        if (c.status == TCA_ERR_BUDGETS) {
            const bool fits = strstr(c.name, "layers") == nullptr && strstr(c.name, "product") == nullptr;
            const tca_status again = tca_budgets_from_gguf(g.get(), 2, 3, b, enabled, problem);
            CHECK(!fits || (again == TCA_ERR_BUDGETS && b.window == 77 && b.configs.empty()), "%s: output was touched", c.name);
        }
    }
    printf("       %zu hostile cases\n", cases.size());
}

TEST(hostile_budgets_through_the_c_api) {
    const int32_t keep_counts[] = { 1, 8 }, configs[] = { 4, 0 }, head_config[] = { 0 };
    const float probe[] = { 0.5f, -1.0f }, broken[] = { 1.0f, NAN };
    const tca_budgets good = { 1, 8, 32, 16, 4, 5, "key-diff", 2, keep_counts, 1, configs, 1, 1, head_config, 0, nullptr };
    CHECK(tca_budgets_check(&good) == TCA_OK, "%s", tca_last_error());
    for (int i = 0; tca_metric_name(i) != nullptr; ++i) {
        tca_budgets b = good;
        b.metric = tca_metric_name(i);
        if (strcmp(b.metric, "key-probe") == 0) {
            CHECK(tca_budgets_check(&b) == TCA_ERR_BUDGETS && strstr(tca_last_error(), "tca.probe is missing"), "%s", tca_last_error());
            b.n_probe = 2;
            b.probe   = probe;
        }
        CHECK(tca_budgets_check(&b) == TCA_OK, "%s: %s", b.metric, tca_last_error());
    }
    const std::vector<std::pair<const char *, std::function<void(tca_budgets &)>>> changes = {
        { "tca.metric",      [](tca_budgets & b) { b.metric      = nullptr;   } },
        { "tca.rollback",    [](tca_budgets & b) { b.rollback    = 33;        } },
        { "tca.rollback",    [](tca_budgets & b) { b.rollback    = UINT_MAX;  } },
        { "tca.keep_counts", [](tca_budgets & b) { b.keep_counts = nullptr;   } },
        { "tca.keep_counts", [](tca_budgets & b) { b.n_keep      = 0;         } },
        { "tca.keep_counts", [](tca_budgets & b) { b.n_keep      = UINT_MAX;  } },
        { "tca.configs",     [](tca_budgets & b) { b.configs     = nullptr;   } },
        { "tca.configs",     [](tca_budgets & b) { b.n_configs   = UINT_MAX;  } },
        { "tca.head_config", [](tca_budgets & b) { b.n_configs   = 0;         } },
        { "tca.head_config", [](tca_budgets & b) { b.head_config = nullptr;   } },
        { "tca.head_config", [](tca_budgets & b) { b.n_layer     = 0;         } },
        { "tca.head_config", [](tca_budgets & b) { b.n_head_kv   = 0;         } },
        { "tca.probe",       [](tca_budgets & b) { b.n_probe     = 2;         } },
        { "tca.probe",       [&](tca_budgets & b) { b.n_probe    = UINT_MAX; b.probe = probe; } },
        { "tca.probe[1]",    [&](tca_budgets & b) { b.n_probe    = 2; b.probe = broken; } },
    };
    for (const auto & [words, change] : changes) {
        tca_budgets b = good;
        change(b);
        CHECK(tca_budgets_check(&b) == TCA_ERR_BUDGETS && strstr(tca_last_error(), words), "%s: %s", words, tca_last_error());
        CHECK(tca_plan_groups(&b, 100) < 0 && tca_plan_length(&b, 0, 0, 100) < 0 && tca_budgets_kept_per_group(&b, 0) < 0, "%s", words);
    }
}

// Every field by name: one that is added to either struct does not compile here until the copy has it, too.
static auto fields(const tca_budgets_data & data) {
    const auto & [version, block_size, group_size, window, sinks, rollback, metric, keep_counts, configs, head_config, n_layer,
            n_head_kv, n_probe, probe] = data;
    return std::tie(version, block_size, group_size, window, sinks, rollback, metric, keep_counts, configs, head_config, n_layer,
            n_head_kv, n_probe, probe);
}

TEST(a_copy_of_a_view_is_what_was_viewed) {
    tca_budgets_data b;
    b.version = TCA_FORMAT_VERSION, b.block_size = 8, b.group_size = 32, b.window = 17, b.sinks = 5, b.rollback = 9;
    b.metric      = "key-probe";
    b.keep_counts = { 0, 3, 8 };
    b.configs     = { 1, 2, 1, 4, 0, 0 };
    b.n_layer = 2, b.n_head_kv = 3, b.n_probe = 4;
    b.head_config = { 0, 1, -1, 1, 0, 1 };
    for (int i = 0; i < 24; ++i) {
        b.probe.push_back(0.5f + i);
    }
    CHECK(tca_budgets_problem(b.view()).empty(), "%s", tca_budgets_problem(b.view()).c_str());

    tca_budgets_data copy;
    {
        const tca_budgets_data gone = b;  // the copy owns what it has
        copy = tca_budgets_data(gone.view());
    }
    CHECK(fields(copy) == fields(b), "a field is lost or mixed up");
    // and the view has every field of the struct that crosses the API
    const tca_budgets view = copy.view();
    const auto & [version, block_size, group_size, window, sinks, rollback, metric, n_keep, keep_counts, n_configs, configs, n_layer, n_head_kv,
            head_config, n_probe, probe] = view;
    CHECK(version == b.version && block_size == 8 && group_size == 32 && window == 17 && sinks == 5 && rollback == 9 && metric == copy.metric, "scalars");
    CHECK(n_keep == 3 && n_configs == 2 && n_layer == 2 && n_head_kv == 3 && n_probe == 4, "sizes");
    CHECK(keep_counts == copy.keep_counts.data() && configs == copy.configs.data() && head_config == copy.head_config.data() &&
            probe == copy.probe.data(), "arrays");

    // nothing optional there: no rows, no probe
    b.metric = "key-diff", b.configs.clear(), b.probe.clear(), b.n_probe = 0;
    b.head_config.assign(6, TCA_HEAD_DENSE);
    CHECK(tca_budgets_problem(b.view()).empty(), "%s", tca_budgets_problem(b.view()).c_str());
    CHECK(fields(tca_budgets_data(b.view())) == fields(b), "an empty array is lost");
}

// ---- mutations of a file's bytes -------------------------------------------------------------------------------

static std::vector<uint8_t> make_file() {
    const gguf_ptr g = make_gguf();
    const char * tokens[] = { "<s>", "", "a token" };
    const float  scores[] = { 0.0f, 1.0f, 2.0f };
    const bool   flags[]  = { true, false };
    gguf_set_arr_str (g.get(), "tokenizer.ggml.tokens", tokens, 3);
    gguf_set_arr_data(g.get(), "tokenizer.ggml.scores", GGUF_TYPE_FLOAT32, scores, 3);
    gguf_set_arr_data(g.get(), "x.flags", GGUF_TYPE_BOOL, flags, 2);
    gguf_set_val_u64 (g.get(), "x.u64", 5);
    gguf_set_val_f64 (g.get(), "x.f64", 5.0);
    gguf_set_val_i8  (g.get(), "x.i8", -5);
    gguf_set_val_u32 (g.get(), "general.alignment", 32);

    const ggml_context_ptr ctx { ggml_init({ 8*ggml_tensor_overhead(), nullptr, true }) };
    ggml_tensor * a = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32,  5, 2);
    ggml_tensor * b = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_Q8_0, 64, 3);
    ggml_set_name(a, "token_embd.weight");
    ggml_set_name(b, "output.weight");
    gguf_add_tensor(g.get(), a);
    gguf_add_tensor(g.get(), b);

    std::vector<uint8_t> bytes(gguf_get_meta_size(g.get()));
    gguf_get_meta_data(g.get(), bytes.data());
    return bytes;
}

// wild: several changes that may move everything behind them; else one that leaves the layout, so that it reaches our code
static void mutate(std::vector<uint8_t> & bytes, random_t & rng, bool wild) {
    static const std::vector<uint64_t> extremes = {
        0, 1, 2, 3, 8, 9, 10, 13, 14, 255, 256, 65535, 0x7fffffff, 0x80000000, 0xffffffff, 1ull << 32, 1ull << 40, 1ull << 62,
        0x7fffffffffffffff, 0x8000000000000000, 0xffffffffffffffff, 0xfffffffffffffff8,
    };
    const int n = wild ? rng.range(1, 4) : 1;
    for (int i = 0; i < n && !bytes.empty(); ++i) {
        const size_t at = rng.below(bytes.size());
        switch (wild ? rng.below(8) : rng.pick(std::vector<int>{ 0, 1, 6 })) {
            case 0: bytes[at] ^= 1u << rng.below(8); break;
            case 1: bytes[at] = rng.next(); break;
            case 2: bytes.resize(at); break;
            case 3: bytes.erase(bytes.begin() + at, bytes.begin() + std::min<size_t>(bytes.size(), at + rng.range(1, 16))); break;
            case 4: bytes.insert(bytes.begin() + at, rng.range(1, 16), (uint8_t) rng.next()); break;
            case 5: {  // a piece of the file once more, elsewhere
                const size_t from = rng.below(bytes.size());
                const std::vector<uint8_t> piece(bytes.begin() + from, bytes.begin() + std::min<size_t>(bytes.size(), from + rng.range(1, 64)));
                bytes.insert(bytes.begin() + at, piece.begin(), piece.end());
                break;
            }
            default: {  // an integer of 4 or 8 bytes
                const uint64_t value = rng.pick(extremes);
                const size_t   width = rng.below(2) ? 4 : 8;
                for (size_t k = 0; k < width && at + k < bytes.size(); ++k) {
                    bytes[at + k] = value >> 8*k;
                }
                break;
            }
        }
    }
}

static void no_log(ggml_log_level, const char *, void *) {}

// What the C API does with a file, on a buffer.
static tca_status check_buffer(const std::vector<uint8_t> & bytes, std::string & problem) {
    const gguf_ptr g { gguf_init_from_buffer(bytes.data(), bytes.size(), { true, nullptr }), gguf_free };
    problem.clear();
    return g ? tca_gguf_check(g.get(), problem) : TCA_ERR_IO;
}

TEST(random_mutations_of_a_file) {
    ggml_log_set(no_log, nullptr);
    const std::vector<uint8_t> original = make_file();
    std::string problem;
    CHECK(check_buffer(original, problem) == TCA_OK, "the unchanged file: %s", problem.c_str());

    int    seen[8] = {};  // by -status; OK and NO_BUDGETS share 0 and 7
    double slowest = 0.0;
    for (int seed = 0; seed < 10000; ++seed) {
        random_t rng(seed);
        std::vector<uint8_t> bytes = original;
        mutate(bytes, rng, seed % 4 == 0);
        bytes.shrink_to_fit();  // a read past the end is one past the allocation

        const auto start = std::chrono::steady_clock::now();
        const tca_status status = check_buffer(bytes, problem);
        slowest = std::max(slowest, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());

        const bool failed = status < 0 && status != TCA_ERR_IO;
        CHECK(status == TCA_OK || status == TCA_NO_BUDGETS || status == TCA_ERR_IO || status == TCA_ERR_BUDGETS ||
                status == TCA_ERR_UNSUPPORTED, "seed %d: status %d", seed, status);
        CHECK(!failed || (!problem.empty() && problem.size() < 400), "seed %d: status %d without one clear error: '%s'", seed, status, problem.c_str());
        CHECK(problem.find_first_of("\n\r\x1b") == std::string::npos, "seed %d: control characters in the error", seed);
        ++seen[status == TCA_NO_BUDGETS ? 7 : -status];
    }
    ggml_log_set(nullptr, nullptr);
    printf("       10000 mutations: %d valid, %d without budgets, %d refused keys, %d refused models, %d no GGUF; slowest %.3f s\n",
            seen[0], seen[7], seen[-TCA_ERR_BUDGETS], seen[-TCA_ERR_UNSUPPORTED], seen[-TCA_ERR_IO], slowest);
    CHECK(seen[0] > 100 && seen[-TCA_ERR_BUDGETS] > 500 && seen[-TCA_ERR_IO] > 500, "the mutations are too tame or too wild");
    CHECK(slowest < 5.0, "one took %.1f s", slowest);
}

// Every byte set to a few values, one at a time: no field escapes by luck.
TEST(every_byte_of_a_file) {
    ggml_log_set(no_log, nullptr);
    const std::vector<uint8_t> original = make_file();
    std::string problem;
    long n = 0;
    for (size_t at = 0; at < original.size(); ++at) {
        for (int value : { 0x00, 0x01, 0x7f, 0x80, 0xff }) {
            std::vector<uint8_t> bytes = original;
            bytes[at] = value;
            const tca_status status = check_buffer(bytes, problem);
            CHECK(status >= 0 || status == TCA_ERR_IO || !problem.empty(), "byte %zu = %d", at, value);
            ++n;
        }
        std::vector<uint8_t> cut(original.begin(), original.begin() + at);
        CHECK(check_buffer(cut, problem) == TCA_ERR_IO, "the first %zu bytes pass as a file", at);
    }
    ggml_log_set(nullptr, nullptr);
    printf("       %ld one-byte changes, %zu truncations\n", n, original.size());
}

int main(int argc, char ** argv) {
    return run_tests(argc, argv);
}
