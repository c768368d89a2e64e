// The CPU backend as libllama sees it: one of possibly several variants, linked or loaded at run time.
#pragma once

#include "cpu/tca-functions.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"

// NULL: no CPU backend is loaded, or it is not of this build.
const tca_cpu_functions * tca_cpu_functions_get();

// A CPU backend of its own for a graph; NULL: none is loaded.
ggml_backend_ptr tca_cpu_backend_new(int n_threads);

// What to say if it is not there.
constexpr const char * TCA_NO_CPU_BACKEND = "no CPU backend of this build is loaded; call ggml_backend_load_all() first, with the folder of "
    "this installation's libraries (tca_gguf does it when it is imported)";
