// Decode over quantized stores: as tca-decode.cu, but the products run on the matrix units, since unpacking and 4 to 8 products
// for every value would take longer than reading it. mma.sync m16n8k16 with K or V as the 16-row operand, its values unpacked
// in registers straight from the stored bytes, and the query rows as the 8 columns. Up to 4 query rows, columns 4 to 7 hold what
// f16 rounding cut off the queries and probabilities, so that they enter with 22 bits.
//
// Which dimension or slot a lane's element stands for is free as long as both operands agree: chosen so that a lane reads
// neighbouring bytes.
#include "tca-decode.cuh"

constexpr int WARPS = DECODE_WARPS;

static __device__ __forceinline__ void mma(float * c, const half2 * a, const half2 * b) {
    const uint32_t * x = (const uint32_t *) a, * y = (const uint32_t *) b;
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
}

// 4 bytes from a multiple of 2
static __device__ __forceinline__ uint32_t load4_bytes(const char * p) {
    const uint32_t * aligned = (const uint32_t *) ((uintptr_t) p & ~(uintptr_t) 3);
    return (uintptr_t) p & 2 ? __funnelshift_r(aligned[0], aligned[1], 16) : aligned[0];
}

template <ggml_type type> constexpr int block_bytes = type == GGML_TYPE_Q8_0 ? 34 : 18;

template <ggml_type type>
static __device__ __forceinline__ half2 zero_point() {
    return __float2half2_rn(type == GGML_TYPE_Q8_0 ? 1024.0f + 128.0f : 1024.0f + 8.0f);
}

// K: the 8 elements of a 32-element block that lane t of 4 takes, as bytes without sign; element e stands for dim key_dim(t, e).
template <ggml_type type>
static __device__ __forceinline__ void key_bytes(const char * block, int t, uint32_t * w) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        tca_load8_bytes(block + 2 + 8*t, w);
        w[0] ^= 0x80808080u;
        w[1] ^= 0x80808080u;
    } else {
        const uint32_t u = load4_bytes(block + 2 + 4*t);
        w[0] = u & 0x0f0f0f0fu;
        w[1] = (u >> 4) & 0x0f0f0f0fu;
    }
}

template <ggml_type type>
static __device__ __forceinline__ int key_dim(int t, int e) {
    return type == GGML_TYPE_Q8_0 ? 8*t + e : e < 4 ? 4*t + e : 16 + 4*t + e - 4;
}

// V: the 4 elements of a block that lane g of 8 takes.
template <ggml_type type>
static __device__ __forceinline__ uint32_t value_bytes(const char * block, int g) {
    if constexpr (type == GGML_TYPE_Q8_0) {
        return load4_bytes(block + 2 + 4*g) ^ 0x80808080u;
    } else {
        const uint32_t u = *(const uint16_t *) (block + 2 + 2*g);
        return (u & 0x0f0fu) | ((u & 0xf0f0u) << 12);
    }
}

template <ggml_type type>
static __device__ __forceinline__ int value_dim(int g, int e) {
    return type == GGML_TYPE_Q8_0 ? 4*g + e : e < 2 ? 2*g + e : 16 + 2*g + e - 2;
}

// f(type) for q8_0 or q4_0
template <typename F>
static __device__ __forceinline__ void with_type(int type, F && f) {
    if (type == GGML_TYPE_Q8_0) {
        f(std::integral_constant<ggml_type, GGML_TYPE_Q8_0>());
    } else {
        f(std::integral_constant<ggml_type, GGML_TYPE_Q4_0>());
    }
}

// High part of x as f16 for columns 0 to 3, the rest of it for columns 4 to 7; all of it if there are 8 rows.
template <int ROWS>
static __device__ __forceinline__ half split(float x, int column) {
    const half hi = __float2half_rn(x);
    return ROWS == 8 || column < 4 ? hi : __float2half_rn(x - __half2float(hi));
}

