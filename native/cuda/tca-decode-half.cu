// Decode over f16 and bf16 stores, as tca-decode-quantized.cu does it: every warp has a ring of tiles of its own and a running
// softmax, the products run on the matrix units, and nothing but the arrival of its own bytes makes a warp wait.
//
// A warp takes every 4th tile of 16 slots of the chunk.
//   K Q^T   mma.m16n8k16: rows are slots, columns query rows
//   V^T P   mma.m16n8k16: rows are dims, columns query rows
// Query rows and probabilities are two values of the store's type each, the second what the first leaves: 22 bits of them with f16,
// 16 with bf16. Up to 4 query rows the second values are columns 4 to 7 of the same products, with more they are products of
// their own.
#include "tca-decode.cuh"

constexpr int WARPS = DECODE_WARPS_HALF;
constexpr int TILE  = 16;  // slots

template <int D> constexpr int pitch      = 2*D + 16;  // rows of a tile start 4 banks apart
template <int D> constexpr int tile_bytes = TILE*pitch<D>;
template <int D> constexpr int step_bytes = tca_decode_step_half(D);
template <int D> constexpr int STEPS      = tca_decode_steps(step_bytes<D>, DECODE_ARCH);

// Probabilities are kept 2^LIFT above their value relative to the running maximum, which follows a new one once that is 2^SLACK
// above it: the small ones keep their bits in f16.
constexpr float LIFT = 6.0f, SLACK = 3.0f;

