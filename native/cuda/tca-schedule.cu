#include "tca-schedule.cuh"

constexpr int THREADS = 1024;
constexpr int MOST_PARTS = 16;  // most chunks a run; at most 32, one a lane
constexpr int FINISH_BLOCKS = 8;  // thread blocks that put a tile together
constexpr int CHUNK_MIN  = 8;   // key blocks

// Exclusive sum over the thread block; total is that of all threads.
static __device__ int block_scan(int x, int & total) {
    __shared__ int sums[THREADS/32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int sum = x;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(0xffffffff, sum, o);
        sum += lane >= o ? other : 0;
    }
    __syncthreads();
    if (lane == 31) {
        sums[warp] = sum;
    }
    __syncthreads();
    int before = 0;
    total = 0;
    for (int i = 0; i < THREADS/32; ++i) {
        before += i < warp ? sums[i] : 0;
        total  += sums[i];
    }
    return before + sum - x;
}

// Key blocks a chunk for a unit of n_tiles row tiles that see at most n_blocks, by one warp. A chunk is the k-th part of a run, as
// near as whole blocks come. In units of a tile's work on one key block it costs what there is read out of step: the rest behind
// the last whole chunk, and what a k-th part that is not whole lets the thread blocks drift apart, both only as far as the L2 cache
// does not hold it; and each chunk its start and a partial result to be written and read.
static __device__ int chunk_of(int n_tiles, int n_blocks, int run, int most_parts) {
    constexpr float OUT_OF_STEP = 0.17f, PARTIAL = 4.0f;
    if (n_blocks <= 64) {
        return n_blocks;  // in the L2 cache in any case
    }
    // share of reads that the L2 cache misses when thread blocks are n key blocks apart, with 8 regions at a time
    const auto outside = [](int n) { return fminf(fmaxf((n - 8)/40.0f, 0.0f), 1.0f); };
    const int   k     = threadIdx.x % 32 + 1;
    const int   chunk = max((run + k/2)/k - TCA_ITEM_COST, CHUNK_MIN), whole = n_blocks/chunk, rest = n_blocks % chunk;
    const int   drift = (int) fminf((float) chunk, (float) abs(run - k*(chunk + TCA_ITEM_COST))*n_tiles*n_blocks/run);
    const int   n     = whole + (rest > 0);
    float cost = OUT_OF_STEP*(rest*outside(rest) + whole*chunk*outside(drift)) + n*TCA_ITEM_COST + (n > 1 ? PARTIAL*n : 0.0f);
    int   best = chunk;
    if (k > most_parts) {
        cost = INFINITY;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const float other_cost = __shfl_xor_sync(0xffffffff, cost, o);
        const int   other      = __shfl_xor_sync(0xffffffff, best, o);
        if (other_cost < cost || (other_cost == cost && other > best)) {
            cost = other_cost;
            best = other;
        }
    }
    return min(best, n_blocks);
}

