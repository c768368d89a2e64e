// Decode: a few query rows over long regions. One block takes one chunk of TCA_ATTN_CHUNK slots of one region and reads its K
// and V rows once for all rows of the group; then one pass combines the chunks. Bound by the memory's speed: the bytes of K and
// V go through shared memory in a ring of tiles that is always ahead of the arithmetic, whatever the type.
#include "tca-kernels.cuh"

constexpr int WARPS  = 8;
constexpr int STAGES = 3;
constexpr int STAGE  = 128*136 + 16;  // 128 rows of q8_0 x 128, and room to align the start down to 16 bytes

// rows: at most ROWS query rows of a KV head at a time; grid (n_chunks, n_head_kv, n_seqs)
template <int D, int ROWS>
static __global__ void __launch_bounds__(32*WARPS, ROWS <= 4 ? 3 : 2) decode_kernel(const tca_store s, const tca_queries a) {
    constexpr int LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32;  // lanes that share a row, 8 elements each
    constexpr int STEP  = WARPS*(32/LANES);                  // rows that the block takes at once

    extern __shared__ __align__(16) char smem[];
    char  * stages = smem;
    float * scores = (float *) (smem + STAGES*STAGE);        // [TCA_ATTN_CHUNK, ROWS], log2 units, then probabilities

    const int chunk = blockIdx.x, head = blockIdx.y, seq = blockIdx.z;
    const int32_t * d = tca_region(s, seq, head);
    const int used = d[TCA_DESC_USED], count = d[TCA_DESC_COUNT];
    const int j0   = chunk*TCA_ATTN_CHUNK;
    if (count == 0 || j0 >= used) {
        return;
    }
    const int n_slots = min(TCA_ATTN_CHUNK, used - j0);
    const int past    = d[TCA_DESC_PAST];
    const int64_t slot0 = (int64_t) d[TCA_DESC_OFFSET] + j0;

    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int sub = lane / LANES, part = lane % LANES;
    const bool active = part*8 < D;

    const int rows_k  = min(128, (STAGE - 16)/(int) s.nb_k)/STEP*STEP;
    const int rows_v  = min(128, (STAGE - 16)/(int) s.nb_v)/STEP*STEP;
    const int tiles_k = (n_slots + rows_k - 1)/rows_k;
    const int tiles_v = (n_slots + rows_v - 1)/rows_v;

    const auto tile_start = [&](int i) {
        return i < tiles_k ? s.k + (slot0 + i*rows_k)*s.nb_k : s.v + (slot0 + (i - tiles_k)*rows_v)*s.nb_v;
    };
    const auto issue = [&](int i) {
        if (i < tiles_k + tiles_v) {
            const char * start = tile_start(i);
            const int    shift = (int) ((uintptr_t) start & 15);
            const char * end   = i < tiles_k ? s.k_end : s.v_end;
            const int    rows  = i < tiles_k ? min(rows_k, n_slots - i*rows_k) : min(rows_v, n_slots - (i - tiles_k)*rows_v);
            const int    bytes = shift + rows*(int) (i < tiles_k ? s.nb_k : s.nb_v);
            const uint32_t to  = tca_smem(stages + (i % STAGES)*STAGE);
            for (int b = tid*16; b < bytes; b += 32*WARPS*16) {
                const char * from = start - shift + b;
                tca_cp_async(to + b, from, (int) min((int64_t) 16, (int64_t) (end - from)));
            }
        }
        tca_cp_async_commit();
    };

    for (int r0 = 0; r0 < count*a.gqa; r0 += ROWS) {
        const int n_rows = min(ROWS, count*a.gqa - r0);

        __syncthreads();  // the stages of the last round are free
#pragma unroll
        for (int i = 0; i < STAGES - 1; ++i) {
            issue(i);
        }

        float acc[ROWS][8];  // first the queries, then the output
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const bool valid = active && r < n_rows;
            const float * q = a.q + (head*a.gqa + (r0 + r) % a.gqa)*a.q_head + (d[TCA_DESC_TOKEN] + (r0 + r)/a.gqa)*a.q_token + part*8;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                acc[r][e] = valid ? q[e] : 0.0f;
            }
        }

        for (int i = 0; i < tiles_k; ++i) {
            tca_cp_async_wait<STAGES - 2>();
            __syncthreads();
            issue(i + STAGES - 1);
            const char * tile = stages + (i % STAGES)*STAGE + ((uintptr_t) tile_start(i) & 15);
            const int    rows = min(rows_k, n_slots - i*rows_k);
            tca_with_type(s.type_k, [&](auto tag) {
                constexpr ggml_type type = decltype(tag)::value;
#pragma unroll 2
                for (int j = warp*(32/LANES) + sub; j - sub < rows; j += STEP) {
                    float x[8], sum[ROWS];
                    float scale = 0.0f;
                    if (active && j < rows) {
                        scale = tca_load8_scaled<type>(tile + j*(int) s.nb_k, part, x);
                    } else {
#pragma unroll
                        for (int e = 0; e < 8; ++e) {
                            x[e] = 0.0f;
                        }
                    }
#pragma unroll
                    for (int r = 0; r < ROWS; ++r) {
                        float t = 0.0f;
#pragma unroll
                        for (int e = 0; e < 8; ++e) {
                            t = fmaf(x[e], acc[r][e], t);
                        }
                        sum[r] = t*scale;
                    }
                    // sums over the lanes of the row; each halving also halves the rows a lane keeps
                    int row = 0, o = LANES/2;
#pragma unroll
                    for (int n = ROWS/2; n >= 1; n /= 2, o /= 2) {
                        const bool upper = part & o;
                        row += upper ? n : 0;
#pragma unroll
                        for (int r = 0; r < n; ++r) {
                            const float give = upper ? sum[r] : sum[r + n];
                            const float keep = upper ? sum[r + n] : sum[r];
                            sum[r] = keep + __shfl_xor_sync(0xffffffff, give, o);
                        }
                    }
#pragma unroll
                    for (; o >= 1; o /= 2) {
                        sum[0] += __shfl_xor_sync(0xffffffff, sum[0], o);
                    }
                    if (part % (LANES/ROWS) == 0 && j < rows) {
                        const int slot = i*rows_k + j;
                        float x2 = sum[0]*a.scale;
                        if (a.softcap != 0.0f) {
                            x2 = tca_softcap(x2, a.softcap);
                        }
                        scores[slot*ROWS + row] = j0 + slot <= past + (r0 + row)/a.gqa ? x2*1.44269504f : -INFINITY;
                    }
                }
            });
        }
        __syncthreads();

        float * out = a.dst + chunk*(D + 2);
        for (int r = warp; r < ROWS; r += WARPS) {
            float m = TCA_NO_MAX;
            for (int j = lane; j < n_slots; j += 32) {
                m = fmaxf(m, scores[j*ROWS + r]);
            }
#pragma unroll
            for (int o = 16; o > 0; o >>= 1) {
                m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, o));
            }
            float l = 0.0f;
            for (int j = lane; j < n_slots; j += 32) {
                const float p = exp2f(scores[j*ROWS + r] - m);
                scores[j*ROWS + r] = p;
                l += p;
            }
