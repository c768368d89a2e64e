// Decode over quantized stores: as tca-decode.cu, but unpacking and 4 to 8 products for every value would take longer than reading
// it, so that the products run on the matrix units, and nothing but the arrival of its own bytes makes a warp wait.
//
// A warp takes every 8th tile of 16 slots of the chunk through a ring of its own, with a running softmax: K of a tile beside V of
// the one before, which do not wait for each other.
//   K Q^T   mma.m16n8k32 of bytes: the stored integers as they are, the query rows in two bytes an element (16 bits of the row's
//           largest). Columns are query rows; up to 4 of them, columns 4 to 7 hold the second bytes, with more they are a product
//           of their own.
//   V^T P   mma.m16n8k16 of f16: the stored integers unpacked in registers; the probabilities carry the scales of V.
// Which dimension or slot an element of an operand stands for is free as long as both operands agree: chosen so that a lane reads
// neighbouring bytes, and that the product of K has the slots where that of V needs them.
#include "tca-decode.cuh"

constexpr int WARPS = DECODE_WARPS;
constexpr int TILE  = 16;  // slots

template <ggml_type type>        constexpr int block_bytes = type == GGML_TYPE_Q8_0 ? sizeof(block_q8_0) : sizeof(block_q4_0);
template <ggml_type type, int D> constexpr int row_bytes   = D/32*block_bytes<type>;

// A warp's ring: steps, each with a tile of V and the next of K, q8_0 at most, and room to align the starts down to 16 bytes.
template <int D> constexpr int tile_bytes = TILE*row_bytes<GGML_TYPE_Q8_0, D> + 16;
template <int D> constexpr int step_bytes = tca_decode_step_quantized(D);
template <int D> constexpr int STEPS      = tca_decode_steps(step_bytes<D>, DECODE_ARCH);

// Probabilities are kept 2^LIFT above their value relative to the running maximum, which follows a new one once that is 2^SLACK
// above it: f16 then holds probability times scale of V down to 2^-30 of the largest probability's, and up to a scale of 128.
constexpr float LIFT = 6.0f, SLACK = 3.0f;

