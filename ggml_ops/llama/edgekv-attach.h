#pragma once

// Which memories eviction and selection know, and what a context's cache gets attached.

#include "ggml-backend.h"

#include <cstdint>
#include <vector>

class  llama_kv_cache;
class  llama_memory_recurrent;
struct llama_cparams;
struct llama_memory_i;
struct llama_model;

// what a context's memory consists of, as far as eviction and selection know it
struct llama_edgekv_caches {
    llama_kv_cache         * attn = nullptr; // full attention; NULL: not a memory that they know
    llama_kv_cache         * swa  = nullptr; // the sliding-window half of a pair
    llama_memory_recurrent * recr = nullptr; // the recurrent half of a hybrid
};

llama_edgekv_caches llama_edgekv_find_caches(llama_memory_i * memory);

// Throws std::runtime_error if the model, its cache or the context cannot do what the context's settings ask for.
void llama_edgekv_check(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory);

// The nodes that our operators need in a context's graph beyond what llama.cpp's own bound leaves free.
uint32_t llama_edgekv_graph_nodes(const llama_model & model, const llama_cparams & cparams);

// Gives the memory's cache an evictor and a selector, if the settings ask for them, before the context reserves its
// graphs. Throws as their constructors do.
void llama_edgekv_attach(
        llama_memory_i * memory,
        const llama_model & model,
        const llama_cparams & cparams,
        const std::vector<ggml_backend_t> & backends,
        const std::vector<ggml_backend_buffer_type_t> & bufts);
