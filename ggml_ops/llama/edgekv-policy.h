#pragma once

// An eviction policy is one small file in policies/: it scores the keys of one layer. Which cells stay (sinks, window,
// best-scored, ties) and how rows move is the same for all of them, see edgekv-evict.h.

#include "ggml.h"

struct llama_edgekv_policy {
    const char * name;

    // one vector per cache layer and KV head, taken from the model file
    bool needs_filters;

    // keys    [head_size, n_head_kv, n_used], K's own type
    // filters [head_size, n_head_kv] F32, rotated into the basis in which K is stored; NULL unless needs_filters
    // result  [n_used, n_head_kv or 1] F32, higher means: keep
    ggml_tensor * (*scores)(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * filters);
};

extern const llama_edgekv_policy llama_edgekv_policy_qfilters;
extern const llama_edgekv_policy llama_edgekv_policy_streaming;
extern const llama_edgekv_policy llama_edgekv_policy_knorm;
extern const llama_edgekv_policy llama_edgekv_policy_keydiff;

// NULL if there is none of that name
const llama_edgekv_policy * llama_edgekv_policy_find(const char * name);
