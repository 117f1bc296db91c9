#pragma once

// Graphs on the cache beside those of the context: evictions, summaries that are built anew.

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <vector>

class llama_kv_cache;

class llama_edgekv_computer {
public:
    // throws std::runtime_error, naming `what`, if a device that holds a part of the cache lacks an operator of the graph
    // (in-place operators cannot fall back), or if its buffers cannot be allocated
    llama_edgekv_computer(
            const llama_kv_cache & kv,
            std::vector<ggml_backend_t> backends,
            std::vector<ggml_backend_buffer_type_t> bufts,
            ggml_cgraph * worst_case,
            bool no_alloc,
            const char * what);

    // after what the devices still compute
    bool run(ggml_cgraph * gf, int n_threads);

    void   synchronize() const;
    size_t n_bytes()     const;

private:
    std::vector<ggml_backend_t> backends;
    ggml_backend_sched_ptr      sched;
};

// Throws as the constructor above does. The graph need not be allocated.
void llama_edgekv_check_devices(const llama_kv_cache & kv, ggml_cgraph * gf, const char * what);
