// Work of a prefill launch. Row tiles of query rows times the key blocks that they see are laid end to end and cut into equal
// runs, one a thread block ("stream-K"): however long a head's region is, no thread block works longer than another.
//
// The order is (region, chunk of key blocks, row tile, key block). Thread blocks of one region are in step, at the same key block
// of a chunk, where a run is a whole number of chunks: they start equally far into a chunk, and read K and V from the L2 cache
// that one of them has brought there. Where they are not, an H200 read 33 GB for 0.54 GB of keys and values, and that power
// lowered its clock. So a region's chunks are an integer part of a run each, but for the last one: which part, is chosen to leave
// the last one short (chunk_of).
//
// An item is a row tile over one chunk. It starts with TCA_ITEM_COST key blocks' time in which nothing is multiplied: positions
// count them, or a thread block with many short items would end last. An item that is not a whole tile, or that a cut goes
// through, leaves partial results, which tca_schedule_finish() puts together.
#pragma once

#include "tca-kernels.cuh"

constexpr int TCA_ITEM_COST = 2;

struct tca_schedule_unit {  // a (sequence, KV head)
    int item0;              // its first item
    int n_tiles;            // row tiles
    int n_chunks;
    int chunk;              // key blocks a chunk
};

// Rows of a (sequence, KV head): row r is query token r/gqa, query head r%gqa of the group.
struct tca_schedule {
    int     n_units;
    int     n_tiles_unit;       // most row tiles of a unit, by shapes
    int     n_runs_max;         // thread blocks
    int     tile_rows;
    int     tile_keys;
    int     n_items_max;        // what there is room for
    tca_schedule_unit * units;  // [n_units + 1]; the last: item0 the number of items, chunk the length of a run
    int   * prefix;             // [items + 1] position of an item
    int   * first_item;         // [n_runs_max] item in which a run starts
    float * partial;            // [items + runs, tile_rows, head_dim + 2] unnormalised output, maximum (log2 units), sum
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

static __device__ __forceinline__ int tca_total(const tca_schedule & w) {
    return w.prefix[w.units[w.n_units].item0];
}

static __device__ __forceinline__ int tca_run_length(const tca_schedule & w) {
    return w.units[w.n_units].chunk;
}

// Runs that are not empty.
static __device__ __forceinline__ int tca_runs(const tca_schedule & w, int total) {
    return (total + tca_run_length(w) - 1)/tca_run_length(w);
}

static __device__ __forceinline__ int tca_run_start(const tca_schedule & w, int run, int total) {
    return min(run*tca_run_length(w), total);
}

// Run that holds a position.
static __device__ __forceinline__ int tca_run_of(const tca_schedule & w, int at) {
    return at/tca_run_length(w);
}

// Key blocks of row tile `tile` of a unit.
static __device__ __forceinline__ int tca_tile_blocks(const tca_schedule & w, const int32_t * d, int gqa, int tile) {
    const int rows = min((tile + 1)*w.tile_rows, d[TCA_DESC_COUNT]*gqa);
    return (d[TCA_DESC_PAST] + (rows - 1)/gqa + 1 + w.tile_keys - 1)/w.tile_keys;
}

// Partial results of what a run does of an item: steps in the walk through all items and cuts, hence never the same for two.
static __device__ __forceinline__ float * tca_partial(const tca_schedule & w, int item, int run, int head_dim) {
    return w.partial + (size_t) (item + run)*w.tile_rows*(head_dim + 2);
}

// What a thread block does of an item.
struct tca_work {
    const int32_t * d;
    int     head;
    int     row0, n_rows;  // rows of the tile; n_rows may be less than tile_rows
    int     key0, key1;    // slots of the region
    float * partial;       // [tile_rows, head_dim + 2], NULL: the whole tile, straight to the destination
};

// Calls visit(const tca_work &) for every piece of this thread block's run.
template <typename F>
static __device__ __forceinline__ void tca_for_each_work(const tca_store & s, int gqa, const tca_schedule & w, int head_dim, F && visit) {
    const int run = blockIdx.x, total = tca_total(w);
    if (run >= tca_runs(w, total)) {
        return;
    }
    const int end = tca_run_start(w, run + 1, total);
    int at = tca_run_start(w, run, total);
    int u  = 0;
    for (int item = w.first_item[run]; at < end; ++item) {
        const int first = w.prefix[item], last = w.prefix[item + 1];
        if (first == last) {
            continue;
        }
        while (item >= w.units[u + 1].item0) {
            ++u;
        }
        const tca_schedule_unit unit = w.units[u];
        const int chunk = (item - unit.item0)/unit.n_tiles, tile = (item - unit.item0) % unit.n_tiles;
        const int stop  = min(end, last), block0 = first + TCA_ITEM_COST;  // position of its first key block
        const int from  = max(at - block0, 0), to = stop - block0;
        at = stop;
        if (to <= from) {
            continue;
        }

        tca_work x;
        x.d      = s.desc + (size_t) u*TCA_DESC_SIZE;
        x.head   = u % s.n_head_kv;
        x.row0   = tile*w.tile_rows;
        x.n_rows = min(w.tile_rows, x.d[TCA_DESC_COUNT]*gqa - x.row0);
        x.key0   = (chunk*unit.chunk + from)*w.tile_keys;
        x.key1   = min((chunk*unit.chunk + to)*w.tile_keys, x.d[TCA_DESC_PAST] + (x.row0 + x.n_rows - 1)/gqa + 1);
        const bool whole = from == 0 && stop == last && to == tca_tile_blocks(w, x.d, gqa, tile);
        x.partial = whole ? nullptr : tca_partial(w, item, run, head_dim);
        visit(x);
    }
}
