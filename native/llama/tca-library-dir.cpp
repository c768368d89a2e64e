#include "tca-library-dir.h"

#if defined(GGML_BACKEND_DL) && !defined(_WIN32)
#    include <dlfcn.h>
#endif

std::string tca_library_dir() {
#if defined(GGML_BACKEND_DL) && !defined(_WIN32)
    Dl_info info;
    if (dladdr((const void *) tca_library_dir, &info) != 0 && info.dli_fname != nullptr) {
        const std::string path = info.dli_fname;
        const size_t slash = path.rfind('/');
        return slash == std::string::npos ? "." : path.substr(0, slash);
    }
#endif
    return "";
}
