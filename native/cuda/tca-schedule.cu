#include "tca-schedule.cuh"

constexpr int THREADS = 1024;

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

    // chunks of equal length, at most a run
    const int run = max((total + w.n_runs_max - 1)/w.n_runs_max, 1);
    int n_items = 0;
    for (int u0 = 0; u0 < w.n_units; u0 += THREADS) {
        const int u = u0 + tid;
        tca_schedule_unit unit = { 0, 0, 0, 1 };
        if (u < w.n_units) {
            const int32_t * d = s.desc + (size_t) u*TCA_DESC_SIZE;
            unit.n_tiles = (d[TCA_DESC_COUNT]*gqa + w.tile_rows - 1)/w.tile_rows;
            if (unit.n_tiles > 0) {
                const int n_blocks = tca_tile_blocks(w, d, gqa, unit.n_tiles - 1);
                unit.n_chunks = (n_blocks + run - 1)/run;
                unit.chunk    = (n_blocks + unit.n_chunks - 1)/unit.n_chunks;
            }
        }
        int n;
        unit.item0 = n_items + block_scan(unit.n_tiles*unit.n_chunks, n);
        n_items += n;
        if (u < w.n_units) {
            w.units[u] = unit;
        }
    }
    if (tid == 0) {
        w.units[w.n_units] = { n_items, 0, 0, 1 };
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
        int sum;
        const int first = before + block_scan(n, sum);
        if (item < n_items) {
            w.prefix[item] = first;
        }
        before += sum;
        // runs that start in this item
        for (int r = n > 0 ? tca_run_of(w, first, total) : w.n_runs_max; r < tca_runs(w, total) && tca_run_start(w, r, total) < first + n; ++r) {
            if (tca_run_start(w, r, total) >= first) {
                w.first_item[r] = item;
            }
        }
    }
    if (tid == 0) {
        w.prefix[n_items] = before;
    }
}

// grid (units*tiles, 4), blocks of 256 threads: puts the parts of a tile together if there are several
static __global__ void finish_kernel(const tca_store s, const tca_queries a, const tca_schedule w, int dim) {
    const int u = blockIdx.x/w.n_tiles_unit, tile = blockIdx.x % w.n_tiles_unit;
    const tca_schedule_unit unit = w.units[u];
    if (tile >= unit.n_tiles) {
        return;
    }
    const int total = tca_total(w);
    const int32_t * d = s.desc + (size_t) u*TCA_DESC_SIZE;
    const int head   = u % s.n_head_kv;
    const int row0   = tile*w.tile_rows;
    const int n_rows = min(w.tile_rows, d[TCA_DESC_COUNT]*a.gqa - row0);

    const int item  = unit.item0 + tile;
    const int first = w.prefix[item], last = w.prefix[item + 1];
    if (last - first == tca_tile_blocks(w, d, a.gqa, tile) && tca_run_of(w, first, total) == tca_run_of(w, last - 1, total)) {
        return;  // written as a whole
    }
    const auto for_each_part = [&](int r, auto && visit) {
        for (int i = item; i < unit.item0 + unit.n_chunks*unit.n_tiles; i += unit.n_tiles) {
            const int first = w.prefix[i], last = w.prefix[i + 1];
            if (first == last) {
                break;
            }
            const int run1 = tca_run_of(w, last - 1, total);
            for (int run = tca_run_of(w, first, total); run <= run1; ++run) {
                visit(tca_partial(w, i, run, dim) + (size_t) r*(dim + 2));
            }
        }
    };

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int r = blockIdx.y*8 + warp; r < n_rows; r += 8*gridDim.y) {
        float m = TCA_NO_MAX;
        for_each_part(r, [&](const float * p) { m = fmaxf(m, p[dim]); });
        float l = 0.0f, o[8] = { 0.0f };
        for_each_part(r, [&](const float * p) {
            const float weight = exp2f(p[dim] - m);
            l = fmaf(weight, p[dim + 1], l);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (lane + 32*i < dim) {
                    o[i] = fmaf(weight, p[lane + 32*i], o[i]);
                }
            }
        });
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
    // Items: a unit has at most 1 + blocks/run chunks, and its tiles together at least half of tiles*blocks (a causal triangle).
    const size_t n_tiles = (size_t) w.n_units*w.n_tiles_unit;
    const size_t n_items = n_tiles + 2*(size_t) n_blocks;
    const size_t n_units = (w.n_units + 1)*sizeof(tca_schedule_unit)/sizeof(int);
    w.units      = (tca_schedule_unit *) memory.ints.alloc(n_units + n_items + 1 + n_blocks);
    w.prefix     = (int *) w.units + n_units;
    w.first_item = w.prefix + n_items + 1;
    w.partial    = memory.floats.alloc((n_items + n_blocks)*tile_rows*(head_dim + 2));
    schedule_kernel<<<1, THREADS, 0, stream>>>(store, q.gqa, w);
    return w;
}

void tca_schedule_finish(const tca_schedule & w, const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream) {
    finish_kernel<<<dim3(w.n_units*w.n_tiles_unit, 4), 256, 0, stream>>>(store, q, w, head_dim);
}