// one thread block
static __global__ void __launch_bounds__(THREADS, 1) schedule_kernel(const tca_store s, const int gqa, const tca_schedule w) {
    const int tid = threadIdx.x;

    int mine = 0, total;
    for (int i = tid; i < w.n_units*w.n_tiles_unit; i += THREADS) {
        const int32_t * d = s.desc + (size_t) (i/w.n_tiles_unit)*TCA_DESC_SIZE;
        if (i % w.n_tiles_unit*w.tile_rows < d[TCA_DESC_COUNT]*gqa) {
            mine += tca_tile_blocks(w, d, gqa, i % w.n_tiles_unit);
        }
    }
    block_scan(mine, total);

    // Chunks follow from the length of a run, which their number lengthens a little: until they fit. Fewer parts of a run only if
    // there is no room for so many items.
    const auto whole_parts = [](int run) {  // the next length with many whole parts
        const int m = run >= 1200 ? 12 : run >= 200 ? 4 : 1;
        return (run + m - 1)/m*m;
    };
    int run = whole_parts(max((total + w.n_runs_max - 1)/w.n_runs_max, 1)), n_items;
    for (int turn = 0, most_parts = MOST_PARTS; ; ++turn) {
        for (int u = tid/32; u < w.n_units; u += THREADS/32) {
            const int32_t * d = s.desc + (size_t) u*TCA_DESC_SIZE;
            const int n_tiles = (d[TCA_DESC_COUNT]*gqa + w.tile_rows - 1)/w.tile_rows;
            const int chunk   = n_tiles > 0 ? chunk_of(n_tiles, tca_tile_blocks(w, d, gqa, n_tiles - 1), run, most_parts) : 1;
            if (tid % 32 == 0) {
                w.units[u].chunk = chunk;
            }
        }
        __syncthreads();
        n_items = 0;
        for (int u0 = 0; u0 < w.n_units; u0 += THREADS) {
            const int u = u0 + tid;
            tca_schedule_unit unit = { 0, 0, 0, 1 };
            if (u < w.n_units) {
                const int32_t * d = s.desc + (size_t) u*TCA_DESC_SIZE;
                unit.n_tiles = (d[TCA_DESC_COUNT]*gqa + w.tile_rows - 1)/w.tile_rows;
                if (unit.n_tiles > 0) {
                    const int n_blocks = tca_tile_blocks(w, d, gqa, unit.n_tiles - 1);
                    unit.chunk    = w.units[u].chunk;
                    unit.n_chunks = (n_blocks + unit.chunk - 1)/unit.chunk;
                }
            }
            int n;
            unit.item0 = n_items + block_scan(unit.n_tiles*unit.n_chunks, n);
            n_items += n;
            if (u < w.n_units) {
                w.units[u] = unit;
            }
        }
        const int need = (total + TCA_ITEM_COST*n_items + w.n_runs_max - 1)/w.n_runs_max;
        if (n_items > w.n_items_max) {
            most_parts = max(most_parts/2, 1);
        } else if (need <= run) {
            break;
        } else if (turn >= 8) {
            run = need;
            break;
        } else {
            run = whole_parts(need);
        }
    }
    if (tid == 0) {
        w.units[w.n_units] = { n_items, 0, 0, run };
    }
    __syncthreads();

    int before = 0;
    for (int i0 = 0; i0 < n_items; i0 += THREADS) {
        const int item = i0 + tid;
        int n = 0;
        if (item < n_items) {
            int lo = 0, hi = w.n_units;  // the unit with units[lo].item0 <= item < units[lo + 1].item0
            while (hi - lo > 1) {
                const int mid = (lo + hi)/2;
                (w.units[mid].item0 <= item ? lo : hi) = mid;
            }
            const tca_schedule_unit unit = w.units[lo];
            const int chunk = (item - unit.item0)/unit.n_tiles, tile = (item - unit.item0) % unit.n_tiles;
            n = tca_tile_blocks(w, s.desc + (size_t) lo*TCA_DESC_SIZE, gqa, tile) - chunk*unit.chunk;
            n = min(max(n, 0), unit.chunk);
        }
        const int length = n > 0 ? n + TCA_ITEM_COST : 0;
        int sum;
        const int first = before + block_scan(length, sum);
        if (item < n_items) {
            w.prefix[item] = first;
        }
        before += sum;
        // runs that start in this item
        for (int r = (first + run - 1)/run; r*run < first + length; ++r) {
            w.first_item[r] = item;
        }
    }
    if (tid == 0) {
        w.prefix[n_items] = before;
    }
}