template <ggml_type type>
static __device__ __forceinline__ void mma(float * c, const uint32_t * a, const uint32_t * b) {
    if constexpr (type == GGML_TYPE_F16) {
        tca_mma(c, a, b[0], b[1]);
    } else {
        TCA_ASM("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// two values as the store's type, and what that leaves of them
template <ggml_type type>
static __device__ __forceinline__ uint32_t split(float & x, float & y) {
    uint32_t u;
    if constexpr (type == GGML_TYPE_F16) {
        const half2 h = __floats2half2_rn(x, y);
        x -= __low2float(h);
        y -= __high2float(h);
        u = *(const uint32_t *) &h;
    } else {
        const nv_bfloat162 h = __floats2bfloat162_rn(x, y);
        x -= __low2float(h);
        y -= __high2float(h);
        u = *(const uint32_t *) &h;
    }
    return u;
}

static __device__ __forceinline__ uint32_t transpose(uint32_t x) {
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

static __device__ __forceinline__ void ldmatrix(uint32_t * r, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ void ldmatrix_transposed(uint32_t * r, uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// Tiles of one warp; all functions are called by the whole warp.
template <int D>
struct warp_ring {
    static constexpr int UNITS = D/8, ROW = 2*D, STEPS = ::STEPS<D>;

    const char * k, * v;    // of the chunk's first slot
    int      n_slots, warp, lane;
    uint32_t tiles;         // address in shared memory

    __device__ __forceinline__ warp_ring(const tca_store & s, const tca_decode_range & range, const char * smem)
        : k(s.k + range.slot0*ROW), v(s.v + range.slot0*ROW),
          n_slots(__shfl_sync(0xffffffff, range.n_slots, 0)),  // so that the compiler knows it to be one value for the warp
          warp(__shfl_sync(0xffffffff, threadIdx.x/32, 0)), lane(threadIdx.x % 32),
          tiles(tca_smem(smem) + warp*STEPS*2*tile_bytes<D>) {}

    // first slot of the warp's tile i
    __device__ __forceinline__ int slot(int i) const { return (i*WARPS + warp)*TILE; }

    __device__ __forceinline__ uint32_t tile_k(int i) const { return tiles +  i % STEPS*2     *tile_bytes<D>; }
    __device__ __forceinline__ uint32_t tile_v(int i) const { return tiles + (i % STEPS*2 + 1)*tile_bytes<D>; }

    // zeros behind the chunk's end
    __device__ __forceinline__ void copy(uint32_t to, const char * from, int bytes) const {
#pragma unroll
        for (int i = 0; i < TILE*UNITS/32; ++i) {
            const int  unit  = lane + 32*i;
            const bool valid = 16*unit < bytes;
            tca_cp_async(to + unit/UNITS*pitch<D> + unit%UNITS*16, valid ? from + 16*unit : from, valid ? 16 : 0);
        }
    }

    __device__ __forceinline__ void send(int i) const {
        const int j = slot(i), bytes = (n_slots - j)*ROW;
        if (bytes > 0) {
            copy(tile_k(i), k + (size_t) j*ROW, bytes);
            copy(tile_v(i), v + (size_t) j*ROW, bytes);
        }
        tca_cp_async_commit();
    }

    // Waits for a tile that STEPS - 1 others were sent after.
    __device__ __forceinline__ void wait() const {
        tca_cp_async_wait<STEPS - 1>();
        __syncwarp();
    }

    // Asks the L2 cache for the first tiles; allowed before what they depend on has finished.
    __device__ __forceinline__ void prefetch() const {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int j = slot(i), bytes = min(TILE, n_slots - j)*ROW;
            for (int at = lane*128; at < bytes; at += 32*128) {
                asm volatile("prefetch.global.L2 [%0];" :: "l"(k + (size_t) j*ROW + at));
                asm volatile("prefetch.global.L2 [%0];" :: "l"(v + (size_t) j*ROW + at));
            }
        }
    }
};

// Query rows as columns [COLS, D + 8] of the store's type: with PACKED row r is columns r and r + 4, else r and ROWS + r.
// unit[r]: power of two that the row was divided by, so that it stays in f16's range.
template <int D, int ROWS, ggml_type type>
struct query_columns {
    static constexpr bool PACKED = ROWS == 4;
    static constexpr int  COLS = 2*ROWS, STRIDE = D + 8;
    __align__(16) uint16_t values[COLS*STRIDE];
    float unit[ROWS];

    // by one warp
    __device__ __forceinline__ void set(int r, const float * q) {
        const int lane = threadIdx.x % 32;
        constexpr int N = (D/2 + 31)/32;
        float2 x[N];
        float  largest = 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int e = lane + 32*i;
            x[i] = e < D/2 ? ((const float2 *) q)[e] : make_float2(0.0f, 0.0f);
            largest = fmaxf(largest, fmaxf(fabsf(x[i].x), fabsf(x[i].y)));
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, o));
        }
        // exponents kept away from the ends, where the inverse has none
        const uint32_t power = min(max((__float_as_uint(largest) >> 23) & 0xff, 64u), 190u);
        const float inverse = __uint_as_float((254 - power) << 23);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int e = lane + 32*i;
            if (e < D/2) {
                x[i].x *= inverse;
                x[i].y *= inverse;
                const uint32_t first = split<type>(x[i].x, x[i].y);
                ((uint32_t *) (values + r*STRIDE))[e] = first;
                ((uint32_t *) (values + (r + ROWS)*STRIDE))[e] = split<type>(x[i].x, x[i].y);
            }
        }
        if (lane == 0) {
            unit[r] = __uint_as_float(power << 23);
        }
    }
};

// grid: rounds of thread blocks (tca_decode_rounds)
template <int D, int ROWS, ggml_type type>
static __global__ void __launch_bounds__(32*WARPS, tca_decode_per_sm_half(D)) decode_kernel(const tca_store s, const tca_queries a) {
    using columns = query_columns<D, ROWS, type>;
    constexpr bool PACKED = columns::PACKED;
    constexpr int  N      = PACKED ? 1 : ROWS/8;  // products of 8 columns for the first values; as many for the second ones
    constexpr int  STRIDE = D + 4;                // of the warps' outputs
    static_assert(D % 16 == 0 && (ROWS == 4 || ROWS == 8 || ROWS == 16), "shape");
    static_assert(WARPS*8*N*STRIDE*(int) sizeof(float) <= step_bytes<D>, "shared memory");
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(16) char smem[];
    __shared__ columns queries;
    __shared__ float warp_m[WARPS][ROWS], warp_l[WARPS][ROWS];
    __shared__ tca_decode_range range;
    if (threadIdx.x < 32) {
        range.set(s, a);
    }
    __syncthreads();
    const warp_ring<D> ring(s, range, smem);
    if (!range.empty) {
        ring.prefetch();
    }
    ggml_cuda_pdl_sync();  // before it only the descriptor was read, which is an input of the graph
    if (range.empty) {
        return;
    }

    const int warp = ring.warp, lane = ring.lane, g = lane/4, t = lane % 4;
    const int32_t * d = range.d;
    const int head = range.head, count = d[TCA_DESC_COUNT], past = d[TCA_DESC_PAST], token0 = d[TCA_DESC_TOKEN];
    const int n_tiles = max(0, ((ring.n_slots + TILE - 1)/TILE - warp + WARPS - 1)/WARPS);  // of this warp
    const uint32_t at_k = lane % 16*pitch<D> + lane/16*16;                    // of the lane's row of ldmatrix
    const uint32_t at_v = (lane % 8 + lane/16*8)*pitch<D> + lane/8%2*16;

    for (int r0 = 0; r0 < count*a.gqa; r0 += ROWS) {
        const int n_rows = min(ROWS, count*a.gqa - r0);
#pragma unroll
        for (int i = 0; i < STEPS<D> - 1; ++i) {
            ring.send(i);
        }
        for (int r = warp; r < ROWS; r += WARPS) {
            const int row = r0 + min(r, n_rows - 1);
            queries.set(r, a.q + (head*a.gqa + row % a.gqa)*a.q_head + (token0 + row/a.gqa)*a.q_token);
        }
        __syncthreads();

        uint32_t q[PACKED ? 1 : 2*N][D/16][2];  // column g of 8
#pragma unroll
        for (int n = 0; n < (PACKED ? 1 : 2*N); ++n) {
#pragma unroll
            for (int b = 0; b < D/16; ++b) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    q[n][b][e] = *(const uint32_t *) (queries.values + (8*n + g)*queries.STRIDE + 16*b + 8*e + 2*t);
                }
            }
        }
        float acc[N][D/16][4] = {};
        // of the query rows 8n + 2t and 8n + 2t + 1 (mod ROWS): running maximum less LIFT, this lane's share of the sum
        float m[N][2], l[N][2];
        float factor[N][2];  // to log2 units
        int   last[N][2];    // last slot of the chunk that the rows see
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = (8*n + 2*t + e) % ROWS;
                m[n][e] = TCA_NO_MAX;
                l[n][e] = 0.0f;
                factor[n][e] = queries.unit[r]*a.scale*(a.softcap == 0.0f ? 1.44269504f : 1.0f);
                last[n][e]   = min(ring.n_slots - 1, past - range.j0 + (count > 1 ? (r0 + r)/a.gqa : 0));
            }
        }

        for (int i = 0; i < n_tiles; ++i) {
            ring.send(i + STEPS<D> - 1);
            ring.wait();
            const int j = ring.slot(i);

            float x[N][4];  // scores: slots g and g + 8, query rows 2t and 2t + 1
            {
                float c[PACKED ? 1 : 2*N][2][4] = {};
                const uint32_t tile = ring.tile_k(i) + at_k;
#pragma unroll
                for (int b = 0; b < D/16; ++b) {
                    uint32_t operand[4];
                    ldmatrix(operand, tile + 32*b);
#pragma unroll
                    for (int n = 0; n < (PACKED ? 1 : 2*N); ++n) {
                        mma<type>(c[n][b % 2], operand, q[n][b]);
                    }
                }
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float y = c[n][0][e] + c[n][1][e];
                        if constexpr (PACKED) {
                            y += __shfl_xor_sync(0xffffffff, y, 2);
                        } else {
                            y += c[N + n][0][e] + c[N + n][1][e];
                        }
                        y *= factor[n][e % 2];
                        if (a.softcap != 0.0f) {
                            y = tca_softcap(y, a.softcap)*1.44269504f;
                        }
                        x[n][e] = j + g + e/2*8 <= last[n][e % 2] ? y : -INFINITY;
                    }
                }
            }

            bool follow = false;
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    follow |= fmaxf(x[n][e], x[n][e + 2]) > m[n][e] + (LIFT + SLACK);
                }
            }
            if (__any_sync(0xffffffff, follow)) {
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float old[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float largest = fmaxf(x[n][e], x[n][e + 2]);
#pragma unroll
                        for (int o = 4; o < 32; o *= 2) {
                            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, o));
                        }
                        const float m_new = fmaxf(m[n][e], largest - LIFT);
                        old[e] = exp2f(m[n][e] - m_new);
                        m[n][e]  = m_new;
                        l[n][e] *= old[e];
                    }
