#include "tca-budgets.h"

#include "metrics/tca-metric.h"

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstring>

tca_budgets_data::tca_budgets_data(const tca_budgets & b)
    : version(b.version), block_size(b.block_size), group_size(b.group_size), window(b.window), sinks(b.sinks), rollback(b.rollback), metric(b.metric),
      keep_counts(b.keep_counts, b.keep_counts + b.n_keep),
      configs(b.configs, b.configs + (size_t) b.n_configs*b.n_keep),
      head_config(b.head_config, b.head_config + (size_t) b.n_layer*b.n_head_kv),
      n_layer(b.n_layer), n_head_kv(b.n_head_kv), n_probe(b.n_probe),
      probe(b.probe, b.probe + (size_t) b.n_layer*b.n_head_kv*b.n_probe) {}

tca_budgets tca_budgets_data::view() const {
    tca_budgets b = {};
    b.version     = version;
    b.block_size  = block_size;
    b.group_size  = group_size;
    b.window      = window;
    b.sinks       = sinks;
    b.rollback    = rollback;
    b.metric      = metric.c_str();
    b.n_keep      = keep_counts.size();
    b.keep_counts = keep_counts.data();
    b.n_configs   = keep_counts.empty() ? 0 : configs.size() / keep_counts.size();
    b.configs     = configs.data();
    b.n_layer     = n_layer;
    b.n_head_kv   = n_head_kv;
    b.head_config = head_config.data();
    b.n_probe     = n_probe;
    b.probe       = probe.data();
    return b;
}

static std::string num(long long v) {
    return std::to_string(v);
}

