// Large pages for memory that is read from end to end at every step.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#    include <sys/mman.h>
#endif

// Asks the kernel to back the memory by large pages: prefetches and reads then miss fewer address translations. A wish only;
// before the memory is first written it costs nothing.
static inline void tca_prefer_large_pages(void * data, size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096;  // madvise wants multiples of the page size; larger base pages make it refuse, which is fine
    const uintptr_t begin = ((uintptr_t) data + PAGE - 1)/PAGE*PAGE, end = ((uintptr_t) data + size)/PAGE*PAGE;
    if (begin < end) {
        madvise((void *) begin, end - begin, MADV_HUGEPAGE);
    }
#else
    (void) data;
    (void) size;
#endif
}
