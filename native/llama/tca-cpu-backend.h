// The CPU backend as libllama sees it: one of possibly several variants, linked or loaded at run time.
#pragma once

#include "cpu/tca-functions.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <string>

// NULL: no CPU backend is loaded, or it is not of this build.
const tca_cpu_functions * tca_cpu_functions_get();

// File name of the loaded CPU backend, which names its variant (libggml-cpu-haswell.so); "" if it cannot be told.
std::string tca_cpu_library();

// A CPU backend of its own for a graph; NULL: none is loaded.
ggml_backend_ptr tca_cpu_backend_new(int n_threads);

// What to say if it is not there.
constexpr const char * TCA_NO_CPU_BACKEND = "no CPU backend of this build is loaded: libggml-cpu*.so is missing beside libggml.so, or "
    "comes from another build; reinstall tca-gguf";