#pragma unroll
                    for (int b = 0; b < D/16; ++b) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            acc[n][b][e] *= old[e % 2];
                        }
                    }
                }
            }

            uint32_t p[PACKED ? 1 : 2*N][2];  // as V's second operand
#pragma unroll
            for (int n = 0; n < N; ++n) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float p0 = exp2f(x[n][2*e] - m[n][0]), p1 = exp2f(x[n][2*e + 1] - m[n][1]);
                    l[n][0] += p0;
                    l[n][1] += p1;
                    const uint32_t first = split<type>(p0, p1), second = split<type>(p0, p1);
                    if constexpr (PACKED) {
                        p[0][e] = transpose(t < 2 ? first : second);
                    } else {
                        p[n][e]     = transpose(first);
                        p[N + n][e] = transpose(second);
                    }
                }
            }
            const uint32_t tile = ring.tile_v(i) + at_v;
#pragma unroll
            for (int b = 0; b < D/16; ++b) {
                uint32_t operand[4];
                ldmatrix_transposed(operand, tile + 32*b);
#pragma unroll
                for (int n = 0; n < (PACKED ? 1 : 2*N); ++n) {
                    mma<type>(acc[n % N][b], operand, p[n]);
                }
            }
            __syncwarp();  // the tile is free
        }

        // all warps on one maximum
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int o = 4; o < 32; o *= 2) {
                    l[n][e] += __shfl_xor_sync(0xffffffff, l[n][e], o);
                }
                const int r = 8*n + 2*t + e;
                if (g == 0 && r < ROWS) {
                    warp_m[warp][r] = m[n][e];
                    warp_l[warp][r] = l[n][e];
                }
            }
        }
        tca_cp_async_wait<0>();
        __syncthreads();  // the rings are free, too
        float * sums = (float *) smem;  // [WARPS, 8*N, STRIDE]
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int r = (8*n + 2*t + e) % ROWS;
                float largest = TCA_NO_MAX;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    largest = fmaxf(largest, warp_m[w][r]);
                }
                const float weight = exp2f(m[n][e] - largest);
                float * out = sums + (warp*8*N + 8*n + 2*t + e)*STRIDE + g;