// grid: rounds of thread blocks (tca_decode_rounds)
template <int D, int ROWS>
static __global__ void __launch_bounds__(32*WARPS, tca_decode_per_sm(D, ROWS)) decode_kernel(const tca_store s, const tca_queries a) {
    static_assert(D % 32 == 0 && (ROWS == 4 || ROWS == 8), "shape");
    ggml_cuda_pdl_lc();
    extern __shared__ __align__(16) char smem[];
    __shared__ tca_decode_result<D, ROWS> result;
    float * scores = (float *) (smem + DECODE_STAGES*DECODE_STAGE);  // [slots, ROWS], log2 units, then probabilities

    __shared__ tca_decode_range range;
    __shared__ tca_decode_ring  ring;
    if (threadIdx.x < 32) {
        range.set(s, a);
        __syncwarp();
        if (threadIdx.x == 0) {
            ring.set(s, range, 16);
        }
    }
    __syncthreads();
    ggml_cuda_pdl_sync();  // before it only the descriptor was read, which is an input of the graph
    if (range.empty) {
        return;
    }

    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int g = lane/4, t = lane % 4;
    const int column = g % ROWS;  // query row of this lane's column
    const int32_t * d = range.d;
    const int head = range.head, count = d[TCA_DESC_COUNT], past = d[TCA_DESC_PAST];

    for (int r0 = 0; r0 < count*a.gqa; r0 += ROWS) {
        const int n_rows = min(ROWS, count*a.gqa - r0);
        ring.start(s, smem);

        with_type(s.type_k, [&](auto tag) {
            constexpr ggml_type type = decltype(tag)::value;
            half2 q[D/16][2];
            const float * q_row = a.q + (head*a.gqa + (r0 + min(column, n_rows - 1)) % a.gqa)*a.q_head +
                (d[TCA_DESC_TOKEN] + (r0 + min(column, n_rows - 1))/a.gqa)*a.q_token;
#pragma unroll
            for (int b = 0; b < D/32; ++b) {
#pragma unroll
                for (int e = 0; e < 8; e += 2) {
                    const float * x = q_row + 32*b + key_dim<type>(t, e);
                    q[2*b + e/4][e/2 % 2] = __halves2half2(split<ROWS>(x[0], g), split<ROWS>(x[1], g));
                }
            }
            for (int i = 0; i < ring.tiles_k; ++i) {
                const char * tile = ring.next(s, smem, i);
                const int    rows = ring.rows(i);
                for (int j = warp*16; j < rows; j += 16*WARPS) {
                    // rows g and g + 8 of the product: slots in an order that spreads the reads over the banks
                    const int slot = j + g%4*4 + g/4;
                    const char * row[2] = { tile + min(slot, rows - 1)*(int) s.nb_k, tile + min(slot + 2, rows - 1)*(int) s.nb_k };
                    float sum[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
#pragma unroll
                    for (int b = 0; b < D/32; ++b) {
                        half2 x[2][4];  // [k step][a0, a1, a2, a3]
                        float scale[2];
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            const char * block = row[r] + b*block_bytes<type>;
                            uint32_t w[2];
                            key_bytes<type>(block, t, w);
                            scale[r] = __half2float(*(const half *) block);
#pragma unroll
                            for (int k = 0; k < 2; ++k) {
                                x[k][r]     = __hsub2(tca_bytes_lo(w[k]), zero_point<type>());
                                x[k][r + 2] = __hsub2(tca_bytes_hi(w[k]), zero_point<type>());
                            }
                        }
                        float c[4] = { 0.0f, 0.0f, 0.0f, 0.0f };
                        mma(c, x[0], q[2*b]);
                        mma(c, x[1], q[2*b + 1]);
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            sum[e] = fmaf(scale[e/2], c[e], sum[e]);
                        }
                    }
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        if (ROWS == 4) {
                            sum[e] += __shfl_xor_sync(0xffffffff, sum[e], 2);
                        }
                        const int r = 2*t + e%2, at = slot + e/2*2;
                        if (r < ROWS && at < rows) {
                            float x = sum[e]*a.scale;
                            if (a.softcap != 0.0f) {
                                x = tca_softcap(x, a.softcap);
                            }
                            const bool visible = range.j0 + i*ring.rows_k + at <= past + (count > 1 ? (r0 + r)/a.gqa : 0);
                            scores[(i*ring.rows_k + at)*ROWS + r] = visible ? x*1.44269504f : -INFINITY;
                        }
                    }
                }
            }
        });
        __syncthreads();

        tca_decode_softmax<D, ROWS>(scores, range.n_slots, result);

        with_type(s.type_v, [&](auto tag) {
            constexpr ggml_type type = decltype(tag)::value;
            float acc[D/16][4];
#pragma unroll
            for (int n = 0; n < D/16; ++n) {
                acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
            }
            for (int i = ring.tiles_k; i < ring.tiles; ++i) {
                const char * tile = ring.next(s, smem, i);
                const int    rows = ring.rows(i);
                for (int j = warp*16; j < rows; j += 16*WARPS) {
                    // columns of V^T: slots 4t to 4t + 3; rows behind the end have probability 0 and repeat the last one
                    const float * p = scores + ((i - ring.tiles_k)*ring.rows_v + j + 4*t)*ROWS + column;
                    half2 b[2];
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float p0 = j + 4*t + 2*e     < rows ? p[2*e*ROWS]       : 0.0f;
                        const float p1 = j + 4*t + 2*e + 1 < rows ? p[(2*e + 1)*ROWS] : 0.0f;
                        b[e] = __halves2half2(split<ROWS>(p0, g), split<ROWS>(p1, g));
                    }
                    const char * row[4];
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        row[e] = tile + min(j + 4*t + e, rows - 1)*(int) s.nb_v;
                    }
#pragma unroll
                    for (int n = 0; n < D/32; ++n) {
                        uint32_t w[4];
                        half     scale[4];
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const char * block = row[e] + n*block_bytes<type>;
                            w[e]     = value_bytes<type>(block, g);
                            scale[e] = *(const half *) block;
                        }
                        half2 x[2][4];  // [tile of 16 dims][a0, a1, a2, a3]
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const half2    sc = __halves2half2(scale[2*e], scale[2*e + 1]);
                            const uint32_t lo = __byte_perm(w[2*e], w[2*e + 1], 0x5140);  // elements 0 and 1 of both slots
                            const uint32_t hi = __byte_perm(w[2*e], w[2*e + 1], 0x7362);
                            x[0][2*e]     = __hmul2(__hsub2(tca_bytes_lo(lo), zero_point<type>()), sc);
                            x[0][2*e + 1] = __hmul2(__hsub2(tca_bytes_hi(lo), zero_point<type>()), sc);
                            x[1][2*e]     = __hmul2(__hsub2(tca_bytes_lo(hi), zero_point<type>()), sc);
                            x[1][2*e + 1] = __hmul2(__hsub2(tca_bytes_hi(hi), zero_point<type>()), sc);
                        }
                        mma(acc[2*n],     x[0], b);
                        mma(acc[2*n + 1], x[1], b);
                    }
                }
            }
            ring.finish();

            constexpr int PART = tca_decode_part<D, ROWS>;
            float * sums = (float *) smem;  // [WARPS, PART, D]
#pragma unroll
            for (int part = 0; part < ROWS; part += PART) {
#pragma unroll
                for (int n = 0; n < D/16; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float x = acc[n][e];
                        if (ROWS == 4) {
                            x += __shfl_xor_sync(0xffffffff, x, 2);
                        }
                        const int r = 2*t + e%2 - part;
                        if (r >= 0 && r < PART && r + part < ROWS) {
                            sums[(warp*PART + r)*D + n/2*32 + value_dim<type>(g, n%2*2 + e/2)] = x;
                        }
                    }
                }
                tca_decode_gather<D, ROWS>(sums, part, result);
            }
        });
        tca_decode_write<D, ROWS>(a, range, result, r0, n_rows);
    }
}

template <int D, int ROWS>
static void launch(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    tca_decode_launch(decode_kernel<D, ROWS>, ROWS, store, q, stream);
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
    switch (head_dim) {
        case 64:  launch_rows<64> (store, q, stream); break;
        case 96:  launch_rows<96> (store, q, stream); break;
        case 128: launch_rows<128>(store, q, stream); break;
        case 256: launch_rows<256>(store, q, stream); break;
        default:  GGML_ABORT("tca: head size %d", head_dim);
    }
}
