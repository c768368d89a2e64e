// What this machine can do at best, as the yardstick for the attention kernels: memory read and f32 multiply-adds by all
// threads at once, in the widest vectors that the kernels use.
#include "tca-kernels.h"
#include "tca-simd.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <thread>
#include <vector>

using V = tca_full;

static volatile float sink;  // keeps the compiler from dropping the loops below

static void on_threads(int n, const std::function<void(int)> & body) {
    std::vector<std::thread> threads;
    for (int i = 1; i < n; ++i) {
        threads.emplace_back(body, i);
    }
    body(0);
    for (std::thread & t : threads) {
        t.join();
    }
}

// Seconds of the fastest of n runs: the machine's speed, not that of other programs on it.
static double fastest(int n, const std::function<void()> & run) {
    double best = INFINITY;
    for (int i = 0; i < n; ++i) {
        const auto start = std::chrono::steady_clock::now();
        run();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return best;
}

template <size_t N> static void keep(const V::type (& x)[N]) {
    float lanes[V::lanes];
    for (const V::type & v : x) {
        V::store(lanes, v);
        sink = lanes[0];
    }
}

double tca_cpu_read_bandwidth(int n_threads) {
    constexpr int U = 8;
    // floats a thread; 512 MiB together, many times what a cache would hold on to
    const size_t N = std::max((size_t) 128 << 20, (size_t) n_threads << 20)/n_threads/(U*V::lanes)*(U*V::lanes);
    std::vector<std::vector<float>> data(n_threads);
    on_threads(n_threads, [&](int i) { data[i].assign(N, 1.0f); });  // by the thread that reads it: its own node's memory
    const double seconds = fastest(10, [&] {
        on_threads(n_threads, [&](int i) {
            V::type sum[U];
            std::fill(std::begin(sum), std::end(sum), V::set1(0.0f));
            for (const float * p = data[i].data(), * end = p + N; p < end; p += U*V::lanes) {
                for (int j = 0; j < U; ++j) {
                    sum[j] = V::add(sum[j], V::load(p + j*V::lanes));
                }
            }
            keep(sum);
        });
    });
    return (double) n_threads*N*sizeof(float)/seconds;
}

double tca_cpu_fma_peak(int n_threads) {
    constexpr int U = 12, N = 2000000;  // chains that hide the latency and fit the registers of every extension; rounds
    const double seconds = fastest(10, [&] {
        on_threads(n_threads, [&](int) {
            const V::type a = V::set1(0.5f + 0.0f*sink), b = V::set1(0.25f);
            V::type acc[U];
            std::fill(std::begin(acc), std::end(acc), V::set1(1.0f));
            for (int r = 0; r < N; ++r) {
                for (int j = 0; j < U; ++j) {
                    acc[j] = V::fma(b, acc[j], a);
                }
            }
            keep(acc);
        });
    });
    return 2.0*n_threads*U*N*V::lanes/seconds;
}
