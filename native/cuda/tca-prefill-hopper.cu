// Prefill on Hopper, head sizes 64, 128 and 256: warpgroup matrix instructions (wgmma), which read K and V from shared memory.
//
// A thread block has three warpgroups. The first one loads: it fills a ring of key blocks (K and V, converted to f16 if they are
// anything else) and needs few registers. The other two compute, 64 query rows each: S = Q K^T of the next key block is issued
// before O += P V of the present one, so that the softmax runs while the matrix units work. They take turns in issuing: one has
// the matrix units while the other one has its softmax. Tiles have the 128-byte swizzle that wgmma expects. Whole key blocks are
// brought by the tensor copy engine (TMA): loads by cp.async alone held an H200 at 474 TFLOP/s where the same kernel without loads
// does 609. The last block of an item, which has zeros behind its end, is written by cp.async and fenced for the asynchronous proxy.
//
// A store that is not f16 is converted as a whole first, if there are enough row tiles to read it again (CONVERT_TILES); with few
// the loading warpgroup converts what it loads.
#include "tca-schedule.cuh"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "compile for sm_90a"
#endif

constexpr int TILE_ROWS = 128;
constexpr int THREADS   = 384;

template <int D> constexpr int keys_of = D <= 128 ? 128 : 64;  // key block: what fits shared memory and registers

// Key blocks in the ring, as many as the shared memory holds.
template <int D, ggml_type type> constexpr int stages_of = type != GGML_TYPE_F16 || D > 128 ? 2 : D > 64 ? 3 : 4;

// Row tiles of a region from which on a store that is not f16 is converted first.
constexpr int CONVERT_TILES = 3;

// Named barriers: 1 and 2 the warps of a computing warpgroup, 3 those of the loading one, 4 and 5 the turns of the computing ones.
constexpr int BAR_GROUP = 1, BAR_LOAD = 3, BAR_TURN = 4;

// ---- barriers in shared memory ------------------------------------------------------------------------------------------

static __device__ __forceinline__ void barrier_init(uint32_t bar, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(bar), "r"(count) : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(bar) : "memory");
}

// arrives once what this thread has sent for with cp.async is there
static __device__ __forceinline__ void barrier_arrive_loaded(uint32_t bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(bar) : "memory");
}

// arrives and makes the phase wait for so many bytes of the tensor copy engine, too
static __device__ __forceinline__ void barrier_arrive_expect(uint32_t bar, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"(bytes) : "memory");
}

// box of a tensor [rows, columns] from (row, column) on
static __device__ __forceinline__ void tensor_load(uint32_t dst, const CUtensorMap * map, int column, int row, uint32_t bar) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        :: "r"(dst), "l"(map), "r"(column), "r"(row), "r"(bar) : "memory");
}

static __device__ __forceinline__ void tca_cp_async_wait_all() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// what ordinary stores and cp.async wrote, and barriers made visible, is visible to wgmma, too
static __device__ __forceinline__ void fence_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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
// leading: bytes between blocks of 64 columns, for operands that are read transposed. The lower half, which grows with the
// address: 16 bytes are 1.
static __device__ __forceinline__ uint32_t descriptor_of(uint32_t address, uint32_t leading) {
    return address >> 4 | (leading >> 4) << 16;
}

