// Decode: a few query rows over long regions, for stores that neither of the other two kernels takes: f32, and K and V of different
// kinds. A thread block takes one chunk of one region and reads its K and V rows once for
// all rows of the group; then one pass combines the chunks. Bound by the memory's speed: the bytes of K and V go through shared
// memory in a ring of tiles that is always ahead of the arithmetic, whatever the type.
#include "tca-decode.cuh"

constexpr int WARPS = DECODE_WARPS;

template <int ROWS>
static __device__ __forceinline__ void load_rows(float * x, const float * p) {
    if constexpr (ROWS >= 4) {
#pragma unroll
        for (int i = 0; i < ROWS/4; ++i) {
            const float4 f = ((const float4 *) p)[i];
            x[4*i] = f.x; x[4*i + 1] = f.y; x[4*i + 2] = f.z; x[4*i + 3] = f.w;
        }
    } else if constexpr (ROWS == 2) {
        const float2 f = *(const float2 *) p;
        x[0] = f.x; x[1] = f.y;
    } else {
        x[0] = *p;
    }
}

// Sums of N values over 2*O lanes; every step also halves the values that a lane keeps, down to x[0].
template <int N, int O>
static __device__ __forceinline__ void reduce(float * x, int part) {
    if constexpr (N > 1) {
        const bool upper = part & O;
#pragma unroll
        for (int i = 0; i < N/2; ++i) {
            const float give = upper ? x[i] : x[i + N/2];
            const float keep = upper ? x[i + N/2] : x[i];
            x[i] = keep + __shfl_xor_sync(0xffffffff, give, O);
        }
    } else if constexpr (O > 0) {
        x[0] += __shfl_xor_sync(0xffffffff, x[0], O);
    }
    if constexpr (O > 0) {
        reduce<(N > 1 ? N/2 : 1), O/2>(x, part);
    }
}