static __device__ __forceinline__ void mma_bytes(int * c, const uint32_t * a, const uint32_t * b) {
    TCA_ASM("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void mma_halfs(float * c, const half2 * a, const half2 * b) {
    const uint32_t * y = (const uint32_t *) b;
    tca_mma(c, (const uint32_t *) a, y[0], y[1]);
}

// 8x8 matrix of f16, two elements a lane
static __device__ __forceinline__ half2 transpose(half2 x) {
    uint32_t y;
    TCA_ASM("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(*(const uint32_t *) &x));
    return *(const half2 *) &y;
}

// n words of a row, from an address that is a multiple of 2. Where rows are multiples of 4 bytes long so is `row`, and the compiler
// sees from `offset` whether it is one of 4. lane_offset: a multiple of 4.
template <int n, int ROW>
static __device__ __forceinline__ void load_words(const char * row, int offset, int lane_offset, uint32_t * w) {
    const char * p = row + offset + lane_offset;
    const bool odd = ROW % 4 == 0 ? offset & 2 : (uintptr_t) p & 2;
    const uint32_t * aligned = (const uint32_t *) (odd ? p - 2 : p);
    uint32_t x[n + 1];
#pragma unroll
    for (int i = 0; i < n; ++i) {
        x[i] = aligned[i];
    }
    x[n] = odd ? ((const uint16_t *) aligned)[2*n] : 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
        w[i] = odd ? __funnelshift_r(x[i], x[i + 1], 16) : x[i];
    }
}

// K: the 8 elements of block b of a row that lane t of 4 takes, as signed bytes, of q4_0 times 16; element e stands for dim key_dim(t, e).
template <ggml_type type, int D>
static __device__ __forceinline__ void key_bytes(const char * row, int b, int t, uint32_t * w) {
    constexpr int ROW = row_bytes<type, D>;
    if constexpr (type == GGML_TYPE_Q8_0) {
        load_words<2, ROW>(row, b*block_bytes<type> + 2, 8*t, w);
    } else {
        uint32_t u;
        load_words<1, ROW>(row, b*block_bytes<type> + 2, 4*t, &u);
        w[0] = ((u << 4) & 0xf0f0f0f0u) ^ 0x80808080u;
        w[1] = ( u       & 0xf0f0f0f0u) ^ 0x80808080u;
    }
}

template <ggml_type type> constexpr float key_unit = type == GGML_TYPE_Q8_0 ? 1.0f : 1.0f/16.0f;

template <ggml_type type>
static __device__ __forceinline__ int key_dim(int t, int e) {
    return type == GGML_TYPE_Q8_0 ? 8*t + e : e < 4 ? 4*t + e : 16 + 4*t + e - 4;
}

// V: the 4 elements of block b of a row that lane g of 8 takes, as bytes without sign.
template <ggml_type type, int D>
static __device__ __forceinline__ uint32_t value_bytes(const char * row, int b, int g) {
    constexpr int ROW = row_bytes<type, D>;
    if constexpr (type == GGML_TYPE_Q8_0) {
        uint32_t u;
        load_words<1, ROW>(row, b*block_bytes<type> + 2, 4*g, &u);
        return u ^ 0x80808080u;
    } else {
        const uint32_t u = *(const uint16_t *) (row + b*block_bytes<type> + 2 + 2*g);
        return (u & 0x0f0fu) | ((u & 0xf0f0u) << 12);
    }
}

template <ggml_type type>
static __device__ __forceinline__ int value_dim(int g, int e) {
    return type == GGML_TYPE_Q8_0 ? 4*g + e : e < 2 ? 2*g + e : 16 + 2*g + e - 2;
}

template <ggml_type type>
static __device__ __forceinline__ half2 zero_point() {
    return __float2half2_rn(type == GGML_TYPE_Q8_0 ? 1024.0f + 128.0f : 1024.0f + 8.0f);
}

// f(type) for q8_0 or q4_0
template <typename F>
static void with_type(int type, F && f) {
    if (type == GGML_TYPE_Q8_0) {
        f(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>());
    } else {
        f(std::integral_constant<ggml_type, GGML_TYPE_Q4_0>());
    }
}

// Tiles of one warp. Step i brings tile i of K and tile i - 1 of V; all functions are called by the whole warp.
template <int D>
struct warp_ring {
    static constexpr int STEPS = ::STEPS<D>;

    const char * k, * v;          // of the chunk's first slot
    int      n_slots, warp;
    uint32_t tiles;               // address in shared memory

    __device__ __forceinline__ warp_ring(const tca_store & s, const tca_decode_range & range, const char * smem)
        : k(s.k + range.slot0*s.nb_k), v(s.v + range.slot0*s.nb_v),
          n_slots(__shfl_sync(0xffffffff, range.n_slots, 0)),  // so that the compiler knows it to be one value for the warp
          warp(__shfl_sync(0xffffffff, threadIdx.x/32, 0)),
          tiles(tca_smem(smem) + warp*STEPS*2*tile_bytes<D>) {}

    // first slot of the warp's tile i
    __device__ __forceinline__ int slot(int i) const {
        return (i*WARPS + warp)*TILE;
    }

    // Up to 15 bytes behind the tile come along: behind a tensor of quantized rows the backend leaves room for that.
    template <int row>
    __device__ __forceinline__ void copy(uint32_t to, const char * base, int i) const {
        const int j = slot(i);
        if (i >= 0 && j < n_slots) {
            const char * start = base + j*row;
            const int    shift = (int) (uintptr_t) start & 15, at = threadIdx.x % 32*16;
            const int    bytes = shift + min(TILE, n_slots - j)*row;
#pragma unroll
            for (int b = 0; b < TILE*row + 15; b += 512) {
                tca_cp_async_if(at + b < bytes, to + at + b, start - shift + at + b);
            }
        }
    }

    __device__ __forceinline__ uint32_t tile_k(int step) const { return tiles +  step % STEPS*2     *tile_bytes<D>; }
    __device__ __forceinline__ uint32_t tile_v(int step) const { return tiles + (step % STEPS*2 + 1)*tile_bytes<D>; }

    template <int row_k, int row_v>
    __device__ __forceinline__ void send(int step) const {
        copy<row_k>(tile_k(step), k, step);
        copy<row_v>(tile_v(step), v, step - 1);
        tca_cp_async_commit();
    }

    // Waits for a step that STEPS - 1 others were sent after.
    __device__ __forceinline__ void wait() const {
        tca_cp_async_wait<STEPS - 1>();
        __syncwarp();
    }

    // First row of a tile that has come.
    __device__ __forceinline__ const char * rows_k(int step, int row) const {
        return (const char *) __cvta_shared_to_generic(tile_k(step) + ((uint32_t) (uintptr_t) (k + slot(step)*row) & 15));
    }
    __device__ __forceinline__ const char * rows_v(int step, int row) const {
        return (const char *) __cvta_shared_to_generic(tile_v(step) + ((uint32_t) (uintptr_t) (v + slot(step - 1)*row) & 15));
    }

    // Asks the L2 cache for the first tiles; allowed before what they depend on has finished.
    __device__ __forceinline__ void prefetch(int row_k, int row_v) const {
#pragma unroll
        for (int i = 0; i < STEPS; ++i) {
            const int j = slot(i), at = threadIdx.x % 32*128, rows = min(TILE, n_slots - j);
            if (at < rows*row_k) {
                TCA_ASM("prefetch.global.L2 [%0];" :: "l"(k + j*row_k + at));
            }
            if (i < STEPS - 1 && at < rows*row_v) {
                TCA_ASM("prefetch.global.L2 [%0];" :: "l"(v + j*row_v + at));
            }
        }
    }
};

// Query rows in two signed bytes an element, the second 1/254 of the first: bytes [8, D + 16], row r in rows r and r + 4, or with
// PARTS 2 [2, 8, D + 16]. One warp a row. unit[r]: what the first byte's 1 stands for.
template <int D, int ROWS>
struct query_bytes {
    static constexpr int PARTS = ROWS == 8 ? 2 : 1, STRIDE = D + 16;
    __align__(4) int8_t bytes[PARTS*8*STRIDE];
    float unit[ROWS];

    __device__ __forceinline__ void set(int r, const float * q) {
        const int lane = threadIdx.x % 32;
        float x[D/32], largest = 0.0f;
#pragma unroll
        for (int i = 0; i < D/32; ++i) {
            x[i] = q[lane + 32*i];
            largest = fmaxf(largest, fabsf(x[i]));
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, o));
        }
        const float inverse = largest > 0.0f ? 127.0f/largest : 0.0f;
#pragma unroll
        for (int i = 0; i < D/32; ++i) {
            const float first = rintf(x[i]*inverse);
            bytes[r*STRIDE + lane + 32*i] = (int8_t) first;
            bytes[(PARTS == 1 ? r + 4 : r + 8)*STRIDE + lane + 32*i] = (int8_t) rintf((x[i]*inverse - first)*254.0f);
        }
        if (lane == 0) {
            unit[r] = largest/127.0f;
        }
    }
};