// grid (units*tiles, FINISH_BLOCKS), blocks of 256 threads, a warp a row: puts the parts of a tile together if there are several
static __global__ void finish_kernel(const tca_store s, const tca_queries a, const tca_schedule w, int dim) {
    const int u = blockIdx.x/w.n_tiles_unit, tile = blockIdx.x % w.n_tiles_unit;
    const tca_schedule_unit unit = w.units[u];
    if (tile >= unit.n_tiles) {
        return;
    }
    const int32_t * d = s.desc + (size_t) u*TCA_DESC_SIZE;
    const int head   = u % s.n_head_kv;
    const int row0   = tile*w.tile_rows;
    const int n_rows = min(w.tile_rows, d[TCA_DESC_COUNT]*a.gqa - row0);

    const int item  = unit.item0 + tile;
    const int first = w.prefix[item] + TCA_ITEM_COST, last = w.prefix[item + 1];
    if (last - first == tca_tile_blocks(w, d, a.gqa, tile) && tca_run_of(w, first) == tca_run_of(w, last - 1)) {
        return;  // written as a whole
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int r = blockIdx.y*8 + warp; r < n_rows; r += 8*gridDim.y) {
        float m = TCA_NO_MAX, l = 0.0f, o[8] = { 0.0f };
        for (int i = item; i < unit.item0 + unit.n_chunks*unit.n_tiles; i += unit.n_tiles) {
            const int first = w.prefix[i], last = w.prefix[i + 1];
            if (first == last) {
                break;
            }
            const int run1 = tca_run_of(w, last - 1);
            for (int run = tca_run_of(w, first + TCA_ITEM_COST); run <= run1; ++run) {
                const float * p = tca_partial(w, i, run, dim) + (size_t) r*(dim + 2);
                float x[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    x[j] = lane + 32*j < dim ? p[lane + 32*j] : 0.0f;
                }
                const float m_new = fmaxf(m, p[dim]), old = exp2f(m - m_new), weight = exp2f(p[dim] - m_new);
                m = m_new;
                l = fmaf(l, old, weight*p[dim + 1]);
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    o[j] = fmaf(o[j], old, weight*x[j]);
                }
            }
        }
        const int row = row0 + r;
        float * out = a.dst + (head*a.gqa + row % a.gqa)*a.dst_head + (d[TCA_DESC_TOKEN] + row/a.gqa)*a.dst_token;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (lane + 32*i < dim) {
                out[lane + 32*i] = o[i]/l;
            }
        }
    }
}

tca_schedule tca_schedule_make(tca_schedule_memory & memory, const tca_store & store, const tca_queries & q, int head_dim,
        int tile_rows, int tile_keys, int n_blocks, cudaStream_t stream) {
    tca_schedule w;
    w.n_units      = store.n_head_kv*store.n_seqs;
    w.n_tiles_unit = (((int64_t) q.n_tokens + store.n_seqs - 1)/store.n_seqs*q.gqa + tile_rows - 1)/tile_rows;
    w.n_runs_max   = n_blocks;
    w.tile_rows    = tile_rows;
    w.tile_keys    = tile_keys;
    // With chunks of a run a unit has at most 1 + blocks/run of them, and its tiles together at least half of tiles*blocks (a causal
    // triangle): n_tiles + 2*n_blocks items. Shorter chunks are taken where twice that holds them.
    const size_t n_tiles = (size_t) w.n_units*w.n_tiles_unit;
    const size_t n_items = 2*(n_tiles + 2*(size_t) n_blocks);
    w.n_items_max  = (int) n_items;
    const size_t n_units = (w.n_units + 1)*sizeof(tca_schedule_unit)/sizeof(int);
    w.units      = (tca_schedule_unit *) memory.ints.alloc(n_units + n_items + 1 + n_blocks);
    w.prefix     = (int *) w.units + n_units;
    w.first_item = w.prefix + n_items + 1;
    w.partial    = memory.floats.alloc((n_items + n_blocks)*tile_rows*(head_dim + 2));
    schedule_kernel<<<1, THREADS, 0, stream>>>(store, q.gqa, w);
    return w;
}

void tca_schedule_finish(const tca_schedule & w, const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream) {
    finish_kernel<<<dim3(w.n_units*w.n_tiles_unit, FINISH_BLOCKS), 256, 0, stream>>>(store, q, w, head_dim);
}