static __device__ __forceinline__ uint64_t descriptor(uint32_t lower) {
    return (uint64_t) (1024 >> 4 | 1 << 30) << 32 | lower;
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

template <int M, int N> static __device__ __forceinline__ void touch(float (&x)[M][N]) {
#pragma unroll
    for (int i = 0; i < M; ++i) {
        touch(x[i]);
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

// the same with 64 keys
static __device__ __forceinline__ void wgmma_ss(float (&c)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
        " %32, %33, p, 1, 1, 0, 0;\n}\n"
        : R8(c, 0), R8(c, 8), R8(c, 16), R8(c, 24)
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

template <int D, ggml_type type>
struct layout {
    static constexpr int STAGES = stages_of<D, type>;
    static constexpr int KEYS  = keys_of<D>;
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
    constexpr int UNITS = D/8, KEYS = keys_of<D>;
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
    constexpr int UNITS = D/8, KEYS = keys_of<D>;
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
static __global__ void __launch_bounds__(THREADS, 1) hopper_kernel(const tca_store s, const tca_queries a, const tca_schedule w,
        const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v) {  // of f16 stores
    using L = layout<D, TK>;
    constexpr int STAGES = L::STAGES;
    constexpr int KEYS = keys_of<D>;
    constexpr int PARTS = D <= 128 ? 1 : D/128, DIMS = D/PARTS;  // of the output: a product has at most 128 dims here
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

    const int group = __shfl_sync(0xffffffff, threadIdx.x/128, 0);  // so that the compiler knows it to be one value for the warp
    const int tid   = threadIdx.x % 128;

    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(TK == GGML_TYPE_F16 ? 40 : 88));
        int n = 0;  // loads so far: K and V of a key block in turn
        if constexpr (TK == GGML_TYPE_F16) {
            tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & x) {
                for (int j = x.key0; j < x.key1; j += KEYS) {
                    const int64_t slot = (int64_t) x.d[TCA_DESC_OFFSET] + j;
                    for (int is_v = 0; is_v < 2; ++is_v, ++n) {
                        const int      stage = n/2 % STAGES;
                        const uint32_t tile  = smem + (is_v ? L::V : L::K) + stage*L::TILE, full = is_v ? full_v(stage) : full_k(stage);
                        barrier_wait(is_v ? free_v(stage) : free_k(stage), (n/2/STAGES & 1) ^ 1);
                        if (j + KEYS > x.key1) {
                            load_tile<D>(tile, is_v ? s.v + slot*s.nb_v : s.k + slot*s.nb_k, is_v ? s.nb_v : s.nb_k, x.key1 - j, tid);
                            barrier_arrive_loaded(full);
                        } else if (tid > 0) {
                            barrier_arrive(full);
                        } else {
                            barrier_arrive_expect(full, L::TILE);
#pragma unroll
                            for (int panel = 0; panel < D/64; ++panel) {
                                tensor_load(tile + panel*KEYS*128, is_v ? &map_v : &map_k, panel*64, slot, full);
                            }
                        }
                    }
                }
            });
            tca_cp_async_wait_all();
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
                fence_async();
                barrier_arrive(i & 1 ? full_v(stage) : full_k(stage));
            };
            tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & x) {
                for (int j = x.key0; j < x.key1; j += KEYS) {
                    const int64_t slot = (int64_t) x.d[TCA_DESC_OFFSET] + j;
                    for (int is_v = 0; is_v < 2; ++is_v, ++n) {
                        const char * src = is_v ? s.v + slot*s.nb_v : s.k + slot*s.nb_k;
                        const int n_rows = min(KEYS, x.key1 - j);
                        tca_cp_async_wait<0>();
                        asm volatile("bar.sync %0, 128;" :: "n"(BAR_LOAD) : "memory");  // load n - 1 is here, load n - 2 converted
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
            asm volatile("bar.sync %0, 128;" :: "n"(BAR_LOAD) : "memory");
            if (n > 0) {
                convert(n - 1);
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(TK == GGML_TYPE_F16 ? 232 : 208));
    const int wg = group - 1, lane = tid % 32, warp = tid/32;
    const int g = lane/4, t4 = lane % 4;
    const float to_log2 = a.softcap == 0.0f ? a.scale*1.44269504f : 1.44269504f;
    const uint32_t q_tile = smem + L::Q;
    int n = 0;
    // both warpgroups have the same key blocks, hence as many turns
    const auto wait_turn = [&]() { asm volatile("bar.sync %0, 256;"   :: "r"(BAR_TURN + wg) : "memory"); };
    const auto pass_turn = [&]() { asm volatile("bar.arrive %0, 256;" :: "r"(BAR_TURN + (wg ^ 1)) : "memory"); };
    if (wg == 1) {
        pass_turn();  // the first one is warpgroup 0's
    }

    tca_for_each_work(s, a.gqa, w, D, [&](const tca_work & work) {
        const int head = work.head, row0 = work.row0, n_rows = work.n_rows, key0 = work.key0, key1 = work.key1;
        const int past = work.d[TCA_DESC_PAST], token0 = work.d[TCA_DESC_TOKEN];

        // this warpgroup's 64 rows of Q to shared memory; nobody else reads them
        asm volatile("bar.sync %0, 128;" :: "r"(BAR_GROUP + wg) : "memory");
        for (int i = tid; i < 64*(D/8); i += 128) {
            const int r = wg*64 + i/(D/8), unit = i % (D/8);
            const int row = row0 + min(r, n_rows - 1);
            const float4 * q = (const float4 *) (a.q + (head*a.gqa + row % a.gqa)*a.q_head + (token0 + row/a.gqa)*a.q_token + unit*8);
            const float4 x = q[0], y = q[1];
            asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(q_tile + tile_offset(TILE_ROWS, r, unit)),
                "r"(pack(x.x, x.y)), "r"(pack(x.z, x.w)), "r"(pack(y.x, y.y)), "r"(pack(y.z, y.w)) : "memory");
        }
        fence_async();
        asm volatile("bar.sync %0, 128;" :: "r"(BAR_GROUP + wg) : "memory");

        const int r[2] = { wg*64 + warp*16 + g, wg*64 + warp*16 + g + 8 };
        int visible[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            visible[i] = min(past + (row0 + min(r[i], n_rows - 1))/a.gqa + 1, key1);
        }

        float o[PARTS][DIMS/2], c[KEYS/2];
        uint32_t p[KEYS/4];
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < DIMS/2; ++i) {
                o[part][i] = 0.0f;
            }
        }
        float m[2] = { TCA_NO_MAX, TCA_NO_MAX }, l[2] = { 0.0f, 0.0f }, shrink[2];

        const auto scores = [&](int stage) {
            const uint32_t q_lower = descriptor_of(q_tile + wg*64*128, 16), k_lower = descriptor_of(smem + L::K + stage*L::TILE, 16);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < D/16; ++k) {
                // 16 dims are 32 bytes inside a panel
                wgmma_ss(c, descriptor(q_lower + (k/4*TILE_ROWS*128 + k%4*32)/16), descriptor(k_lower + (k/4*KEYS*128 + k%4*32)/16), k > 0);
            }
            wgmma_commit();
        };
        const auto values = [&](int stage) {
            const uint32_t v_lower = descriptor_of(smem + L::V + stage*L::TILE, KEYS*128);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < KEYS/16; ++k) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    wgmma_rs(o[part], p + 4*k, descriptor(v_lower + (part*DIMS/64*KEYS*128 + k*16*128)/16));
                }
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
                float maxima[4] = { -INFINITY, -INFINITY, -INFINITY, -INFINITY };
#pragma unroll
                for (int i = 0; i < KEYS/8; ++i) {
                    maxima[i%2*2]     = fmaxf(maxima[i%2*2],     c[4*i + 2*h]);
                    maxima[i%2*2 + 1] = fmaxf(maxima[i%2*2 + 1], c[4*i + 2*h + 1]);
                }
                float max = fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3]));
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
        fence_async();
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
            barrier_wait(full_v(now), n/STAGES & 1);
            fence_async();
            wait_turn();
            touch(c);
            scores(next);
            touch(o);
            values(now);
            wgmma_wait<1>();
            pass_turn();
            touch(c);
            if (lane == 0) {
                barrier_arrive(free_k(next));
            }
            softmax(j);
            touch(c);
            barrier_wait(full_v(now), n/STAGES & 1);  // long past: without the end of a basic block ptxas waits before the softmax
            wgmma_wait<0>();
            touch(o);
            if (lane == 0) {
                barrier_arrive(free_v(now));
            }
            if (__any_sync(0xffffffff, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                    for (int i = 0; i < DIMS/2; ++i) {
                        o[part][i] *= shrink[i/2%2];
                    }
                }
            }
            probabilities();
            ++n;
        }
        barrier_wait(full_v(n % STAGES), n/STAGES & 1);
        fence_async();
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
                const float * x = o[8*i/DIMS] + 8*i%DIMS/2 + 2*h;
                *(float2 *) (out + 8*i + 2*t4) = make_float2(x[0]*norm, x[1]*norm);
            }
        }
    });
}

