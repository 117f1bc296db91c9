#pragma once

// Graphs on the cache beside those of the context: evictions, summaries that are built anew. A node runs on the device that
// holds the part of the cache that it is about.

#include "ggml-backend.h"
#include "ggml-cpp.h"

#include <string>
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
    void place(ggml_cgraph * gf);

    std::vector<ggml_backend_t> backends;
    ggml_backend_sched_ptr      sched;
};

// The backend of the device that holds a tensor of the cache, or NULL.
ggml_backend_t llama_edgekv_backend_of(const std::vector<ggml_backend_t> & backends, const ggml_tensor * stored);

// Throws as the constructor above does. The graph need not be allocated.
void llama_edgekv_check_devices(const llama_kv_cache & kv, ggml_cgraph * gf, const char * what);

// A tensor of its own in the kind of memory that holds a tensor of the cache, filled with zeros; with no_alloc it has none.
// Throws std::runtime_error, naming `what`, if memory lacks.
struct llama_edgekv_beside {
    llama_edgekv_beside(const ggml_tensor * stored, ggml_type type, const int64_t (&ne)[4], const std::string & name, bool no_alloc, const char * what);

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buf;
    ggml_tensor *           tensor;
};

// A tensor beside each part of the cache, for what comes back to the host: one read per device, however many layers it has.
class llama_edgekv_readback {
public:
    // n[i]: elements of cache layer i; else as llama_edgekv_beside
    llama_edgekv_readback(const llama_kv_cache & kv, ggml_type type, const std::vector<int64_t> & n, const char * name, bool no_alloc);

    // the layer's part, from an element of it on
    ggml_tensor * view(ggml_context * ctx, size_t i_layer, int64_t ne0, int64_t ne1, int64_t from = 0) const;

    // the parts of all layers, after the devices have finished
    template <typename T> std::vector<std::vector<T>> read() const {
        std::vector<std::vector<T>> res(parts.size());
        for (const auto & device : devices) {
            std::vector<T> all(ggml_nelements(device.tensor));
            ggml_backend_tensor_get(device.tensor, all.data(), 0, all.size()*sizeof(T));
            for (size_t i = 0; i < parts.size(); ++i) {
                if (parts[i].tensor == device.tensor) {
                    res[i].assign(all.begin() + parts[i].first, all.begin() + parts[i].first + parts[i].n);
                }
            }
        }
        return res;
    }

    size_t n_bytes() const;

private:
    struct part {
        ggml_tensor * tensor;
        int64_t       first;
        int64_t       n;
    };
    std::vector<llama_edgekv_beside> devices;
    std::vector<part>                parts; // per cache layer
};
