#pragma once

// What policies share.

#include "edgekv-policy.h"
#include "ggml-edgekv.h"

// How unlike (cosine) each row is to the mean of the normalised rows of its head, as KeyDiff has it for keys.
inline ggml_tensor * llama_edgekv_unlike(ggml_context * ctx, ggml_tensor * rows) {
    // the norm of the mean scales all scores of a head alike, so it need not be divided out
    return ggml_edgekv_score(ctx, rows, ggml_edgekv_key_mean(ctx, rows), GGML_EDGEKV_SCORE_COS, -1.0f);
}

// Scores of different kinds can be added when each head's have mean 0 and variance 1.
inline ggml_tensor * llama_edgekv_zscore(ggml_context * ctx, ggml_tensor * scores) {
    return ggml_norm(ctx, scores, 1e-12f); // equal scores must not become NaN
}

// V as rows of adjacent elements: without flash attention the cache stores it transposed.
inline ggml_tensor * llama_edgekv_value_rows(ggml_context * ctx, ggml_tensor * values) {
    return values->nb[0] == ggml_type_size(values->type) ? values : ggml_cont(ctx, values);
}

// The sum of three z-scores, per KV head: how unlike a key is to all others (KeyDiff's measure), how unlike its value is,
// and how large the value is.
inline ggml_tensor * llama_edgekv_kvdiff(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    ggml_tensor * rows = llama_edgekv_value_rows(ctx, in.values);

    ggml_tensor * keys   = llama_edgekv_unlike(ctx, in.keys);
    ggml_tensor * values = llama_edgekv_unlike(ctx, rows);
    ggml_tensor * size   = ggml_edgekv_score(ctx, rows, nullptr, GGML_EDGEKV_SCORE_NORM, 1.0f);

    ggml_tensor * sum = ggml_add(ctx, llama_edgekv_zscore(ctx, keys), llama_edgekv_zscore(ctx, values));
    return ggml_add(ctx, sum, llama_edgekv_zscore(ctx, size));
}
