// Prefill on any tensor-core GPU: FlashAttention-2 with mma.sync m16n8k16, f16 in, f32 accumulation. 64 query rows a thread
// block, one warp 16 of them; K and V tiles in shared memory, double buffered. Every head size and store type: what is not f16
// is converted while it is loaded. The same kernel does ATTN_PARTIAL when there are too many rows for the decode kernel.
#include "tca-schedule.cuh"

constexpr int WARPS     = 4;
constexpr int TILE_ROWS = 16*WARPS;

template <int D> constexpr int tile_keys = D <= 128 ? 64 : 32;
template <int D> constexpr int pitch     = D + 8;  // halfs a row of a tile: rows start 4 banks apart

static __device__ __forceinline__ void ldmatrix(uint32_t * r, uint32_t address) {
    TCA_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ void ldmatrix_transposed(uint32_t * r, uint32_t address) {
    TCA_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ uint32_t pack(float a, float b) {
    const half2 h = __floats2half2_rn(a, b);
    return *(const uint32_t *) &h;
}

// Rows [0, n_rows) of a tile to shared memory as f16, zeros behind them.
template <int D>
static __device__ __forceinline__ void load_tile(half * dst, const char * src, size_t nb, int type, int n_rows) {
    constexpr int UNITS = D/8;
    if (type == GGML_TYPE_F16) {
        for (int i = threadIdx.x; i < tile_keys<D>*UNITS; i += 32*WARPS) {
            const int row = i/UNITS, unit = i % UNITS;
            const bool valid = row < n_rows;
            tca_cp_async(tca_smem(dst + row*pitch<D> + unit*8), src + (valid ? row : 0)*nb + unit*16, valid ? 16 : 0);
        }
        return;
    }
    tca_with_type(type, [&](auto tag) {
#pragma unroll 4
        for (int i = threadIdx.x; i < tile_keys<D>*UNITS; i += 32*WARPS) {
            const int row = i/UNITS, unit = i % UNITS;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (row < n_rows) {
                x = tca_load8_f16<decltype(tag)::value>(src + row*nb, unit);
            }
            *(uint4 *) (dst + row*pitch<D> + unit*8) = x;
        }
    });
}

// One part of a row tile. partial_out: where the tile's unnormalised rows go, NULL: normalised to the destination.
// natural: maxima in natural logarithms (ATTN_PARTIAL) instead of log2.
template <int D>
static __device__ void attend(const tca_store & s, const tca_queries & a, const int32_t * d, int head, int row0, int n_rows,
        int key0, int key1, half * smem, float * partial_out, size_t partial_row_head, size_t partial_row_token, bool natural) {
    constexpr int KEYS = tile_keys<D>;
    constexpr int TILE = KEYS*pitch<D>;
    half * k_tiles = smem;
    half * v_tiles = smem + 2*TILE;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane/4, t4 = lane % 4;
    const int64_t offset = d[TCA_DESC_OFFSET];
    const int past = d[TCA_DESC_PAST], token0 = d[TCA_DESC_TOKEN];

    // the two rows of this lane
    const int  r[2]     = { warp*16 + g, warp*16 + g + 8 };
    int        visible[2];
    const float * q_row[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = row0 + min(r[i], n_rows - 1);
        visible[i] = past + row/a.gqa + 1;
        q_row[i]   = a.q + (head*a.gqa + row % a.gqa)*a.q_head + (token0 + row/a.gqa)*a.q_token;
    }
    uint32_t q[D/16][4];
#pragma unroll
    for (int k = 0; k < D/16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 x = *(const float2 *) (q_row[i % 2] + 16*k + 8*(i/2) + 2*t4);
            q[k][i] = pack(x.x, x.y);
        }
    }

    const auto load = [&](int j, int buffer) {
        const int64_t slot = offset + j;
        load_tile<D>(k_tiles + buffer*TILE, s.k + slot*s.nb_k, s.nb_k, s.type_k, min(KEYS, key1 - j));
        load_tile<D>(v_tiles + buffer*TILE, s.v + slot*s.nb_v, s.nb_v, s.type_v, min(KEYS, key1 - j));
        tca_cp_async_commit();
    };

    float o[D/8][4];
#pragma unroll
    for (int i = 0; i < D/8; ++i) {
        o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0.0f;
    }
    float m[2] = { TCA_NO_MAX, TCA_NO_MAX }, l[2] = { 0.0f, 0.0f };
    const float to_log2 = a.softcap == 0.0f ? a.scale*1.44269504f : 1.44269504f;

    __syncthreads();  // the buffers of the part before are free
    load(key0, 0);
    for (int j = key0, buffer = 0; j < key1; j += KEYS, buffer ^= 1) {
        tca_cp_async_wait<0>();
        __syncthreads();
        if (j + KEYS < key1) {
            load(j + KEYS, buffer ^ 1);
        }

        float c[KEYS/8][4];
#pragma unroll
        for (int n = 0; n < KEYS/8; ++n) {
            c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0.0f;
        }
        const uint32_t k_base = tca_smem(k_tiles + buffer*TILE + (lane % 8 + lane/16*8)*pitch<D> + lane/8%2*8);
#pragma unroll
        for (int k = 0; k < D/16; ++k) {
#pragma unroll
            for (int n = 0; n < KEYS/8; n += 2) {
                uint32_t b[4];
                ldmatrix(b, k_base + (n*8*pitch<D> + 16*k)*2);
                tca_mma(c[n],     q[k], b[0], b[1]);
                tca_mma(c[n + 1], q[k], b[2], b[3]);
            }
        }

        if (a.softcap != 0.0f) {
#pragma unroll
            for (int n = 0; n < KEYS/8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    c[n][i] = tca_softcap(c[n][i]*a.scale, a.softcap);
                }
            }
        }
        if (j + KEYS > min(visible[0], key1)) {
#pragma unroll
            for (int n = 0; n < KEYS/8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int key = j + 8*n + 2*t4 + i % 2;
                    if (key >= min(visible[i/2], key1)) {
                        c[n][i] = -INFINITY;
                    }
                }
            }
        }
        float shrink[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float max = -INFINITY;
#pragma unroll
            for (int n = 0; n < KEYS/8; ++n) {
                max = fmaxf(max, fmaxf(c[n][2*i], c[n][2*i + 1]));
            }
            max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
            max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
            const float m_new = fmaxf(m[i], max*to_log2);
            shrink[i] = exp2f(m[i] - m_new);
            m[i] = m_new;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS/8; ++n) {
                c[n][2*i]     = exp2f(fmaf(c[n][2*i],     to_log2, -m_new));
                c[n][2*i + 1] = exp2f(fmaf(c[n][2*i + 1], to_log2, -m_new));
                sum += c[n][2*i] + c[n][2*i + 1];
            }
            l[i] = fmaf(l[i], shrink[i], sum);
        }
