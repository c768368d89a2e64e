// Budgets as the runtime holds them, and their validation. Source of the rules: docs/gguf-keys.md.
#pragma once

#include "tca.h"

#include <string>
#include <vector>

struct gguf_context;

// Owning form of tca_budgets.
struct tca_budgets_data {
    uint32_t             version    = 0;
    uint32_t             block_size = 0;
    uint32_t             group_size = 0;
    uint32_t             window     = 0;
    uint32_t             sinks      = 0;
    uint32_t             rollback   = 0;
    std::string          metric;
    std::vector<int32_t> keep_counts;   // [n_keep]
    std::vector<int32_t> configs;       // [n_configs, n_keep]
    std::vector<int32_t> head_config;   // [n_layer, n_head_kv]
    uint32_t             n_layer    = 0;
    uint32_t             n_head_kv  = 0;
    uint32_t             n_probe    = 0;
    std::vector<float>   probe;         // [n_layer, n_head_kv, n_probe]

    tca_budgets_data() = default;

    // A copy of everything that a view refers to; it must be valid (tca_budgets_problem). Undoes view().
    explicit tca_budgets_data(const tca_budgets & view);

    // Borrowed view; valid while this object is unchanged.
    tca_budgets view() const;
};

// Empty string: valid. Otherwise one line that names the key and says what it must be.
std::string tca_budgets_problem(const tca_budgets & budgets);

// tca.* keys of a GGUF file for a model with n_layer layers of n_head_kv KV heads.
// TCA_NO_BUDGETS if there is no key that starts with "tca."; TCA_ERR_BUDGETS with `problem` set; TCA_OK with `out` set.
// `enabled` is the value of tca.enabled in the file (true if the key is absent).
tca_status tca_budgets_from_gguf(const gguf_context * gguf, uint32_t n_layer, uint32_t n_head_kv,
        tca_budgets_data & out, bool & enabled, std::string & problem);

// Whether there is a key that starts with "tca.".
bool tca_has_keys(const gguf_context * gguf);

// The whole of tca_file_check() but the file: the sizes of the model come from the metadata itself.
// TCA_NO_BUDGETS also if the file switches its keys off, as the runtime then leaves them alone. Failures set `problem`.
// `keys` has the tca.* keys of the model, see tca-source.h.
tca_status tca_gguf_check(const gguf_context * model, const gguf_context * keys, std::string & problem);
tca_status tca_gguf_check(const gguf_context * gguf, std::string & problem);  // keys in the model's own file

// Tokens kept of one group under a configuration row; group_size for TCA_HEAD_DENSE, 0 for TCA_HEAD_SLIDING. The row must
// be valid.
int32_t tca_config_kept(const tca_budgets & budgets, int32_t config);