std::string tca_budgets_problem(const tca_budgets & b) {
    if (b.version != TCA_FORMAT_VERSION) {
        return "tca.version is " + num(b.version) + ", this build reads version " + num(TCA_FORMAT_VERSION) +
            "; run embed-budgets again with this release";
    }
    if (b.block_size < 1 || b.block_size > TCA_MAX_BLOCK || (b.block_size & (b.block_size - 1)) != 0) {
        return "tca.block_size is " + num(b.block_size) + ", it must be a power of two from 1 to " + num(TCA_MAX_BLOCK);
    }
    if (b.group_size < b.block_size || b.group_size > TCA_MAX_GROUP || b.group_size % b.block_size != 0) {
        return "tca.group_size is " + num(b.group_size) + ", it must be a multiple of tca.block_size (" + num(b.block_size) +
            ") up to " + num(TCA_MAX_GROUP);
    }
    if (b.window < 1 || b.window > TCA_MAX_WINDOW) {
        return "tca.window is " + num(b.window) + ", it must lie between 1 and " + num(TCA_MAX_WINDOW);
    }
    if (b.sinks > TCA_MAX_WINDOW) {
        return "tca.sinks is " + num(b.sinks) + ", it must lie between 0 and " + num(TCA_MAX_WINDOW);
    }
    if (b.rollback > b.group_size) {
        return "tca.rollback is " + num(b.rollback) + ", it must lie between 0 and tca.group_size (" + num(b.group_size) + ")";
    }
    if (tca_metric_find(b.metric) == nullptr) {
        // a file's string may be long or hold control characters: show a short, printable part
        std::string shown;
        for (const char * p = b.metric ? b.metric : ""; *p && shown.size() < 32; ++p) {
            shown += *p >= 0x20 && *p < 0x7f ? *p : '?';
        }
        return "tca.metric is '" + shown + "', this build knows: " + tca_metric_names();
    }
    if (b.n_keep < 1 || b.n_keep > TCA_MAX_BLOCK + 1 || b.keep_counts == nullptr) {
        return "tca.keep_counts has " + num(b.n_keep) + " entries, it must have 1 to tca.block_size + 1";
    }
    for (uint32_t j = 0; j < b.n_keep; ++j) {
        const int32_t k = b.keep_counts[j];
        if (k < 0 || k > (int32_t) b.block_size || (j > 0 && k <= b.keep_counts[j - 1])) {
            return "tca.keep_counts[" + num(j) + "] is " + num(k) + ", entries must increase and lie between 0 and tca.block_size (" +
                num(b.block_size) + ")";
        }
    }
    if (b.n_configs > TCA_MAX_CONFIGS || (b.n_configs > 0 && b.configs == nullptr)) {
        return "tca.configs has " + num(b.n_configs) + " rows, at most " + num(TCA_MAX_CONFIGS) + " are allowed";
    }
    const int64_t n_blocks = b.group_size / b.block_size;
    for (uint32_t c = 0; c < b.n_configs; ++c) {
        int64_t sum = 0;
        for (uint32_t j = 0; j < b.n_keep; ++j) {
            const int32_t n = b.configs[(size_t) c*b.n_keep + j];
            if (n < 0 || n > n_blocks) {
                return "tca.configs row " + num(c) + " column " + num(j) + " is " + num(n) + ", it must lie between 0 and " + num(n_blocks);
            }
            sum += n;
        }
        if (sum != n_blocks) {
            return "tca.configs row " + num(c) + " sums to " + num(sum) + ", it must sum to group_size/block_size = " + num(n_blocks);
        }
    }
    if (b.n_layer < 1 || b.n_head_kv < 1 || b.head_config == nullptr) {
        return "tca.head_config is empty";
    }
    for (size_t i = 0; i < (size_t) b.n_layer*b.n_head_kv; ++i) {
        const int32_t c = b.head_config[i];
        if (c != TCA_HEAD_DENSE && c != TCA_HEAD_SLIDING && (c < 0 || c >= (int32_t) b.n_configs)) {
            return "tca.head_config[" + num(i) + "] is " + num(c) + ", it must be -1 (dense), -2 (llama.cpp keeps the layer) or a row of "
                "tca.configs (0 to " + num((long long) b.n_configs - 1) + ")";
        }
        if ((c == TCA_HEAD_SLIDING) != (b.head_config[i - i % b.n_head_kv] == TCA_HEAD_SLIDING)) {
            return "tca.head_config[" + num(i) + "] is " + num(c) + ", but -2 (llama.cpp keeps the layer) holds for every head of a layer "
                "or for none";
        }
    }
    if (b.n_probe > TCA_MAX_PROBE || (b.n_probe > 0 && b.probe == nullptr)) {
        return "tca.probe has " + num(b.n_probe) + " entries a head, at most " + num(TCA_MAX_PROBE) + " are allowed";
    }
    if ((tca_metric_find(b.metric)->needs & TCA_NEEDS_PROBE) && b.n_probe == 0) {
        return std::string("tca.probe is missing, tca.metric ") + b.metric + " needs it; run embed-budgets again";
    }
    for (size_t i = 0; i < (size_t) b.n_layer*b.n_head_kv*b.n_probe; ++i) {
        if (!std::isfinite(b.probe[i])) {
            return "tca.probe[" + num(i) + "] is not a finite number";
        }
    }
    return "";
}

int32_t tca_config_kept(const tca_budgets & b, int32_t config) {
    if (config == TCA_HEAD_DENSE) {
        return b.group_size;
    }
    if (config == TCA_HEAD_SLIDING) {
        return 0;
    }
    int32_t kept = 0;
    for (uint32_t j = 0; j < b.n_keep; ++j) {
        kept += b.keep_counts[j]*b.configs[(size_t) config*b.n_keep + j];
    }
    return kept;
}

namespace {

// Typed reads that never call a gguf getter with the wrong type (those abort).
struct reader {
    const gguf_context * gguf;
    std::string        & problem;

    int64_t find(const char * key) {
        const int64_t id = gguf_find_key(gguf, key);
        if (id < 0 && problem.empty()) {
            problem = std::string(key) + " is missing; run embed-budgets again, or strip-budgets to remove the other tca.* keys";
        }
        return id;
    }

    bool expect(const char * key, int64_t id, gguf_type want) {
        const gguf_type type = gguf_get_kv_type(gguf, id);
        if (type == want) {
            return true;
        }
        if (problem.empty()) {
            problem = std::string(key) + " has type " + gguf_type_name(type) + ", it must be " + gguf_type_name(want);
        }
        return false;
    }

