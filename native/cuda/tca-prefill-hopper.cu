// Prefill on Hopper, head sizes 64 and 128: warpgroup matrix instructions (wgmma), which read K and V from shared memory.
//
// A thread block has three warpgroups. The first one loads: it fills a ring of key blocks (K and V, converted to f16 if they are
// anything else) and needs few registers. The other two compute, 64 query rows each: S = Q K^T of the next key block is issued
// before O += P V of the present one, so that the softmax runs while the matrix units work; the two drift apart by themselves
// and fill each other's gaps. Tiles are written by ordinary stores and cp.async with the 128-byte swizzle that wgmma expects,
// then fenced for the asynchronous proxy.
#include "tca-schedule.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile for sm_90a"
#endif

constexpr int TILE_ROWS = 128;
constexpr int KEYS      = 128;
constexpr int STAGES    = 2;
constexpr int THREADS   = 384;

// ---- barriers in shared memory ------------------------------------------------------------------------------------------

static __device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}

static __device__ __forceinline__ void barrier_wait(uint32_t bar, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" :: "r"(bar), "r"(parity) : "memory");
}

// ---- wgmma --------------------------------------------------------------------------------------------------------------

// Descriptor of a tile in shared memory with rows of 128 bytes and the 128-byte swizzle; groups of 8 rows are 1024 bytes apart.
// leading: bytes between blocks of 64 columns, for operands that are read transposed.
static __device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading) {
    return (uint64_t) ((address & 0x3ffff) >> 4) | (uint64_t) (leading >> 4) << 16 | (uint64_t) (1024 >> 4) << 32 | (uint64_t) 1 << 62;
}

static __device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
static __device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n> static __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory"); }

// keeps the compiler from moving uses of registers across an asynchronous product
template <int N> static __device__ __forceinline__ void touch(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        asm volatile("" : "+f"(x[i]) :: "memory");
    }
}

#define R8(c, i) "+f"(c[i]), "+f"(c[i+1]), "+f"(c[i+2]), "+f"(c[i+3]), "+f"(c[i+4]), "+f"(c[i+5]), "+f"(c[i+6]), "+f"(c[i+7])

// c[64, 128] (+)= a[64, 16] b[16, 128]; a and b in shared memory, b as [128 keys, 16 dims]
static __device__ __forceinline__ void wgmma_ss(float (&c)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        " %64, %65, p, 1, 1, 0, 0;\n}\n"
        : R8(c, 0), R8(c, 8), R8(c, 16), R8(c, 24), R8(c, 32), R8(c, 40), R8(c, 48), R8(c, 56)
        : "l"(a), "l"(b), "r"(accumulate));
}

