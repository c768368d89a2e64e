// Append: f32 rows of the micro-batch to the ends of the regions, rounded exactly as the CPU does it.
#include "tca-kernels.cuh"

struct append_args {
    const float * k_cur;
    const float * v_cur;
    size_t        k_head, k_token, v_head, v_token;  // strides in floats
    int32_t     * pos;
    int           dk, dv;
};

// One warp, one row.
static __device__ void store_row(const float * src, char * dst, int type, int n, int lane) {
    switch (type) {
        case GGML_TYPE_F32:
            for (int i = lane; i < n; i += 32) {
                ((float *) dst)[i] = src[i];
            }
            break;
        case GGML_TYPE_F16:
            if (((uintptr_t) src | (uintptr_t) dst) % 16 == 0 && n % 4 == 0) {
                for (int i = lane; i < n/4; i += 32) {
                    const float4 x = ((const float4 *) src)[i];
                    ((half2 *) dst)[2*i]     = __floats2half2_rn(x.x, x.y);
                    ((half2 *) dst)[2*i + 1] = __floats2half2_rn(x.z, x.w);
                }
                break;
            }
            for (int i = lane; i < n; i += 32) {
                ((half *) dst)[i] = __float2half_rn(src[i]);
            }
            break;
        case GGML_TYPE_BF16:
            for (int i = lane; i < n; i += 32) {
                // as ggml_compute_fp32_to_bf16
                const uint32_t u = __float_as_uint(src[i]);
                ((uint16_t *) dst)[i] = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64 : (u + (0x7fffu + ((u >> 16) & 1))) >> 16;
            }
            break;
        case GGML_TYPE_Q8_0:
            // the CPU's vector code: 127/amax, round to nearest even (the generic code rounds 1/d and halves away from zero)
            for (int i = 0; i < n; i += QK8_0) {
                const float x = src[i + lane];
                float amax = fabsf(x);
#pragma unroll
                for (int o = 16; o > 0; o >>= 1) {
                    amax = fmaxf(amax, __shfl_xor_sync(0xffffffff, amax, o));
                }
                const float id = amax != 0.0f ? __fdiv_rn(127.0f, amax) : 0.0f;
                block_q8_0 * b = (block_q8_0 *) dst + i/QK8_0;
                b->qs[lane] = (int8_t) __float2int_rn(__fmul_rn(x, id));
                if (lane == 0) {
                    *(half *) &b->d = __float2half_rn(__fdiv_rn(amax, 127.0f));
                }
            }
            break;
        case GGML_TYPE_Q4_0:
            for (int i = 0; i < n; i += QK4_0) {
                const float x = src[i + lane];
                float best = x;
                int   at   = lane;
#pragma unroll
                for (int o = 16; o > 0; o >>= 1) {
                    // largest magnitude, the first of equals
                    const float other    = __shfl_xor_sync(0xffffffff, best, o);
                    const int   other_at = __shfl_xor_sync(0xffffffff, at, o);
                    if (fabsf(other) > fabsf(best) || (fabsf(other) == fabsf(best) && other_at < at)) {
                        best = other;
                        at   = other_at;
                    }
                }
                const float d  = best*-0.125f;
                const float id = d != 0.0f ? __fdiv_rn(1.0f, d) : 0.0f;
                const int   u  = min(15, (int) (int8_t) __fadd_rn(__fmul_rn(x, id), 8.5f));
                const int   hi = __shfl_down_sync(0xffffffff, u, 16);
                block_q4_0 * b = (block_q4_0 *) dst + i/QK4_0;
                if (lane < 16) {
                    b->qs[lane] = (uint8_t) (u | (hi << 4));
                }
                if (lane == 0) {
                    *(half *) &b->d = __float2half_rn(d);
                }
            }
            break;
        default:
            break;
    }
}

// grid (tokens, n_seqs), one warp a row of K or V in turn
static __global__ void append_kernel(tca_store s, append_args a) {
    ggml_cuda_pdl_lc();
    const int seq  = blockIdx.y;
    const int lane = threadIdx.x;
    for (int i = threadIdx.y; i < 2*s.n_head_kv; i += blockDim.y) {
        const int       head  = i/2;
        const int32_t * d     = tca_region(s, seq, head);
        const int       count = d[TCA_DESC_COUNT], token0 = d[TCA_DESC_TOKEN], pos0 = d[TCA_DESC_POS];
        const int64_t   slot0 = (int64_t) d[TCA_DESC_OFFSET] + d[TCA_DESC_PAST];
        ggml_cuda_pdl_sync();  // before it only the descriptor was read, which is an input of the graph
        for (int t = blockIdx.x; t < count; t += gridDim.x) {
            const int64_t token = token0 + t, slot = slot0 + t;
            if (i % 2) {
                store_row(a.v_cur + head*a.v_head + token*a.v_token, s.v + slot*s.nb_v, s.type_v, a.dv, lane);
            } else {
                store_row(a.k_cur + head*a.k_head + token*a.k_token, s.k + slot*s.nb_k, s.type_k, a.dk, lane);
                if (lane == 0) {
                    a.pos[slot] = pos0 + t;
                }
            }
        }
    }
}

void tca_cuda_append(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const auto [k, v, pos, k_cur, v_cur, desc, row] = tca_append_node::of(dst);
    const tca_store s = tca_store_of(k, v, desc, row);
    const append_args a = { (const float *) k_cur->data, (const float *) v_cur->data,
        k_cur->nb[1]/sizeof(float), k_cur->nb[2]/sizeof(float), v_cur->nb[1]/sizeof(float), v_cur->nb[2]/sizeof(float),
        (int32_t *) pos->data, (int) k->ne[0], (int) v->ne[0] };
    const int64_t tokens = (k_cur->ne[2] + s.n_seqs - 1)/s.n_seqs;
    ggml_cuda_kernel_launch(append_kernel, ggml_cuda_kernel_launch_params(dim3(tokens, s.n_seqs), dim3(32, std::min(2*s.n_head_kv, 16)), 0,
        ctx.stream()), s, a);
}