    void u32(const char * key, uint32_t & out) {
        const int64_t id = find(key);
        if (id >= 0 && expect(key, id, GGUF_TYPE_UINT32)) {
            out = gguf_get_val_u32(gguf, id);
        }
    }

    void str(const char * key, std::string & out) {
        const int64_t id = find(key);
        if (id >= 0 && expect(key, id, GGUF_TYPE_STRING)) {
            out = gguf_get_val_str(gguf, id);
        }
    }

    template <typename T> void array(const char * key, gguf_type want, size_t n_max, std::vector<T> & out) {
        const int64_t id = find(key);
        if (id < 0 || !expect(key, id, GGUF_TYPE_ARRAY)) {
            return;
        }
        const gguf_type type = gguf_get_arr_type(gguf, id);
        const size_t    n    = gguf_get_arr_n(gguf, id);
        if (type != want) {
            if (problem.empty()) {
                problem = std::string(key) + " is an array of " + gguf_type_name(type) + ", it must be one of " + gguf_type_name(want);
            }
            return;
        }
        if (n > n_max) {
            if (problem.empty()) {
                problem = std::string(key) + " has " + num(n) + " entries, at most " + num(n_max) + " are allowed";
            }
            return;
        }
        const T * data = (const T *) gguf_get_arr_data(gguf, id);
        out.assign(data, data + n);
    }
};

// Value of an integer key of any width, or of an array that says the same for every layer; -1 for anything else.
int64_t integer(const gguf_context * gguf, const std::string & key) {
    const int64_t id = gguf_find_key(gguf, key.c_str());
    if (id < 0) {
        return -1;
    }
    switch (gguf_get_kv_type(gguf, id)) {
        case GGUF_TYPE_UINT8:  return gguf_get_val_u8 (gguf, id);
        case GGUF_TYPE_UINT16: return gguf_get_val_u16(gguf, id);
        case GGUF_TYPE_UINT32: return gguf_get_val_u32(gguf, id);
        case GGUF_TYPE_INT32:  return gguf_get_val_i32(gguf, id);
        case GGUF_TYPE_ARRAY:  break;
        default:               return -1;
    }
    const gguf_type type = gguf_get_arr_type(gguf, id);
    const size_t    n    = gguf_get_arr_n(gguf, id);
    if ((type != GGUF_TYPE_INT32 && type != GGUF_TYPE_UINT32) || n == 0) {
        return -1;
    }
    const int32_t * values = (const int32_t *) gguf_get_arr_data(gguf, id);
    return std::all_of(values, values + n, [&](int32_t v) { return v == values[0]; }) ? values[0] : -1;
}

} // namespace

bool tca_has_keys(const gguf_context * gguf) {
    for (int64_t i = 0; i < gguf_get_n_kv(gguf); ++i) {
        if (strncmp(gguf_get_key(gguf, i), "tca.", 4) == 0) {
            return true;
        }
    }
    return false;
}

tca_status tca_gguf_check(const gguf_context * gguf, std::string & problem) {
    return tca_gguf_check(gguf, gguf, problem);
}

tca_status tca_gguf_check(const gguf_context * gguf, const gguf_context * keys, std::string & problem) {
    if (!tca_has_keys(keys)) {
        return TCA_NO_BUDGETS;
    }
    const int64_t id_arch = gguf_find_key(gguf, "general.architecture");
    if (id_arch < 0 || gguf_get_kv_type(gguf, id_arch) != GGUF_TYPE_STRING) {
        problem = "general.architecture is missing or no string";
        return TCA_ERR_IO;
    }
    const std::string arch = gguf_get_val_str(gguf, id_arch);

    const int64_t n_layer = integer(gguf, arch + ".block_count");
    int64_t n_head_kv     = integer(gguf, arch + ".attention.head_count_kv");
    if (gguf_find_key(gguf, (arch + ".attention.head_count_kv").c_str()) < 0) {
        n_head_kv = integer(gguf, arch + ".attention.head_count");
    }
    constexpr int64_t n_max = 65536;
    if (n_layer < 1 || n_layer > n_max || n_head_kv < 1 || n_head_kv > n_max) {
        problem = "the metadata does not state one number of layers and of KV heads, from 1 to " + num(n_max);
        return TCA_ERR_UNSUPPORTED;
    }
    tca_budgets_data budgets;
    bool             enabled;
    const tca_status status = tca_budgets_from_gguf(keys, n_layer, n_head_kv, budgets, enabled, problem);
    return enabled ? status : TCA_NO_BUDGETS;
}