#pragma unroll
        for (int n = 0; n < D/8; ++n) {
            o[n][0] *= shrink[0];
            o[n][1] *= shrink[0];
            o[n][2] *= shrink[1];
            o[n][3] *= shrink[1];
        }
        const uint32_t v_base = tca_smem(v_tiles + buffer*TILE + (lane % 8 + lane/8%2*8)*pitch<D> + lane/16*8);
#pragma unroll
        for (int k = 0; k < KEYS/16; ++k) {
            const uint32_t p[4] = { pack(c[2*k][0], c[2*k][1]), pack(c[2*k][2], c[2*k][3]),
                pack(c[2*k + 1][0], c[2*k + 1][1]), pack(c[2*k + 1][2], c[2*k + 1][3]) };
#pragma unroll
            for (int n = 0; n < D/8; n += 2) {
                uint32_t b[4];
                ldmatrix_transposed(b, v_base + (16*k*pitch<D> + 8*n)*2);
                tca_mma(o[n],     p, b[0], b[1]);
                tca_mma(o[n + 1], p, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
        l[i] += __shfl_xor_sync(0xffffffff, l[i], 1);
        l[i] += __shfl_xor_sync(0xffffffff, l[i], 2);
        if (r[i] >= n_rows) {
            continue;
        }
        const int row = row0 + r[i];
        float * out;
        float norm = 1.0f;
        if (partial_out) {
            out = partial_out + (natural ? (head*a.gqa + row % a.gqa)*partial_row_head + (token0 + row/a.gqa)*partial_row_token :
                    (size_t) r[i]*(D + 2));
            if (t4 == 0) {
                out[D]     = natural && m[i] != TCA_NO_MAX ? m[i]*0.69314718f : m[i];
                out[D + 1] = l[i];
            }
        } else {
            out  = a.dst + (head*a.gqa + row % a.gqa)*a.dst_head + (token0 + row/a.gqa)*a.dst_token;
            norm = 1.0f/l[i];
        }
#pragma unroll
        for (int n = 0; n < D/8; ++n) {
            *(float2 *) (out + 8*n + 2*t4) = make_float2(o[n][2*i]*norm, o[n][2*i + 1]*norm);
        }
    }
}

template <int D>
static __global__ void __launch_bounds__(32*WARPS, D <= 128 ? 2 : 1) prefill_kernel(const tca_store s, const tca_queries a,
        const tca_schedule w) {
    extern __shared__ __align__(16) half tiles[];
    tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & x) {
        attend<D>(s, a, x.d, x.head, x.row0, x.n_rows, x.key0, x.key1, tiles, x.partial, 0, 0, false);
    });
}

