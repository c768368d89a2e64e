// Layers on other machines.
#pragma once

#include "ggml-backend.h"

// GGML_STATUS_FAILED if a server that took part in the graph is gone, else `status`. Waits for the graph if there is such a server:
// its loss shows in what is received, and llama_decode() must not return without an error then.
ggml_status llama_tca_compute_status(ggml_backend_sched_t sched, ggml_status status);