// rows: at most ROWS query rows of a KV head at a time; grid: rounds of thread blocks (tca_decode_rounds)
template <int D, int ROWS>
static __global__ void __launch_bounds__(32*WARPS, tca_decode_per_sm(D, ROWS)) decode_kernel(const tca_store s, const tca_queries a) {
    constexpr int LANES = D <= 64 ? 8 : D <= 128 ? 16 : 32;  // lanes that share a row, 8 elements each
    constexpr int STEP  = WARPS*(32/LANES);                  // rows of V that the block takes at once
    constexpr int BATCH = LANES/ROWS < 4 ? LANES/ROWS : 4;   // rows of K that a lane takes at once
    constexpr int SUMS  = BATCH*ROWS;

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
            ring.set(s, range, STEP);
        }
    }
    __syncthreads();
    ggml_cuda_pdl_sync();  // before it only the descriptor was read, which is an input of the graph
    if (range.empty) {
        return;
    }

    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
    const int sub = lane / LANES, part = lane % LANES;
    const bool active = part*8 < D;
    const int32_t * d = range.d;
    const int head = range.head, count = d[TCA_DESC_COUNT], past = d[TCA_DESC_PAST];

    for (int r0 = 0; r0 < count*a.gqa; r0 += ROWS) {
        const int n_rows = min(ROWS, count*a.gqa - r0);
        ring.start(s, smem);

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

        // sums over the lanes of a row: each halving also halves what a lane keeps, so that in the end a lane has one sum, of
        // slot my_slot of the batch and row my_row
        int mine = 0;
#pragma unroll
        for (int n = SUMS/2, o = LANES/2; n >= 1; n /= 2, o /= 2) {
            mine += part & o ? n : 0;
        }
        const int  my_slot    = mine/ROWS*(32/LANES) + sub, my_row = mine % ROWS;
        const int  my_visible = past + (r0 + my_row)/a.gqa + 1 - range.j0;
        const bool my_turn    = part % (LANES/SUMS) == 0;

        for (int i = 0; i < ring.tiles_k; ++i) {
            const char * tile = ring.next(s, smem, i);
            const int    rows = ring.rows(i);
            tca_with_type(s.type_k, [&](auto tag) {
                constexpr ggml_type type = decltype(tag)::value;
                for (int j = warp*(32/LANES)*BATCH; j < rows; j += STEP*BATCH) {
                    float sum[SUMS];
#pragma unroll
                    for (int b = 0; b < BATCH; ++b) {
                        const int row = j + b*(32/LANES) + sub;
                        float x[8];
                        float scale = 0.0f;
                        if (active && row < rows) {
                            scale = tca_load8_scaled<type>(tile + row*(int) s.nb_k, part, x);
                        } else {
#pragma unroll
                            for (int e = 0; e < 8; ++e) {
                                x[e] = 0.0f;
                            }
                        }
#pragma unroll
                        for (int r = 0; r < ROWS; ++r) {
                            float t = x[0]*acc[r][0];
#pragma unroll
                            for (int e = 1; e < 8; ++e) {
                                t = fmaf(x[e], acc[r][e], t);
                            }
                            sum[b*ROWS + r] = t*scale;
                        }
                    }
                    reduce<SUMS, LANES/2>(sum, part);
                    if (my_turn && j + my_slot < rows) {
                        const int slot = i*ring.rows_k + j + my_slot;
                        float x = sum[0]*a.scale;
                        if (a.softcap != 0.0f) {
                            x = tca_softcap(x, a.softcap);
                        }
                        scores[slot*ROWS + my_row] = slot < my_visible ? x*1.44269504f : -INFINITY;
                    }
                }
            });
        }
        __syncthreads();

        tca_decode_softmax<D, ROWS>(scores, range.n_slots, result);

#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                acc[r][e] = 0.0f;
            }
        }
        for (int i = ring.tiles_k; i < ring.tiles; ++i) {
            const char * tile = ring.next(s, smem, i);
            const int    rows = ring.rows(i);
            tca_with_type(s.type_v, [&](auto tag) {
                constexpr ggml_type type = decltype(tag)::value;
#pragma unroll 2
                for (int j = warp*(32/LANES) + sub; j < rows; j += STEP) {
                    if (active) {
                        float x[8], p[ROWS];
                        const float scale = tca_load8_scaled<type>(tile + j*(int) s.nb_v, part, x);
                        load_rows<ROWS>(p, scores + ((i - ring.tiles_k)*ring.rows_v + j)*ROWS);
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
        ring.finish();

        // sum over the rows of a warp, then over the warps
        constexpr int PART = tca_decode_part<D, ROWS>;
        float * sums = (float *) smem;
#pragma unroll
        for (int b = 0; b < ROWS; b += PART) {
#pragma unroll
            for (int r = 0; r < PART; ++r) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    float t = acc[b + r][e];
#pragma unroll
                    for (int o = LANES; o < 32; o *= 2) {
                        t += __shfl_xor_sync(0xffffffff, t, o);
                    }
                    if (sub == 0 && active) {
                        sums[(warp*PART + r)*D + part*8 + e] = t;
                    }
                }
            }
            tca_decode_gather<D, ROWS>(sums, b, result);
        }
        tca_decode_write<D, ROWS>(a, range, result, r0, n_rows);
    }
}

template <int D, int ROWS>
static void launch(const tca_store & store, const tca_queries & q, cudaStream_t stream) {
    const int smem = DECODE_STAGES*DECODE_STAGE + q.limits.chunk_max*ROWS*(int) sizeof(float);
    tca_decode_launch<WARPS>(decode_kernel<D, ROWS>, smem, store, q, stream);
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
    tca_with_head_dim(head_dim, [&](auto d) { launch_rows<decltype(d)::value>(store, q, stream); });
}

// grid (n_head, n_tokens); 512 threads. A warp takes chunks in turn and keeps a running softmax over them, 8 values a lane at
// most; then the warps are put together.
static __global__ void __launch_bounds__(512) combine_kernel(const float * partial, size_t nb_head, size_t nb_token, float * dst,
        size_t dst_head, size_t dst_token, const int32_t * desc, int n_head_kv, int n_seqs, int gqa, int dim,
        tca_decode_limits limits, int n_chunks_max) {
    constexpr int N_WARPS = 16, BATCH = 4;
    ggml_cuda_pdl_lc();
    __shared__ float warp_m[N_WARPS], warp_l[N_WARPS], warp_o[N_WARPS][256];

    const int head = blockIdx.x, token = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int used = 0;
    for (int s = 0; s < n_seqs; ++s) {
        const int32_t * d = desc + ((size_t) s*n_head_kv + head/gqa)*TCA_DESC_SIZE;
        if (token >= d[TCA_DESC_TOKEN] && token < d[TCA_DESC_TOKEN] + d[TCA_DESC_COUNT]) {
            used = d[TCA_DESC_USED];
        }
    }
    const int length   = tca_decode_chunk(desc, n_head_kv*n_seqs, limits, n_chunks_max);
    const int n_chunks = (used + length - 1)/length;
    ggml_cuda_pdl_sync();
    if (n_chunks == 0) {
        return;
    }
    partial += head*nb_head + token*nb_token;

    float m = TCA_NO_MAX, l = 0.0f, o[8] = { 0.0f };
    for (int c0 = warp; c0 < n_chunks; c0 += BATCH*N_WARPS) {
        float p_m[BATCH], p_l[BATCH], p_o[BATCH][8];  // all on their way before the first is used
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            const float * p = partial + (size_t) min(c0 + b*N_WARPS, n_chunks - 1)*(dim + 2);
            p_m[b] = p[dim];
            p_l[b] = p[dim + 1];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                p_o[b][i] = lane + 32*i < dim ? p[lane + 32*i] : 0.0f;
            }
        }
#pragma unroll
        for (int b = 0; b < BATCH; ++b) {
            if (c0 + b*N_WARPS < n_chunks) {
                const float m_new = fmaxf(m, p_m[b]), old = __expf(m - m_new);
                const float weight = __expf(p_m[b] - m_new);  // 0: the query sees no slot of the chunk
                m = m_new;
                l = fmaf(l, old, weight*p_l[b]);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    o[i] = fmaf(o[i], old, weight*p_o[b][i]);
                }
            }
        }
    }
    if (lane == 0) {
        warp_m[warp] = m;
        warp_l[warp] = l;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        warp_o[warp][lane + 32*i] = o[i];
    }
    __syncthreads();
    if ((int) threadIdx.x < dim) {
        m = TCA_NO_MAX;
#pragma unroll
        for (int w = 0; w < N_WARPS; ++w) {
            m = fmaxf(m, warp_m[w]);
        }
        float x = 0.0f;
        l = 0.0f;
#pragma unroll
        for (int w = 0; w < N_WARPS; ++w) {
            const float weight = __expf(warp_m[w] - m);
            x = fmaf(weight, warp_o[w][threadIdx.x], x);
            l = fmaf(weight, warp_l[w], l);
        }
        dst[head*dst_head + token*dst_token + threadIdx.x] = x/l;
    }
}