// ATTN_PARTIAL with many rows: grid (n_chunks, n_head_kv, n_seqs)
template <int D>
static __global__ void __launch_bounds__(32*WARPS, D <= 128 ? 2 : 1) partial_kernel(const tca_store s, const tca_queries a) {
    extern __shared__ __align__(16) half tiles[];
    const int chunk = blockIdx.x, head = blockIdx.y;
    const int32_t * d = tca_region(s, blockIdx.z, head);
    const int used = d[TCA_DESC_USED], rows = d[TCA_DESC_COUNT]*a.gqa;
    if (chunk*TCA_ATTN_CHUNK >= used) {
        return;
    }
    for (int row0 = 0; row0 < rows; row0 += TILE_ROWS) {
        attend<D>(s, a, d, head, row0, min(TILE_ROWS, rows - row0), chunk*TCA_ATTN_CHUNK, min((chunk + 1)*TCA_ATTN_CHUNK, used), tiles,
                a.dst + (size_t) chunk*(D + 2), a.dst_head, a.dst_token, true);
    }
}

template <int D>
static void launch(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q, bool partial) {
    constexpr int smem = 4*tile_keys<D>*pitch<D>*sizeof(half);
    cudaStream_t stream = ctx.stream();
    if (partial) {
        CUDA_CHECK(cudaFuncSetAttribute(partial_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        partial_kernel<D><<<dim3(q.n_chunks, store.n_head_kv, store.n_seqs), 32*WARPS, smem, stream>>>(store, q);
        return;
    }
    CUDA_CHECK(cudaFuncSetAttribute(prefill_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    int per_sm = 1;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, prefill_kernel<D>, 32*WARPS, smem));
    tca_schedule_memory memory(ctx.pool());
    const tca_schedule w = tca_schedule_make(memory, store, q, D, TILE_ROWS, tile_keys<D>,
            std::max(per_sm, 1)*ggml_cuda_info().devices[ctx.device].nsm, stream);
    prefill_kernel<D><<<w.n_runs_max, 32*WARPS, smem, stream>>>(store, q, w);
    tca_schedule_finish(w, store, q, D, stream);
}

void tca_cuda_prefill(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q, int head_dim, bool partial) {
    tca_with_head_dim(head_dim, [&](auto d) { launch<decltype(d)::value>(ctx, store, q, partial); });
}