// grid: rounds of thread blocks (tca_decode_rounds)
template <int D, int ROWS, ggml_type type_k, ggml_type type_v>
static __global__ void __launch_bounds__(32*WARPS, tca_decode_per_sm_quantized(D)) decode_kernel(const tca_store s, const tca_queries a) {
    static_assert(D % 32 == 0 && (ROWS == 4 || ROWS == 8), "shape");
    constexpr int PARTS = query_bytes<D, ROWS>::PARTS;  // products of K: the two bytes of a query's element are columns of one, or one each
    constexpr int ROW_K = row_bytes<type_k, D>, ROW_V = row_bytes<type_v, D>;
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(16) char smem[];
    __shared__ tca_decode_result<D, ROWS> result;
    __shared__ query_bytes<D, ROWS> queries;
    __shared__ float warp_m[WARPS][ROWS], warp_l[WARPS][ROWS];

    __shared__ tca_decode_range range;
    if (threadIdx.x < 32) {
        range.set(s, a);
    }
    __syncthreads();
    const warp_ring<D> ring(s, range, smem);
    if (!range.empty) {
        ring.prefetch(ROW_K, ROW_V);
    }
    ggml_cuda_pdl_sync();  // before it only the descriptor was read, which is an input of the graph
    if (range.empty) {
        return;
    }

    const int warp = ring.warp, g = threadIdx.x % 32/4, t = threadIdx.x % 4;
    const int32_t * d = range.d;
    const int head = range.head, count = d[TCA_DESC_COUNT], past = d[TCA_DESC_PAST];
    const int n_tiles = max(0, ((ring.n_slots + TILE - 1)/TILE - warp + WARPS - 1)/WARPS);  // of this warp
    // slots of a tile that are rows g and g + 8 of K's product, columns 2t, 2t + 1, 2t + 8 and 2t + 9 of V's operand
    const int slot_k = g/2*4 + g % 2, slot_v = 4*t;

    for (int r0 = 0; r0 < count*a.gqa; r0 += ROWS) {
        const int n_rows = min(ROWS, count*a.gqa - r0);
#pragma unroll
        for (int step = 0; step < STEPS<D> - 1; ++step) {
            ring.template send<ROW_K, ROW_V>(step);
        }
        if (warp < ROWS) {
            const int row = r0 + min(warp, n_rows - 1);
            queries.set(warp, a.q + (head*a.gqa + row % a.gqa)*a.q_head + (d[TCA_DESC_TOKEN] + row/a.gqa)*a.q_token);
        }
        __syncthreads();

        float acc[D/16][4];
#pragma unroll
        for (int n = 0; n < D/16; ++n) {
            acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
        }
        // of the query rows 2t and 2t + 1 (mod ROWS): running maximum less LIFT, this lane's share of the sum
        float m[2] = { TCA_NO_MAX, TCA_NO_MAX }, l[2] = { 0.0f, 0.0f };

        uint32_t q[PARTS][D/32][2];  // column g
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
#pragma unroll
            for (int b = 0; b < D/32; ++b) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    q[p][b][e] = *(const uint32_t *) (queries.bytes + (p*8 + g)*queries.STRIDE + 32*b + key_dim<type_k>(t, 4*e));
                }
            }
        }
        float factor[2];  // of the columns 2t and 2t + 1: what a product of bytes times the scale of K is to be multiplied with
        int   last[2];    // last slot of the chunk that the rows see
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = (2*t + e) % ROWS;
            factor[e] = queries.unit[r]*key_unit<type_k>*a.scale*(2*t + e < ROWS ? 1.0f : 1.0f/254.0f);
            last[e]   = min(ring.n_slots - 1, past - range.j0 + (count > 1 ? (r0 + r)/a.gqa : 0));
        }

        float x[4];  // scores: slots slot_k and slot_k + 2, query rows 2t and 2t + 1
        const auto product_k = [&](int i) {
            const char * tile = ring.rows_k(i, ROW_K);
            const int    j = ring.slot(i), rows = min(TILE, ring.n_slots - j);
            const char * row[2] = { tile + min(slot_k, rows - 1)*ROW_K, tile + min(slot_k + 2, rows - 1)*ROW_K };
            float sum[PARTS][4] = {};
#pragma unroll
            for (int b = 0; b < D/32; ++b) {
                uint32_t w[2][2], operand[4];
                float scale[2];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    key_bytes<type_k, D>(row[r], b, t, w[r]);
                    scale[r] = __half2float(*(const half *) (row[r] + b*block_bytes<type_k>));
                    operand[r]     = w[r][0];
                    operand[r + 2] = w[r][1];
                }
#pragma unroll
                for (int p = 0; p < PARTS; ++p) {
                    int c[4] = { 0, 0, 0, 0 };
                    mma_bytes(c, operand, q[p][b]);
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        sum[p][e] = fmaf(scale[e/2], (float) c[e], sum[p][e]);
                    }
                }
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if constexpr (PARTS == 1) {
                    x[e]  = sum[0][e]*factor[e % 2];
                    x[e] += __shfl_xor_sync(0xffffffff, x[e], 2);
                } else {
                    x[e] = fmaf(sum[PARTS - 1][e], 1.0f/254.0f, sum[0][e])*factor[e % 2];
                }
                if (a.softcap != 0.0f) {
                    x[e] = tca_softcap(x[e], a.softcap);
                }
                x[e] = j + slot_k + e/2*2 <= last[e % 2] ? x[e]*1.44269504f : -INFINITY;
            }
        };

        half2 p[2];  // probabilities of a tile as V's second operand
        const auto softmax = [&]() {
            if (__any_sync(0xffffffff, fmaxf(x[0], x[2]) > m[0] + (LIFT + SLACK) || fmaxf(x[1], x[3]) > m[1] + (LIFT + SLACK))) {
                float old[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float largest = fmaxf(x[e], x[e + 2]);
#pragma unroll
                    for (int o = 4; o < 32; o *= 2) {
                        largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, o));
                    }
                    const float m_new = fmaxf(m[e], largest - LIFT);
                    old[e] = exp2f(m[e] - m_new);
                    m[e]   = m_new;
                    l[e]  *= old[e];
                }
