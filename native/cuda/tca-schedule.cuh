// Work of a prefill launch: row tiles of query rows, each over the key blocks that its last row sees, laid end to end and cut
// into equal runs, one a thread block ("stream-K"). However long a head's region is, no thread block works longer than
// another. A tile that a cut goes through leaves partial results, which tca_schedule_finish() puts together.
#pragma once

#include "tca-kernels.cuh"

// Rows of a (sequence, KV head): row r is query token r/gqa, query head r%gqa of the group.
struct tca_schedule {
    int     n_tiles_unit;  // row tiles of a (sequence, KV head), by shapes
    int     n_tiles;
    int     n_blocks;      // thread blocks
    int     tile_rows;
    int     tile_keys;
    int   * prefix;        // [n_tiles + 1] key blocks of all tiles before
    int   * first_tile;    // [n_blocks] tile in which a thread block's run starts
    float * partial;       // [n_blocks, 2, tile_rows, head_dim + 2] unnormalised output, maximum (log2 units), sum
};

struct tca_schedule_memory {
    ggml_cuda_pool_alloc<int>   ints;
    ggml_cuda_pool_alloc<float> floats;
    tca_schedule_memory(ggml_cuda_pool & pool) : ints(pool), floats(pool) {}
};

// Fills the schedule on the device (one small launch).
tca_schedule tca_schedule_make(tca_schedule_memory & memory, const tca_store & store, const tca_queries & q, int head_dim,
        int tile_rows, int tile_keys, int n_blocks, cudaStream_t stream);
void tca_schedule_finish(const tca_schedule & schedule, const tca_store & store, const tca_queries & q, int head_dim,
        cudaStream_t stream);

// Thread blocks that have a run: no run is empty.
static __device__ __forceinline__ int tca_runs(const tca_schedule & w, int total) {
    return min(w.n_blocks, total);
}

static __device__ __forceinline__ int tca_run_start(const tca_schedule & w, int run, int total) {
    return (int64_t) run*total/tca_runs(w, total);
}

// Run that holds key block i.
static __device__ __forceinline__ int tca_run_of(const tca_schedule & w, int i, int total) {
    return (((int64_t) i + 1)*tca_runs(w, total) - 1)/total;
}
