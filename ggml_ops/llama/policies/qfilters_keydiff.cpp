// The sum of the z-scores of Q-Filters and KeyDiff, per KV head.

#include "parts.h"

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    ggml_tensor * looked_at = ggml_edgekv_score(ctx, in.keys, in.filters, GGML_EDGEKV_SCORE_DOT, 1.0f);

    return ggml_add(ctx, llama_edgekv_zscore(ctx, looked_at), llama_edgekv_zscore(ctx, llama_edgekv_unlike(ctx, in.keys)));
}

const llama_edgekv_policy llama_edgekv_policy_qfilters_keydiff = {
    "qfilters+keydiff", llama_edgekv_policy::FILTERS, scores, nullptr,
};
