#pragma once

// A policy at work on one cache: what it wants to know besides keys and values (filters, the last queries, ages, scores
// from the host), in the memory of each layer's device.

#include "edgekv-compute.h"
#include "edgekv-settings.h"

#include <functional>
#include <vector>

class llama_kv_cache;

class llama_edgekv_scorer {
public:
    // Throws std::runtime_error if the filters do not fit the cache, or if memory lacks.
    llama_edgekv_scorer(const llama_kv_cache & kv, llama_edgekv_settings_ptr cfg);

    // what a policy is told about a stream
    struct stream {
        uint32_t strm;
        uint32_t n_used;
        uint32_t n_exact; // the last cells that hold the last tokens, the same in every head

        llama_pos n_past; // the position that comes next
        uint32_t  budget;

        const llama_edgekv_tap * tap; // the last queries, or NULL

        std::function<llama_pos(size_t i_layer, uint32_t i_head_kv, uint32_t cell)> position;

        const float * given; // scores [n_used, n_head_kv] layer by layer, for a policy that has none of its own
    };

    // Before the scores of a stream are computed. false: the error is set.
    bool prepare(const stream & st);

    // [n_used, n_head_kv or 1] F32, higher means: keep; what prepare() was told, or the most that it could be told
    ggml_tensor * scores(ggml_context * ctx, size_t i_layer, ggml_tensor * keys, ggml_tensor * values) const;

    size_t n_bytes() const;

private:
    bool needs(uint32_t what) const { return (cfg->policy->needs & what) != 0; }

    void load_filters();
    bool load_queries(const stream & st);
    void load_given(const stream & st);
    void load_ages(const stream & st);
    void load(const stream & st, const std::function<float(size_t i_layer, uint32_t i_head_kv, llama_pos pos)> & score);

    const llama_kv_cache &          kv;
    const llama_edgekv_settings_ptr cfg;

    // per cache layer, or empty
    std::vector<llama_edgekv_beside> filters;
    std::vector<llama_edgekv_beside> queries; // [head_size, n_queries, n_head]
    std::vector<llama_edgekv_beside> given;   // [n_used, n_head_kv]: scores, or ages

    std::vector<float> kq_scale; // per cache layer
    int64_t            n_queries;

    // which keys the queries see: [n_used, n_queries], one per kind of memory, and which of them a layer takes
    std::vector<llama_edgekv_beside> masks;
    std::vector<size_t>              mask_of;
};