// c[64, 128] += a[64, 16] b[16, 128]; a in registers, b in shared memory as [16 keys, 128 dims]
static __device__ __forceinline__ void wgmma_rs(float (&c)[64], const uint32_t * a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        " {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
        : R8(c, 0), R8(c, 8), R8(c, 16), R8(c, 24), R8(c, 32), R8(c, 40), R8(c, 48), R8(c, 56)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// the same with 64 dims
static __device__ __forceinline__ void wgmma_rs(float (&c)[32], const uint32_t * a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
        " {%32,%33,%34,%35}, %36, 1, 1, 1, 1;\n"
        : R8(c, 0), R8(c, 8), R8(c, 16), R8(c, 24)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// ---- shared memory ------------------------------------------------------------------------------------------------------

// A tile [rows, D] of f16: D/64 panels of [rows, 64], rows of 128 bytes, units of 16 bytes swizzled.
static __device__ __forceinline__ uint32_t tile_offset(int rows, int row, int unit) {
    return (unit/8)*rows*128 + row*128 + ((unit ^ row) & 7)*16;
}

template <int D>
struct layout {
    static constexpr int TILE  = KEYS*D*2;
    static constexpr int Q     = 0;
    static constexpr int K     = TILE_ROWS*D*2;
    static constexpr int V     = K + STAGES*TILE;
    static constexpr int BARS  = V + STAGES*TILE;  // full K, full V, free K, free V: [STAGES] each
    static constexpr int RAW   = BARS + 128;       // stores that are not f16: K and V of a block as they are stored
    static constexpr int BYTES = BARS + 128 + 1024;
};

// Keys [0, n_rows) of an f16 block by one warpgroup, zeros behind them.
template <int D>
static __device__ __forceinline__ void load_tile(uint32_t dst, const char * src, size_t nb, int n_rows, int tid) {
    constexpr int UNITS = D/8;
    const int unit = tid % UNITS;
#pragma unroll 8
    for (int row = tid/UNITS; row < KEYS; row += 128/UNITS) {
        const bool valid = row < n_rows;
        tca_cp_async(dst + tile_offset(KEYS, row, unit), src + (valid ? row : 0)*nb + unit*16, valid ? 16 : 0);
    }
}

// Bytes of a block as they are stored, from the last multiple of 16 before its start on.
static __device__ __forceinline__ void load_raw(uint32_t dst, const char * src, const char * end, int bytes, int tid) {
    const int shift = (int) ((uintptr_t) src & 15);
    for (int b = tid*16; b < shift + bytes; b += 128*16) {
        const char * from = src - shift + b;
        tca_cp_async(dst + b, from, (int) min((int64_t) 16, (int64_t) (end - from)));
    }
}

// A block from its stored bytes to f16, zeros behind n_rows.
template <int D, ggml_type type>
static __device__ __forceinline__ void convert_tile(uint32_t dst, const char * raw, int nb, int n_rows, int tid) {
    constexpr int UNITS = D/8;
    const int unit = tid % UNITS;
#pragma unroll 4
    for (int row = tid/UNITS; row < KEYS; row += 128/UNITS) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (row < n_rows) {
            x = tca_load8_f16<type>(raw + row*nb, unit);
        }
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(dst + tile_offset(KEYS, row, unit)), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
    }
}

static __device__ __forceinline__ uint32_t pack(float a, float b) {
    const half2 h = __floats2half2_rn(a, b);
    return *(const uint32_t *) &h;
}

// ---- the kernel ---------------------------------------------------------------------------------------------------------

template <int D, ggml_type TK, ggml_type TV>
static __global__ void __launch_bounds__(THREADS, 1) hopper_kernel(const tca_store s, const tca_queries a, const tca_schedule w) {
    using L = layout<D>;
    extern __shared__ char smem_raw[];
    const uint32_t smem = (tca_smem(smem_raw) + 1023) & ~1023u;
    const uint32_t bars = smem + L::BARS;
    const auto full_k = [&](int i) { return bars + 8*i; };
    const auto full_v = [&](int i) { return bars + 8*(STAGES + i); };
    const auto free_k = [&](int i) { return bars + 8*(2*STAGES + i); };
    const auto free_v = [&](int i) { return bars + 8*(3*STAGES + i); };

    if ((int) blockIdx.x >= tca_runs(w, tca_total(w))) {
        return;
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full_k(i), 128);
            barrier_init(full_v(i), 128);
            barrier_init(free_k(i), 8);  // one lane of each computing warp
            barrier_init(free_v(i), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int group = threadIdx.x/128, tid = threadIdx.x % 128;

    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 88;");
        int n = 0;  // loads so far: K and V of a key block in turn
        if constexpr (TK == GGML_TYPE_F16) {
            const auto announce = [&](int i) {
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                barrier_arrive(i & 1 ? full_v(i/2 % STAGES) : full_k(i/2 % STAGES));
            };
            tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & x) {
                for (int j = x.key0; j < x.key1; j += KEYS) {
                    const int64_t slot = (int64_t) x.d[TCA_DESC_OFFSET] + j;
                    for (int is_v = 0; is_v < 2; ++is_v, ++n) {
                        const int stage = n/2 % STAGES;
                        barrier_wait(is_v ? free_v(stage) : free_k(stage), (n/2/STAGES & 1) ^ 1);
                        load_tile<D>(smem + (is_v ? L::V : L::K) + stage*L::TILE, is_v ? s.v + slot*s.nb_v : s.k + slot*s.nb_k,
                                is_v ? s.nb_v : s.nb_k, min(KEYS, x.key1 - j), tid);
                        tca_cp_async_commit();
                        if (n > 0) {
                            tca_cp_async_wait<1>();
                            announce(n - 1);
                        }
                    }
                }
            });
            tca_cp_async_wait<0>();
            announce(n - 1);
        } else {
            // the bytes of load i arrive while load i - 1 is converted
            const int raw_bytes = (KEYS*(int) s.nb_k + 16 + 15)/16*16;
            int last_rows = 0, last_shift = 0;
            const auto convert = [&](int i) {
                const int stage = i/2 % STAGES;
                const char * raw = smem_raw + (smem - tca_smem(smem_raw)) + L::RAW + (i & 1)*raw_bytes + last_shift;
                if (i & 1) {
                    barrier_wait(free_v(stage), (i/2/STAGES & 1) ^ 1);
                    convert_tile<D, TV>(smem + L::V + stage*L::TILE, raw, s.nb_v, last_rows, tid);
                } else {
                    barrier_wait(free_k(stage), (i/2/STAGES & 1) ^ 1);
                    convert_tile<D, TK>(smem + L::K + stage*L::TILE, raw, s.nb_k, last_rows, tid);
                }
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
                barrier_arrive(i & 1 ? full_v(stage) : full_k(stage));
            };
            tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & x) {
                for (int j = x.key0; j < x.key1; j += KEYS) {
                    const int64_t slot = (int64_t) x.d[TCA_DESC_OFFSET] + j;
                    for (int is_v = 0; is_v < 2; ++is_v, ++n) {
                        const char * src = is_v ? s.v + slot*s.nb_v : s.k + slot*s.nb_k;
                        const int n_rows = min(KEYS, x.key1 - j);
                        tca_cp_async_wait<0>();
                        asm volatile("bar.sync 3, 128;" ::: "memory");  // load n - 1 is here, load n - 2 converted
                        load_raw(smem + L::RAW + (n & 1)*raw_bytes, src, is_v ? s.v_end : s.k_end, n_rows*(int) (is_v ? s.nb_v : s.nb_k), tid);
                        tca_cp_async_commit();
                        if (n > 0) {
                            convert(n - 1);
                        }
                        last_rows  = n_rows;
                        last_shift = (int) ((uintptr_t) src & 15);
                    }
                }
            });
            tca_cp_async_wait<0>();
            asm volatile("bar.sync 3, 128;" ::: "memory");
            convert(n - 1);
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
    const int wg = group - 1, lane = tid % 32, warp = tid/32;
    const int g = lane/4, t4 = lane % 4;
    const float to_log2 = a.softcap == 0.0f ? a.scale*1.44269504f : 1.44269504f;
    const uint32_t q_tile = smem + L::Q;
    int n = 0;

    tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & work) {
        const int head = work.head, row0 = work.row0, n_rows = work.n_rows, key0 = work.key0, key1 = work.key1;
        const int past = work.d[TCA_DESC_PAST], token0 = work.d[TCA_DESC_TOKEN];

        // this warpgroup's 64 rows of Q to shared memory; nobody else reads them
        asm volatile("bar.sync %0, 128;" :: "r"(1 + wg) : "memory");
        for (int i = tid; i < 64*(D/8); i += 128) {
            const int r = wg*64 + i/(D/8), unit = i % (D/8);
            const int row = row0 + min(r, n_rows - 1);
            const float4 * q = (const float4 *) (a.q + (head*a.gqa + row % a.gqa)*a.q_head + (token0 + row/a.gqa)*a.q_token + unit*8);
            const float4 x = q[0], y = q[1];
            asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(q_tile + tile_offset(TILE_ROWS, r, unit)),
                "r"(pack(x.x, x.y)), "r"(pack(x.z, x.w)), "r"(pack(y.x, y.y)), "r"(pack(y.z, y.w)) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        asm volatile("bar.sync %0, 128;" :: "r"(1 + wg) : "memory");

        const int r[2] = { wg*64 + warp*16 + g, wg*64 + warp*16 + g + 8 };
        int visible[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            visible[i] = min(past + (row0 + min(r[i], n_rows - 1))/a.gqa + 1, key1);
        }

        float o[D/2], c[KEYS/2];
        uint32_t p[KEYS/4];
#pragma unroll
        for (int i = 0; i < D/2; ++i) {
            o[i] = 0.0f;
        }
        float m[2] = { TCA_NO_MAX, TCA_NO_MAX }, l[2] = { 0.0f, 0.0f }, shrink[2];

        const auto scores = [&](int stage) {
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D/16; ++k) {
                // 16 dims are 32 bytes inside a panel
                const uint32_t at = k/4*128*128 + k%4*32;
                wgmma_ss(c, descriptor(q_tile + at + wg*64*128, 16), descriptor(smem + L::K + stage*L::TILE + at, 16), k > 0);
            }
            wgmma_commit();
        };
        const auto values = [&](int stage) {
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < KEYS/16; ++k) {
                wgmma_rs(o, p + 4*k, descriptor(smem + L::V + stage*L::TILE + k*16*128, KEYS*128));
            }
            wgmma_commit();
        };
        const auto softmax = [&](int j) {
            if (a.softcap != 0.0f) {
#pragma unroll
                for (int i = 0; i < KEYS/2; ++i) {
                    c[i] = tca_softcap(c[i]*a.scale, a.softcap);
                }
            }
            if (j + KEYS > visible[0]) {
#pragma unroll
                for (int i = 0; i < KEYS/2; ++i) {
                    if (j + i/4*8 + 2*t4 + i%2 >= visible[i/2%2]) {
                        c[i] = -INFINITY;
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float max = -INFINITY;
#pragma unroll
                for (int i = 0; i < KEYS/8; ++i) {
                    max = fmaxf(max, fmaxf(c[4*i + 2*h], c[4*i + 2*h + 1]));
                }
                max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 1));
                max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, 2));
                const float m_new = fmaxf(m[h], max*to_log2);
                shrink[h] = exp2f(m[h] - m_new);
                m[h] = m_new;
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < KEYS/8; ++i) {
                    c[4*i + 2*h]     = exp2f(fmaf(c[4*i + 2*h],     to_log2, -m_new));
                    c[4*i + 2*h + 1] = exp2f(fmaf(c[4*i + 2*h + 1], to_log2, -m_new));
                    sum += c[4*i + 2*h] + c[4*i + 2*h + 1];
                }
                l[h] = fmaf(l[h], shrink[h], sum);
            }
        };
        const auto probabilities = [&]() {
#pragma unroll
            for (int i = 0; i < KEYS/4; ++i) {
                p[i] = pack(c[2*i], c[2*i + 1]);
            }
        };

        barrier_wait(full_k(n % STAGES), n/STAGES & 1);
        scores(n % STAGES);
        wgmma_wait<0>();
        touch(c);
        if (lane == 0) {
            barrier_arrive(free_k(n % STAGES));
        }
        softmax(key0);
        probabilities();
        for (int j = key0 + KEYS; j < key1; j += KEYS) {
            const int now = n % STAGES, next = (n + 1) % STAGES;
            barrier_wait(full_k(next), (n + 1)/STAGES & 1);
            touch(c);
            scores(next);
            barrier_wait(full_v(now), n/STAGES & 1);
            touch(o);
            values(now);
            wgmma_wait<1>();
            touch(c);
            if (lane == 0) {
                barrier_arrive(free_k(next));
            }
            softmax(j);
            wgmma_wait<0>();
            touch(o);
            if (lane == 0) {
                barrier_arrive(free_v(now));
            }
#pragma unroll
            for (int i = 0; i < D/2; ++i) {
                o[i] *= shrink[i/2%2];
            }
            probabilities();
            ++n;
        }
        barrier_wait(full_v(n % STAGES), n/STAGES & 1);
        touch(o);
        values(n % STAGES);
        wgmma_wait<0>();
        touch(o);
        if (lane == 0) {
            barrier_arrive(free_v(n % STAGES));
        }
        ++n;

