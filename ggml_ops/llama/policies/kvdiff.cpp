// The sum of three z-scores, per KV head: how unlike a key is to all others (KeyDiff's measure), how unlike its value is,
// and how large the value is. What a token adds to the output is its value times the attention: tokens whose keys and
// values are like those of others are stood in for by them, and small values add little. It needs neither filters nor
// queries.

#include "parts.h"

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    ggml_tensor * rows = llama_edgekv_value_rows(ctx, in.values);

    ggml_tensor * keys   = llama_edgekv_unlike(ctx, in.keys);
    ggml_tensor * values = llama_edgekv_unlike(ctx, rows);
    ggml_tensor * size   = ggml_edgekv_score(ctx, rows, nullptr, GGML_EDGEKV_SCORE_NORM, 1.0f);

    ggml_tensor * sum = ggml_add(ctx, llama_edgekv_zscore(ctx, keys), llama_edgekv_zscore(ctx, values));
    return ggml_add(ctx, sum, llama_edgekv_zscore(ctx, size));
}

const llama_edgekv_policy llama_edgekv_policy_kvdiff = { "kvdiff", 0, scores, nullptr };
