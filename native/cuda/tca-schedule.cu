#include "tca-schedule.cuh"

constexpr int THREADS = 1024;

static __global__ void __launch_bounds__(THREADS, 1) schedule_kernel(const tca_store s, const int gqa, const tca_schedule w) {
    __shared__ int warp_sums[THREADS/32];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    int total = 0;
    for (int t0 = 0; t0 < w.n_tiles; t0 += THREADS) {
        const int tile = t0 + tid;
        int n = 0;
        if (tile < w.n_tiles) {
            const int unit = tile/w.n_tiles_unit;
            const int row0 = tile % w.n_tiles_unit*w.tile_rows;
            const int32_t * d = s.desc + (size_t) unit*TCA_DESC_SIZE;
            const int rows = d[TCA_DESC_COUNT]*gqa;
            if (row0 < rows) {
                const int visible = d[TCA_DESC_PAST] + (min(row0 + w.tile_rows, rows) - 1)/gqa + 1;
                n = (visible + w.tile_keys - 1)/w.tile_keys;
            }
        }
        int sum = n;
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const int other = __shfl_up_sync(0xffffffff, sum, o);
            sum += lane >= o ? other : 0;
        }
        if (lane == 31) {
            warp_sums[warp] = sum;
        }
        __syncthreads();
        int before = total;
        for (int i = 0; i < THREADS/32; ++i) {
            before += i < warp ? warp_sums[i] : 0;
            total  += warp_sums[i];
        }
        if (tile < w.n_tiles) {
            w.prefix[tile] = before + sum - n;
        }
        __syncthreads();
    }
    if (tid == 0) {
        w.prefix[w.n_tiles] = total;
    }
    __syncthreads();
    for (int tile = tid; total > 0 && tile < w.n_tiles; tile += THREADS) {
        const int first = w.prefix[tile], last = w.prefix[tile + 1];
        if (first < last) {
            // thread blocks whose run starts in this tile
            for (int run = tca_run_of(w, first, total); run < tca_runs(w, total) && tca_run_start(w, run, total) < last; ++run) {
                if (tca_run_start(w, run, total) >= first) {
                    w.first_tile[run] = tile;
                }
            }
        }
    }
}

// grid n_tiles, blocks of 256 threads: puts the parts of a tile together if there are several
static __global__ void finish_kernel(const tca_store s, const tca_queries a, const tca_schedule w, int dim) {
    const int tile  = blockIdx.x;
    const int total = w.prefix[w.n_tiles];
    const int first = w.prefix[tile], last = w.prefix[tile + 1];
    if (first == last) {
        return;
    }
    const int block0 = tca_run_of(w, first, total);
    const int block1 = tca_run_of(w, last - 1, total);
    if (block0 == block1) {
        return;
    }
    const int unit = tile/w.n_tiles_unit;
    const int head = unit % s.n_head_kv;
    const int row0 = tile % w.n_tiles_unit*w.tile_rows;
    const int32_t * d = s.desc + (size_t) unit*TCA_DESC_SIZE;
    const int n_rows = min(w.tile_rows, d[TCA_DESC_COUNT]*a.gqa - row0);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int r = blockIdx.y*8 + warp; r < n_rows; r += 8*gridDim.y) {
        // the first part is the last of its thread block's run, the others are the first of theirs
        const auto part = [&](int block) {
            return w.partial + (((size_t) block*2 + (block == block0 ? 1 : 0))*w.tile_rows + r)*(dim + 2);
        };
        float m = TCA_NO_MAX;
        for (int block = block0; block <= block1; ++block) {
            m = fmaxf(m, part(block)[dim]);
        }
        float l = 0.0f, o[8] = { 0.0f };
        for (int block = block0; block <= block1; ++block) {
            const float * p = part(block);
            const float weight = exp2f(p[dim] - m);
            l = fmaf(weight, p[dim + 1], l);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (lane + 32*i < dim) {
                    o[i] = fmaf(weight, p[lane + 32*i], o[i]);
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
    w.n_tiles_unit = (((int64_t) q.n_tokens + store.n_seqs - 1)/store.n_seqs*q.gqa + tile_rows - 1)/tile_rows;
    w.n_tiles      = w.n_tiles_unit*store.n_head_kv*store.n_seqs;
    w.n_blocks     = n_blocks;
    w.tile_rows    = tile_rows;
    w.tile_keys    = tile_keys;
    w.prefix       = memory.ints.alloc(w.n_tiles + 1 + n_blocks);
    w.first_tile   = w.prefix + w.n_tiles + 1;
    w.partial      = memory.floats.alloc((size_t) n_blocks*2*tile_rows*(head_dim + 2));
    schedule_kernel<<<1, THREADS, 0, stream>>>(store, q.gqa, w);
    return w;
}

void tca_schedule_finish(const tca_schedule & w, const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream) {
    finish_kernel<<<dim3(w.n_tiles, 4), 256, 0, stream>>>(store, q, w, head_dim);
}