tca_decode_limits tca_cuda_decode_limits(int device, const ggml_tensor * partial) {
    const tca_attn_node a = tca_attn_node::of(partial);
    const int rows = a.gqa*((a.q->ne[2] + a.desc->ne[2] - 1)/a.desc->ne[2]);
    if (rows > TCA_DECODE_ROWS) {
        return { 0, 0, 0 };
    }
    const int dim = a.q->ne[0], nsm = ggml_cuda_info().devices[device].nsm;
    const int arch = tca_decode_arch(device), memory = tca_decode_memory(arch);
    // as many thread blocks as kernels are compiled for, or as the shared memory holds
    const auto at_once = [&](int per_sm, int bytes) { return std::max(std::min(per_sm, (memory + 8*1024)/bytes), 1)*nsm; };
    switch (tca_decode_kind_of(a.k->type, a.v->type)) {
        case TCA_DECODE_QUANTIZED: {
            const int step = tca_decode_step_quantized(dim), bytes = step*tca_decode_steps(step, arch);
            return { at_once(tca_decode_per_sm_quantized(dim), bytes), DECODE_CHUNK_MIN, DECODE_CHUNK_MAX_QUANTIZED };
        }
        case TCA_DECODE_HALF: {
            const int step = tca_decode_step_half(dim), bytes = step*tca_decode_steps(step, arch);
            return { at_once(tca_decode_per_sm_half(dim), bytes), DECODE_CHUNK_MIN_HALF, DECODE_CHUNK_MAX_HALF };
        }
        default: {
            const int slot  = std::min(rows, 8)*(int) sizeof(float), stages = DECODE_STAGES*DECODE_STAGE;
            const int chunk = std::min(DECODE_CHUNK_MAX, (memory - stages)/(8*(int) sizeof(float))/16*16);
            return { at_once(tca_decode_per_sm(dim, rows), stages + chunk*slot), DECODE_CHUNK_MIN, chunk };
        }
    }
}

void tca_cuda_combine(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const tca_combine_node n = tca_combine_node::of(dst);  // without sinks (tca_cuda_supports)
    ggml_cuda_kernel_launch(combine_kernel, ggml_cuda_kernel_launch_params(dim3(dst->ne[1], dst->ne[2]), dim3(512), 0, ctx.stream()),
            (const float *) n.partial->data, n.partial->nb[2]/sizeof(float), n.partial->nb[3]/sizeof(float), (float *) dst->data, dst->nb[1]/sizeof(float),
            dst->nb[2]/sizeof(float), (const int32_t *) ((const char *) n.desc->data + n.row*n.desc->nb[3]), n.desc->ne[1], n.desc->ne[2],
            dst->ne[1]/n.desc->ne[1], dst->ne[0], tca_cuda_decode_limits(ctx.device, n.partial), (int) n.partial->ne[1]);
}