#pragma unroll
                for (int n = 0; n < D/16; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        acc[n][e] *= old[e % 2];
                    }
                }
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float p0 = exp2f(x[2*e] - m[0]), p1 = exp2f(x[2*e + 1] - m[1]);
                l[0] += p0;
                l[1] += p1;
                p[e]  = transpose(__floats2half2_rn(p0, p1));
            }
        };

        const auto product_v = [&](int step) {
            const char * tile = ring.rows_v(step, ROW_V);
            const int    rows = min(TILE, ring.n_slots - ring.slot(step - 1));
            const char * row[4];  // behind the end the last one again, of probability 0
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                row[e] = tile + min(slot_v + e, rows - 1)*ROW_V;
            }
#pragma unroll
            for (int n = 0; n < D/32; ++n) {
                uint32_t w[4];
                half     scale[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    w[e]     = value_bytes<type_v, D>(row[e], n, g);
                    scale[e] = *(const half *) (row[e] + n*block_bytes<type_v>);
                }
                half2 operand[2][4];  // [tile of 16 dims][a0, a1, a2, a3]
                half2 scaled[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const uint32_t lo = __byte_perm(w[2*e], w[2*e + 1], 0x5140);  // elements 0 and 1 of both slots
                    const uint32_t hi = __byte_perm(w[2*e], w[2*e + 1], 0x7362);
                    operand[0][2*e]     = __hsub2(tca_bytes_lo(lo), zero_point<type_v>());
                    operand[0][2*e + 1] = __hsub2(tca_bytes_hi(lo), zero_point<type_v>());
                    operand[1][2*e]     = __hsub2(tca_bytes_lo(hi), zero_point<type_v>());
                    operand[1][2*e + 1] = __hsub2(tca_bytes_hi(hi), zero_point<type_v>());
                    scaled[e] = __hmul2(p[e], __halves2half2(scale[2*e], scale[2*e + 1]));
                }
                mma_halfs(acc[2*n],     operand[0], scaled);
                mma_halfs(acc[2*n + 1], operand[1], scaled);
            }
        };

        if (n_tiles > 0) {
            ring.template send<ROW_K, ROW_V>(STEPS<D> - 1);
            ring.wait();
            product_k(0);
            softmax();
            for (int i = 1; i < n_tiles; ++i) {
                __syncwarp();
                ring.template send<ROW_K, ROW_V>(i + STEPS<D> - 1);
                ring.wait();
                product_k(i);  // beside the product of V, which does not depend on it
                product_v(i);
                softmax();
            }
            __syncwarp();
            ring.template send<ROW_K, ROW_V>(n_tiles + STEPS<D> - 1);
            ring.wait();
            product_v(n_tiles);
        }

        // all warps on one maximum
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int o = 4; o < 32; o *= 2) {
                l[e] += __shfl_xor_sync(0xffffffff, l[e], o);
            }
            if (g == 0 && 2*t + e < ROWS) {
                warp_m[warp][2*t + e] = m[e];
                warp_l[warp][2*t + e] = l[e];
            }
        }
        tca_cp_async_wait<0>();
        __syncthreads();  // the rings are free, too
        float weight[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int r = (2*t + e) % ROWS;
            float largest = TCA_NO_MAX, sum = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                largest = fmaxf(largest, warp_m[w][r]);
            }
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                sum = fmaf(exp2f(warp_m[w][r] - largest), warp_l[w][r], sum);
            }
            weight[e] = exp2f(m[e] - largest);
            if (warp == 0 && g == 0) {
                result.m[r] = largest;
                result.l[r] = sum;
            }
        }

        constexpr int PART = tca_decode_part<D, ROWS>;
        static_assert(WARPS*PART*D*(int) sizeof(float) <= step_bytes<D>, "shared memory");
        float * sums = (float *) smem;  // [WARPS, PART, D]