// grid (any, regions): rows of the regions' used slots to f16, at the same slots
template <int D>
static __global__ void __launch_bounds__(256) convert_kernel(const tca_store s, const char * rows, size_t nb, int type, half * out) {
    constexpr int UNITS = D/8;
    const int32_t * d = s.desc + (size_t) blockIdx.y*TCA_DESC_SIZE;
    const int n = d[TCA_DESC_COUNT] > 0 ? d[TCA_DESC_USED]*UNITS : 0;
    tca_with_type(type, [&](auto tag) {
        for (int i = blockIdx.x*blockDim.x + threadIdx.x; i < n; i += gridDim.x*blockDim.x) {
            const int64_t slot = (int64_t) d[TCA_DESC_OFFSET] + i/UNITS;
            *(uint4 *) (out + slot*D + i%UNITS*8) = tca_load8_f16<decltype(tag)::value>(rows + slot*nb, i%UNITS);
        }
    });
}

// Rows [n_slots, D] of f16, taken in boxes of a key block by 64 columns.
template <int D>
static CUtensorMap tensor_map(const void * rows, int64_t n_slots) {
    using encode_t = decltype(&cuTensorMapEncodeTiled);
    static const encode_t encode = [] {  // by name, so that the driver's library need not be linked
        void * function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
#else
        CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
        GGML_ASSERT(found == cudaDriverEntryPointSuccess && function != nullptr);
        return (encode_t) function;
    }();
    CUtensorMap map;
    const cuuint64_t size[2] = { D, (cuuint64_t) n_slots }, stride[1] = { D*sizeof(half) };
    const cuuint32_t box[2] = { 64, keys_of<D> }, step[2] = { 1, 1 };
    const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void *>(rows), size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    GGML_ASSERT(result == CUDA_SUCCESS);
    return map;
}