tca_status tca_budgets_from_gguf(const gguf_context * gguf, uint32_t n_layer, uint32_t n_head_kv,
        tca_budgets_data & out, bool & enabled, std::string & problem) {
    problem.clear();
    enabled = true;

    if (!tca_has_keys(gguf)) {
        return TCA_NO_BUDGETS;
    }

    reader r { gguf, problem };

    const int64_t id_enabled = gguf_find_key(gguf, "tca.enabled");
    if (id_enabled >= 0 && r.expect("tca.enabled", id_enabled, GGUF_TYPE_BOOL)) {
        enabled = gguf_get_val_bool(gguf, id_enabled);
    }

    tca_budgets_data b;
    b.n_layer   = n_layer;
    b.n_head_kv = n_head_kv;
    r.u32("tca.version",    b.version);
    if (problem.empty() && b.version != TCA_FORMAT_VERSION) {
        // a later version may have other keys: say so before complaining about them
        problem = tca_budgets_problem(b.view());
    }
    r.u32("tca.block_size", b.block_size);
    r.u32("tca.group_size", b.group_size);
    r.u32("tca.window",     b.window);
    r.u32("tca.sinks",      b.sinks);
    b.rollback = std::min<uint32_t>(TCA_ROLLBACK, b.group_size);
    if (gguf_find_key(gguf, "tca.rollback") >= 0) {
        r.u32("tca.rollback", b.rollback);
    }
    r.str("tca.metric",     b.metric);
    r.array("tca.keep_counts", GGUF_TYPE_INT32, TCA_MAX_BLOCK + 1, b.keep_counts);
    r.array("tca.configs",     GGUF_TYPE_INT32, (size_t) TCA_MAX_CONFIGS*(TCA_MAX_BLOCK + 1), b.configs);
    r.array("tca.head_config", GGUF_TYPE_INT32, (size_t) 1 << 24, b.head_config);
    if (gguf_find_key(gguf, "tca.probe") >= 0) {
        r.array("tca.probe", GGUF_TYPE_FLOAT32, (size_t) 1 << 28, b.probe);
    }

    if (problem.empty() && (b.keep_counts.empty() || b.configs.size() % b.keep_counts.size() != 0)) {
        problem = "tca.configs has " + num(b.configs.size()) + " entries, it must be a multiple of the " +
            num(b.keep_counts.size()) + " entries of tca.keep_counts, which must not be empty";
    }
    if (problem.empty() && b.head_config.size() != (size_t) n_layer*n_head_kv) {
        problem = "tca.head_config has " + num(b.head_config.size()) + " entries, this model has " + num(n_layer) +
            " layers of " + num(n_head_kv) + " KV heads = " + num((long long) n_layer*n_head_kv);
    }
    const size_t n_heads = std::max<size_t>(b.head_config.size(), 1);
    if (problem.empty() && b.probe.size() % n_heads != 0) {
        problem = "tca.probe has " + num(b.probe.size()) + " entries, it must be a multiple of the " + num(n_heads) +
            " KV heads";
    }
    if (problem.empty()) {
        b.n_probe = std::min<size_t>(b.probe.size()/n_heads, TCA_MAX_PROBE + 1);
        problem   = tca_budgets_problem(b.view());
    }
    if (!problem.empty()) {
        return TCA_ERR_BUDGETS;
    }
    out = std::move(b);
    return TCA_OK;
}
