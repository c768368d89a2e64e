// The frame of the native tests: TEST(name) { ... CHECK(condition, "format", ...); }, and main() in one program a file.
#pragma once

#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

struct check_failed : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct test_case {
    const char * name;
    void (*run)();
};

inline std::vector<test_case> & test_cases() {
    static std::vector<test_case> cases;
    return cases;
}

inline long & n_checks() {
    static long n = 0;
    return n;
}

inline std::string text_of(const char * format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text_of(const char * format, ...) {
    char buffer[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(buffer, sizeof(buffer), format, args);
    va_end(args);
    return buffer;
}

// Ends the test if the condition is false. A comparison with a NaN is false: write conditions that must hold.
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        ++n_checks();                                                                                                  \
        if (!(condition)) {                                                                                            \
            throw check_failed(std::string(__FILE__ ":") + std::to_string(__LINE__) + ": " #condition ": " +           \
                    text_of(__VA_ARGS__));                                                                             \
        }                                                                                                              \
    } while (0)

#define TEST(name)                                                                                                     \
    static void test_##name();                                                                                         \
    static const bool added_##name = (test_cases().push_back({ #name, test_##name }), true);                           \
    static void test_##name()

// Seeded numbers that are the same on every platform (splitmix64).
struct random_t {
    uint64_t state;

    explicit random_t(uint64_t seed) : state(seed*0x9e3779b97f4a7c15ull + 1) {}

    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30))*0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27))*0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }

    int64_t below(int64_t n) { return next() % (uint64_t) n; }                         // [0, n)
    int64_t range(int64_t a, int64_t b) { return a + below(b - a + 1); }               // [a, b]
    float   uniform() { return (next() >> 40)*(1.0f/16777216.0f); }                    // [0, 1)
    float   normal() {                                                                 // close enough to a normal one
        float sum = 0.0f;
        for (int i = 0; i < 12; ++i) {
            sum += uniform();
        }
        return sum - 6.0f;
    }

    template <typename T> const T & pick(const std::vector<T> & list) { return list[below(list.size())]; }
};

// Arguments: names of tests to run (none: all), or --list.
inline int run_tests(int argc, char ** argv) {
    int n_failed = 0, n_run = 0;
    for (const test_case & test : test_cases()) {
        bool wanted = argc == 1;
        for (int i = 1; i < argc; ++i) {
            wanted = wanted || strcmp(argv[i], test.name) == 0;
            if (strcmp(argv[i], "--list") == 0) {
                printf("%s\n", test.name);
            }
        }
        if (!wanted) {
            continue;
        }
        const auto start = std::chrono::steady_clock::now();
        const long before = n_checks();
        std::string problem;
        try {
            test.run();
        } catch (const std::exception & e) {
            problem = e.what();
        }
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
        printf("%-6s %-44s %8ld checks %7.2f s\n", problem.empty() ? "ok" : "FAILED", test.name, n_checks() - before, seconds);
        if (!problem.empty()) {
            printf("       %s\n", problem.c_str());
            ++n_failed;
        }
        fflush(stdout);
        ++n_run;
    }
    if (argc > 1 && n_run == 0 && strcmp(argv[1], "--list") != 0) {
        printf("no test has that name; --list shows them\n");
        return 1;
    }
    return n_failed > 0;
}