#pragma unroll
            for (int o = 16; o > 0; o >>= 1) {
                l += __shfl_xor_sync(0xffffffff, l, o);
            }
            if (lane == 0 && r < n_rows) {
                float * p = out + (head*a.gqa + (r0 + r) % a.gqa)*a.dst_head + (d[TCA_DESC_TOKEN] + (r0 + r)/a.gqa)*a.dst_token;
                p[D]     = m == TCA_NO_MAX ? m : m*0.69314718f;
                p[D + 1] = l;
            }
        }

#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                acc[r][e] = 0.0f;
            }
        }
        for (int i = tiles_k; i < tiles_k + tiles_v; ++i) {
            tca_cp_async_wait<STAGES - 2>();
            __syncthreads();
            issue(i + STAGES - 1);
            const char * tile = stages + (i % STAGES)*STAGE + ((uintptr_t) tile_start(i) & 15);
            const int    rows = min(rows_v, n_slots - (i - tiles_k)*rows_v);
            tca_with_type(s.type_v, [&](auto tag) {
                constexpr ggml_type type = decltype(tag)::value;
#pragma unroll 2
                for (int j = warp*(32/LANES) + sub; j < rows; j += STEP) {
                    if (active) {
                        float x[8];
                        const float   scale = tca_load8_scaled<type>(tile + j*(int) s.nb_v, part, x);
                        const float * p     = scores + ((i - tiles_k)*rows_v + j)*ROWS;
#pragma unroll
                        for (int r = 0; r < ROWS; ++r) {
                            const float w = p[r]*scale;
#pragma unroll
                            for (int e = 0; e < 8; ++e) {
                                acc[r][e] = fmaf(w, x[e], acc[r][e]);
                            }
                        }
                    }
                }
            });
        }
        tca_cp_async_wait<0>();
        __syncthreads();

        // sum over the rows of a warp, then over the warps
        constexpr int BATCH = ROWS*WARPS*D*4 <= STAGES*STAGE ? ROWS : ROWS/2;
        static_assert(BATCH*WARPS*D*4 <= STAGES*STAGE, "shared memory");
        float * sums = (float *) stages;