template <int D, ggml_type type>
static void launch(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q) {
    // K and V have the same type and head size
    const int smem = layout<D, type>::BYTES + (type == GGML_TYPE_F16 ? 0 : 2*((keys_of<D>*(int) store.nb_k + 16 + 15)/16*16));
    CUDA_CHECK(cudaFuncSetAttribute(hopper_kernel<D, type, type>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    cudaStream_t stream = ctx.stream();
    tca_schedule_memory memory(ctx.pool());
    const tca_schedule w = tca_schedule_make(memory, store, q, D, TILE_ROWS, keys_of<D>, ggml_cuda_info().devices[ctx.device].nsm, stream);
    CUtensorMap map_k = {}, map_v = {};
    if (type == GGML_TYPE_F16) {
        GGML_ASSERT(store.nb_k == D*sizeof(half) && store.nb_v == D*sizeof(half));
        map_k = tensor_map<D>(store.k, store.n_slots);
        map_v = tensor_map<D>(store.v, store.n_slots);
    }
    hopper_kernel<D, type, type><<<w.n_runs_max, THREADS, smem, stream>>>(store, q, w, map_k, map_v);
    tca_schedule_finish(w, store, q, D, stream);
}

// K or V, converted unless it is f16
template <int D>
static void convert(ggml_backend_cuda_context & ctx, ggml_cuda_pool_alloc<half> & memory, const tca_store & store, char * & rows,
        size_t & nb, int & type, const char * & end) {
    if (type == GGML_TYPE_F16) {
        return;
    }
    half * out = memory.alloc(store.n_slots*D);
    const int n_units = store.n_head_kv*store.n_seqs, n_blocks = ggml_cuda_info().devices[ctx.device].nsm*16;
    convert_kernel<D><<<dim3((n_blocks + n_units - 1)/n_units, n_units), 256, 0, ctx.stream()>>>(store, rows, nb, type, out);
    rows = (char *) out;
    nb   = D*sizeof(half);
    type = GGML_TYPE_F16;
    end  = (const char *) (out + store.n_slots*D);
}

template <int D>
static bool launch_types(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q) {
    if (D > 128 || store.type_k != store.type_v || store.type_k == GGML_TYPE_F32 || store.type_k == GGML_TYPE_F16 ||
            (int64_t) q.n_tokens*q.gqa > (CONVERT_TILES - 1)*TILE_ROWS*store.n_seqs) {
        ggml_cuda_pool_alloc<half> memory_k(ctx.pool()), memory_v(ctx.pool());
        tca_store converted = store;
        convert<D>(ctx, memory_k, store, converted.k, converted.nb_k, converted.type_k, converted.k_end);
        convert<D>(ctx, memory_v, store, converted.v, converted.nb_v, converted.type_v, converted.v_end);
        launch<D, GGML_TYPE_F16>(ctx, converted, q);
        return true;
    }
    if constexpr (D <= 128) {
        switch (store.type_k) {
            case GGML_TYPE_BF16: launch<D, GGML_TYPE_BF16>(ctx, store, q); return true;
            case GGML_TYPE_Q8_0: launch<D, GGML_TYPE_Q8_0>(ctx, store, q); return true;
            case GGML_TYPE_Q4_0: launch<D, GGML_TYPE_Q4_0>(ctx, store, q); return true;
            default: break;
        }
    }
    return false;
}

bool tca_cuda_prefill_hopper(ggml_backend_cuda_context & ctx, const tca_store & store, const tca_queries & q, int head_dim) {
    if (ggml_cuda_info().devices[ctx.device].cc != GGML_CUDA_CC_HOPPER || q.q_head % 4 != 0 || q.q_token % 4 != 0) {
        return false;
    }
    switch (head_dim) {
        case 64:  return launch_types<64> (ctx, store, q);
        case 128: return launch_types<128>(ctx, store, q);
        case 256: return launch_types<256>(ctx, store, q);
        default:  return false;
    }
}
