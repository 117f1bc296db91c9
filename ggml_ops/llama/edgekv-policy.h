#pragma once

// An eviction policy is one small file in policies/: it scores the keys of one layer. Which cells stay (sinks, window,
// best-scored, ties) and how rows move is the same for all of them, see edgekv-evict.h.

#include "ggml.h"

#include <cstdint>

// what a policy may look at; tensors that it does not ask for are NULL
struct llama_edgekv_policy_input {
    ggml_tensor * keys;    // [head_size, n_head_kv, n_used], K's own type
    ggml_tensor * values;  // [head_size_v, n_head_kv, n_used], V's own type; rows may be strided (a transposed V)
    ggml_tensor * filters; // [head_size, n_head_kv] F32, in the basis in which K is stored

    ggml_tensor * ages;    // [n_used, n_head_kv] F32: how many tokens ago each was read, in units of the budget

    // the queries of the last tokens [head_size, n_queries, n_head] F32, in K's basis, and which keys each of them sees, as
    // a mask to add [n_used, n_queries] F32; kq_scale turns <query, key> into what the softmax gets
    ggml_tensor * queries;
    ggml_tensor * mask;
    float         kq_scale;
};

struct llama_edgekv_policy {
    const char * name;

    enum : uint32_t {
        FILTERS = 1, // one vector per cache layer and KV head, taken from the model file
        QUERIES = 2,
        GIVEN   = 4, // scores come from the host
        AGES    = 8,
    };
    uint32_t needs;

    // [n_used, n_head_kv or 1] F32, higher means: keep; NULL for GIVEN
    ggml_tensor * (*scores)(ggml_context * ctx, const llama_edgekv_policy_input & in);

    // for GIVEN: the score of a token at its true position; NULL if whoever evicts brings the scores
    float (*score)(uint32_t i_layer, uint32_t i_head_kv, int32_t pos);
};

extern const llama_edgekv_policy llama_edgekv_policy_qfilters;
extern const llama_edgekv_policy llama_edgekv_policy_streaming;
extern const llama_edgekv_policy llama_edgekv_policy_knorm;
extern const llama_edgekv_policy llama_edgekv_policy_keydiff;
extern const llama_edgekv_policy llama_edgekv_policy_kvdiff;
extern const llama_edgekv_policy llama_edgekv_policy_kvdiff_qfilters_recency;
extern const llama_edgekv_policy llama_edgekv_policy_qfilters_keydiff;
extern const llama_edgekv_policy llama_edgekv_policy_snapkv;
extern const llama_edgekv_policy llama_edgekv_policy_random;
extern const llama_edgekv_policy llama_edgekv_policy_given;

// NULL if there is none of that name
const llama_edgekv_policy * llama_edgekv_policy_find(const char * name);