#pragma unroll
                for (int b = 0; b < D/16; ++b) {
                    out[16*b]     = acc[n][b][e]*weight;
                    out[16*b + 8] = acc[n][b][e + 2]*weight;
                }
            }
        }
        __syncthreads();
        for (int i = threadIdx.x; i < n_rows*D; i += 32*WARPS) {
            const int r = i/D, e = i % D;
            float x = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                x += sums[(w*8*N + r)*STRIDE + e];
                if constexpr (PACKED) {
                    x += sums[(w*8*N + r + 4)*STRIDE + e];
                }
            }
            const int row = r0 + r;
            float * out = a.dst + (size_t) range.chunk*(D + 2) + (head*a.gqa + row % a.gqa)*a.dst_head + (token0 + row/a.gqa)*a.dst_token;
            out[e] = x;
            if (e == 0) {
                float largest = TCA_NO_MAX, sum = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    largest = fmaxf(largest, warp_m[w][r]);
                }
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    sum = fmaf(exp2f(warp_m[w][r] - largest), warp_l[w][r], sum);
                }
                out[D]     = largest == TCA_NO_MAX ? TCA_NO_MAX : largest*0.69314718f;
                out[D + 1] = sum;
            }
        }
        __syncthreads();
    }
}

template <int D, int ROWS>
static void launch(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    const int smem = step_bytes<D>*tca_decode_steps(step_bytes<D>, tca_decode_arch(ggml_cuda_get_device()));
    if (store.type_k == GGML_TYPE_F16) {
        tca_decode_launch<WARPS>(decode_kernel<D, ROWS, GGML_TYPE_F16>, smem, store, q, stream);
    } else {
        tca_decode_launch<WARPS>(decode_kernel<D, ROWS, GGML_TYPE_BF16>, smem, store, q, stream);
    }
}

template <int D>
static void launch_rows(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    const int rows = q.gqa*((q.n_tokens + store.n_seqs - 1)/store.n_seqs);
    if (rows <= 4) {
        launch<D, 4>(store, q, stream);
    } else if (rows <= 8 || D > 128) {
        launch<D, 8>(store, q, stream);
    } else {
        launch<D, 16>(store, q, stream);
    }
}

void tca_cuda_decode_half(const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream) {
    GGML_ASSERT(store.nb_k == 2*(size_t) head_dim && store.nb_v == 2*(size_t) head_dim);
    tca_with_head_dim(head_dim, [&](auto d) { launch_rows<decltype(d)::value>(store, q, stream); });
}
