// A ragged store for tests: the bytes the ops work on, and beside them what they must hold. Every step runs the runtime's
// nodes in one ggml graph on the CPU backend and compares everything: stored rows and positions bit by bit, slots nobody may
// touch, and the attention output with a sum in double precision.
#pragma once

#include "check.h"

#include "metrics/tca-metric.h"
#include "ops/tca-ops.h"

#include "ggml.h"

struct store_shape {
    ggml_type type_k = GGML_TYPE_F32, type_v = GGML_TYPE_F32;
    int dk = 64, dv = 64;
    int n_head_kv = 1, gqa = 1;
    std::vector<std::vector<int64_t>> capacity;  // [n_streams][n_head_kv]
    int64_t guard = 3;                           // slots between the regions that must never change
    float scale = 0.125f, softcap = 0.0f;

    std::string name() const;
};

// True if rows of n values can be stored in the type.
bool fits(ggml_type type, int n);

struct region_t {
    int64_t offset = 0, capacity = 0;
    std::vector<uint8_t> k, v;    // expected rows
    std::vector<int32_t> pos;     // expected positions; its size is the length of the region

    // what the last compaction dropped, from slot stash_at on, until the region grows into it; -1: nothing was set aside
    int64_t stash_at = -1;
    std::vector<uint8_t> stash_k, stash_v;
    std::vector<int32_t> stash_pos;
};

// A run of tokens of one stream, as the runtime's segments.
struct test_segment {
    int     stream = 0;
    int     token  = 0;  // first token in the micro-batch
    int     count  = 0;
    int32_t pos    = 0;
    std::vector<int64_t> group;   // [n_head_kv] slot of the group to compact, -1: none; may be empty: none
    std::vector<int32_t> config;  // [n_head_kv]
};

struct micro_batch {
    int n_tokens = 0;
    std::vector<float> q, k, v;   // [n_tokens, heads, dim], contiguous
    std::vector<std::vector<test_segment>> segments;  // [n_segments][n_seqs]

    void fill(const store_shape & s, int n, random_t & rng);
};

struct step_options {
    int  n_threads = 1;
    bool fused     = true;   // q, k and v are views of one [q | k | v] tensor, rows apart
    int  split     = -1;     // -1: as the runtime chooses; 0: one pass; 1: chunks
    const tca_select_params * select = nullptr;
};

struct step_result {
    double worst = 0.0;            // largest error of an output value, and that of the same maths in f32
    double worst_f32 = 0.0;
    std::vector<double> exact;     // [n_tokens, n_head, dv]
    std::vector<float>  out;
};

class test_store {
public:
    test_store(const store_shape & shape, uint64_t seed);

    const store_shape shape;
    std::vector<std::vector<region_t>> regions;  // [n_streams][n_head_kv]

    // Fills a region with n rows behind what it holds.
    void fill(int stream, int head, int64_t n, int32_t first_pos, random_t & rng);
    void append(region_t & r, const float * k, const float * v, int32_t pos);  // expectation and memory

    // Takes the rows from `n` on out of every region of a stream, as a rollback does.
    void truncate(int stream, int head, int64_t n) { cut(regions[stream][head], n); }

    // Runs append, attention and compaction of a micro-batch. Throws check_failed at the first difference.
    step_result run(const micro_batch & mb, const step_options & options);

    // Memory against expectation, guards and unused slots included.
    void check_memory() const;

private:
    size_t row_k, row_v;
    int64_t n_slots = 0;
    std::vector<uint8_t> k, v;       // the store
    std::vector<int32_t> pos;
    std::vector<uint8_t> k0, v0;     // what unused slots held at first; stale rows are allowed inside a region only
    std::vector<int32_t> pos0;

    void cut(region_t & r, int64_t n);
    int64_t stash_slot(const region_t & r, const tca_select_params & p, int32_t config) const;
    void expect_append(region_t & r, const float * k_row, const float * v_row, int32_t position);
    void expect_compact(region_t & r, int head, const test_segment & seg, const micro_batch & mb, const tca_select_params & p);
};