#pragma unroll
        for (int h = 0; h < 2; ++h) {
            l[h] += __shfl_xor_sync(0xffffffff, l[h], 1);
            l[h] += __shfl_xor_sync(0xffffffff, l[h], 2);
            if (r[h] >= n_rows) {
                continue;
            }
            const int row = row0 + r[h];
            float * out;
            float norm = 1.0f;
            if (work.partial) {
                out = work.partial + (size_t) r[h]*(D + 2);
                if (t4 == 0) {
                    out[D]     = m[h];
                    out[D + 1] = l[h];
                }
            } else {
                out  = a.dst + (head*a.gqa + row % a.gqa)*a.dst_head + (token0 + row/a.gqa)*a.dst_token;
                norm = 1.0f/l[h];
            }
#pragma unroll
            for (int i = 0; i < D/8; ++i) {
                *(float2 *) (out + 8*i + 2*t4) = make_float2(o[4*i + 2*h]*norm, o[4*i + 2*h + 1]*norm);
            }
        }
    });
}

template <int D, ggml_type TK, ggml_type TV>
static void launch(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q) {
    // K and V have the same type and head size
    const int smem = layout<D>::BYTES + (TK == GGML_TYPE_F16 ? 0 : 2*((KEYS*(int) store.nb_k + 16 + 15)/16*16));
    CUDA_CHECK(cudaFuncSetAttribute(hopper_kernel<D, TK, TV>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    cudaStream_t stream = ctx.stream();
    tca_schedule_memory memory(ctx.pool());
    const tca_schedule w = tca_schedule_make(memory, store, q, D, TILE_ROWS, KEYS, ggml_cuda_info().devices[ctx.device].nsm, stream);
    hopper_kernel<D, TK, TV><<<w.n_runs_max, THREADS, smem, stream>>>(store, q, w);
    tca_schedule_finish(w, store, q, D, stream);
}

template <int D>
static bool launch_types(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q) {
    if (store.type_k != store.type_v) {
        return false;
    }
    switch (store.type_k) {
        case GGML_TYPE_F16:  launch<D, GGML_TYPE_F16,  GGML_TYPE_F16> (ctx, store, q); return true;
        case GGML_TYPE_BF16: launch<D, GGML_TYPE_BF16, GGML_TYPE_BF16>(ctx, store, q); return true;
        case GGML_TYPE_Q8_0: launch<D, GGML_TYPE_Q8_0, GGML_TYPE_Q8_0>(ctx, store, q); return true;
        case GGML_TYPE_Q4_0: launch<D, GGML_TYPE_Q4_0, GGML_TYPE_Q4_0>(ctx, store, q); return true;
        default:             return false;
    }
}

bool tca_cuda_prefill_hopper(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q, int head_dim) {
    if (ggml_cuda_info().devices[ctx.device].cc != GGML_CUDA_CC_HOPPER || q.q_head % 4 != 0 || q.q_token % 4 != 0) {
        return false;
    }
    switch (head_dim) {
        case 64:  return launch_types<64> (ctx, store, q);
        case 128: return launch_types<128>(ctx, store, q);
        default:  return false;
    }
}
