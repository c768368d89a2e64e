// Which architectures the ragged cache serves, and why not the others: one table. The model hook, the C API and docs/models.md
// read it. Whatever is not in it is refused: a graph may read a stock cache behind our back.
#pragma once

#include "llama-arch.h"

// How a graph asks for its attention input, a set of bits; none: refused.
enum tca_arch_input : uint8_t {
    TCA_INPUT_NONE   = 0,
    TCA_INPUT_KV     = 1,  // build_attn_inp_kv: every layer alike
    TCA_INPUT_ISWA   = 2,  // build_attn_inp_kv_iswa: some layers slide and stay in the stock cache
    TCA_INPUT_HYBRID = 4,  // build_inp_mem_hybrid: some layers are recurrent, or every layer is both
    TCA_INPUT_LATENT = 8,  // build_attn_inp_k: one latent row a token is key and, in its first elements, value
};

struct tca_arch_entry {
    llm_arch     arch;
    uint8_t      inputs;  // tca_arch_input
    const char * remark;  // refused: the reason, one clause; served: what to know, or ""
};

// nullptr: an architecture that the table does not know.
const tca_arch_entry * tca_arch_find(llm_arch arch);

// The i-th entry, in the order of the table; nullptr past the last.
const tca_arch_entry * tca_arch_at(size_t i);