#pragma unroll
        for (int b = 0; b < ROWS; b += BATCH) {
#pragma unroll
            for (int r = 0; r < BATCH; ++r) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float t = acc[b + r][e];
#pragma unroll
                    for (int o = LANES; o < 32; o *= 2) {
                        t += __shfl_xor_sync(0xffffffff, t, o);
                    }
                    if (sub == 0 && active) {
                        sums[(warp*BATCH + r)*D + part*8 + e] = t;
                    }
                }
            }
            __syncthreads();
            for (int i = tid; i < BATCH*D; i += 32*WARPS) {
                const int r = r0 + b + i/D;
                float t = 0.0f;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) {
                    t += sums[w*BATCH*D + i];
                }
                if (b + i/D < n_rows) {
                    out[(head*a.gqa + r % a.gqa)*a.dst_head + (d[TCA_DESC_TOKEN] + r/a.gqa)*a.dst_token + i % D] = t;
                }
            }
            __syncthreads();
        }
    }
}

template <int D, int ROWS>
static void launch(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    constexpr int smem = STAGES*STAGE + TCA_ATTN_CHUNK*ROWS*sizeof(float);
    CUDA_CHECK(cudaFuncSetAttribute(decode_kernel<D, ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    decode_kernel<D, ROWS><<<dim3(q.n_chunks, store.n_head_kv, store.n_seqs), 32*WARPS, smem, stream>>>(store, q);
}

template <int D>
static void launch_rows(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    const int n_rows = q.gqa*((q.n_tokens + store.n_seqs - 1)/store.n_seqs);
    if (n_rows <= 1) {
        launch<D, 1>(store, q, stream);
    } else if (n_rows <= 2) {
        launch<D, 2>(store, q, stream);
    } else if (n_rows <= 4) {
        launch<D, 4>(store, q, stream);
    } else {
        launch<D, 8>(store, q, stream);
    }
}

void tca_cuda_decode(const tca_store & store, const tca_queries & q, int head_dim, cudaStream_t stream) {
    switch (head_dim) {
        case 64:  launch_rows<64> (store, q, stream); break;
        case 80:  launch_rows<80> (store, q, stream); break;
        case 96:  launch_rows<96> (store, q, stream); break;
        case 128: launch_rows<128>(store, q, stream); break;
        case 256: launch_rows<256>(store, q, stream); break;
        default:  GGML_ABORT("tca: head size %d", head_dim);
    }
}

// grid (n_head, n_tokens); 512 threads: head_dim rounded up to a power of two, times groups of chunks
static __global__ void combine_kernel(const float * partial, size_t nb_head, size_t nb_token, float * dst, size_t dst_head,
        size_t dst_token, const int32_t * desc, int n_head_kv, int n_seqs, int gqa, int dim, int dim_pow2) {
    extern __shared__ float weights[];  // [n_chunks], then [groups, dim_pow2]
    __shared__ float red[2][16];

    const int head = blockIdx.x, token = blockIdx.y, tid = threadIdx.x;
    int n_chunks = 0;
    for (int s = 0; s < n_seqs; ++s) {
        const int32_t * d = desc + ((size_t) s*n_head_kv + head/gqa)*TCA_DESC_SIZE;
        if (token >= d[TCA_DESC_TOKEN] && token < d[TCA_DESC_TOKEN] + d[TCA_DESC_COUNT]) {
            n_chunks = (d[TCA_DESC_USED] + TCA_ATTN_CHUNK - 1)/TCA_ATTN_CHUNK;
        }
    }
    if (n_chunks == 0) {
        return;
    }
    partial += head*nb_head + token*nb_token;
    const int stride = dim + 2;

    float m = TCA_NO_MAX;
    for (int c = tid; c < n_chunks; c += blockDim.x) {
        m = fmaxf(m, partial[(size_t) c*stride + dim]);
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        m = fmaxf(m, __shfl_xor_sync(0xffffffff, m, o));
    }
    if (tid % 32 == 0) {
        red[0][tid/32] = m;
    }
    __syncthreads();
    for (int w = 0; w < (int) blockDim.x/32; ++w) {
        m = fmaxf(m, red[0][w]);
    }
    float l = 0.0f;
    for (int c = tid; c < n_chunks; c += blockDim.x) {
        const float w = __expf(partial[(size_t) c*stride + dim] - m);  // 0 for a chunk the query does not see
        weights[c] = w;
        l += w*partial[(size_t) c*stride + dim + 1];
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        l += __shfl_xor_sync(0xffffffff, l, o);
    }
    if (tid % 32 == 0) {
        red[1][tid/32] = l;
    }
    __syncthreads();
    l = 0.0f;
    for (int w = 0; w < (int) blockDim.x/32; ++w) {
        l += red[1][w];
    }

    const int i = tid % dim_pow2, group = tid/dim_pow2, n_groups = blockDim.x/dim_pow2;
    float t = 0.0f;
    if (i < dim) {
#pragma unroll 8
        for (int c = group; c < n_chunks; c += n_groups) {
            t = fmaf(weights[c], partial[(size_t) c*stride + i], t);
        }
    }
    float * sums = weights + n_chunks;
    sums[tid] = t;
    __syncthreads();
    if (tid < dim) {
        for (int g = 1; g < n_groups; ++g) {
            t += sums[g*dim_pow2 + tid];
        }
        dst[head*dst_head + token*dst_token + tid] = t/l;
    }
}

// src: (dst,) partial, desc
void tca_cuda_combine(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const int first = dst->view_src ? 1 : 0;
    const ggml_tensor * partial = dst->src[first + 0];
    const ggml_tensor * desc    = dst->src[first + 1];

    const int row     = tca_op_get_params(dst).row;
    const int dim     = dst->ne[0];
    const int threads = 512;
    const int smem    = (partial->ne[1] + threads)*sizeof(float);
    CUDA_CHECK(cudaFuncSetAttribute(combine_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::max(smem, 48*1024)));
    combine_kernel<<<dim3(dst->ne[1], dst->ne[2]), threads, smem, ctx.stream()>>>((const float *) partial->data,
            partial->nb[2]/sizeof(float), partial->nb[3]/sizeof(float), (float *) dst->data, dst->nb[1]/sizeof(float),
            dst->nb[2]/sizeof(float), (const int32_t *) ((const char *) desc->data + row*desc->nb[3]), desc->ne[1], desc->ne[2],
            dst->ne[1]/desc->ne[1], dim, dim <= 64 ? 64 : dim <= 128 ? 128 : 256);
}