#pragma unroll
        for (int part = 0; part < ROWS; part += PART) {
#pragma unroll
            for (int n = 0; n < D/16; ++n) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int r = 2*t + e % 2 - part;
                    if (r >= 0 && r < PART && r + part < ROWS) {
                        sums[(warp*PART + r)*D + n/2*32 + value_dim<type_v>(g, n % 2*2 + e/2)] = acc[n][e]*weight[e % 2];
                    }
                }
            }
            tca_decode_gather<D, ROWS>(sums, part, result);
        }
        tca_decode_write<D, ROWS>(a, range, result, r0, n_rows);
    }
}

template <int D, int ROWS>
static void launch(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    const int smem = step_bytes<D>*tca_decode_steps(step_bytes<D>, tca_decode_arch(ggml_cuda_get_device()));
    with_type(store.type_k, [&](auto type_k) {
        with_type(store.type_v, [&](auto type_v) {
            tca_decode_launch<WARPS>(decode_kernel<D, ROWS, decltype(type_k)::value, decltype(type_v)::value>, smem, store, q, stream);
        });
    });
}

template <int D>
static void launch_rows(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    if (q.gqa*((q.n_tokens + store.n_seqs - 1)/store.n_seqs) <= 4) {
        launch<D, 4>(store, q, stream);
    } else {
        launch<D, 8>(store, q, stream);
    }
}

void tca_cuda_decode_quantized(const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream) {
    GGML_ASSERT(store.nb_k == ggml_row_size((ggml_type) store.type_k, head_dim) && store.nb_v == ggml_row_size((ggml_type) store.type_v, head_dim));
    switch (head_dim) {
        case 64:  launch_rows<64> (store, q, stream); break;
        case 96:  launch_rows<96> (store, q, stream); break;
        case 128: launch_rows<128>(store, q, stream); break;
        case 256: launch_rows<256>(store, q, stream); break;
        default:  GGML_ABORT("tca: head size %d", head_dim);
    }
}
