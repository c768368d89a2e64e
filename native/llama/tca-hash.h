// FNV-1a, 64 bits: tells states of other budgets or other texts apart. No protection against somebody who wants a collision.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr uint64_t TCA_HASH_START = 0xcbf29ce484222325ull;

inline uint64_t tca_hash(uint64_t hash, const void * data, size_t n_bytes) {
    for (size_t i = 0; i < n_bytes; ++i) {
        hash = (hash ^ ((const unsigned char *) data)[i])*0x100000001b3ull;
    }
    return hash;
}
