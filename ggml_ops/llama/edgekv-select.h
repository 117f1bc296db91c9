#pragma once

// Selection in one llama_kv_cache: what a decode step reads (Quest, arXiv 2406.10774, section 3.3).
//
// Summaries of the pages lie beside K, for the layers that are selected from. Whatever writes K in a graph updates those of
// the pages it touches, in the same graph: llama_kv_cache::cpy_k() calls summarize(). What writes it otherwise (an
// eviction, a copied stream, a state that is loaded, shifted positions) calls changed(), and refresh() builds the
// summaries of that stream anew before the next ubatch.
//
// A page that is not full yet has old rows behind the new ones. They only widen its bound, and the newest page is always
// read.

#include "edgekv-compute.h"
#include "edgekv-settings.h"

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

class  llama_kv_cache;
struct llama_cparams;
struct llama_ubatch;

class llama_edgekv_selector {
public:
    // throws std::runtime_error where a device cannot run the operators, or memory lacks
    llama_edgekv_selector(
            llama_kv_cache & kv,
            const llama_cparams & cparams,
            std::vector<ggml_backend_t> backends,
            std::vector<ggml_backend_buffer_type_t> bufts);

    // the node that stores keys, followed by the one that updates the summaries
    ggml_tensor * summarize(ggml_context * ctx, ggml_tensor * stored, ggml_tensor * k_idxs, size_t i_layer) const;

    // The attention of a decode step, [head_size_v*n_head, n_tokens] as build_attn_mha() has it; NULL where stock's stays.
    // It runs where the layer's cache lives: the scheduler, left alone, may copy K and V to where q is.
    //   q                [head_size, n_head, n_tokens]
    //   k, v, mask       as llama_kv_cache_context gives them
    ggml_tensor * build_attn(
            ggml_context * ctx,
            ggml_cgraph  * gf,
            ggml_backend_sched_t sched,
            const llama_ubatch & ubatch,
            ggml_tensor  * q,
            ggml_tensor  * k,
            ggml_tensor  * v,
            ggml_tensor  * mask,
            ggml_tensor  * sinks,
            float          scale,
            int            il) const;

    void changed(uint32_t strm) { stale[strm] = true; }
    bool refresh();

    // the bytes of the summaries, by type of buffer
    void add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const;

    // the part of the statistics that is about selection
    void add_to(llama_edgekv_stats & stats) const;

private:
    // what is counted, per layer
    enum counter { SUMMARIZE, SCORES, CHOICE, ATTN, DENSE, N_COUNTERS };

    struct layer {
        ggml_tensor * summaries = nullptr; // NULL: not selected from
    };

    // the pages of cells [0, n) of streams [s0, s0 + ns)
    ggml_tensor * view(ggml_context * ctx, const layer & l, uint32_t n, uint32_t s0, uint32_t ns) const;
    ggml_tensor * count(ggml_context * ctx, ggml_tensor * op, size_t i_layer, counter what) const;

    ggml_cgraph * build_graph(ggml_context * ctx, uint32_t strm, uint32_t n) const;
    ggml_context_ptr graph_context() const;

    void allocate();

    void check_devices() const;

    llama_kv_cache & kv;

    const llama_edgekv_settings_ptr cfg;
    const std::vector<ggml_backend_t> backends;
    const int32_t n_threads;

    std::vector<layer> layers; // of the cache
    std::vector<llama_edgekv_beside> summaries;

    std::unique_ptr<llama_edgekv_readback> counters; // [4, N_COUNTERS] of each cache layer

    std::vector<bool> stale; // per stream

    std::unique_ptr<llama_edgekv_computer> computer; // NULL: no layer has summaries
};
