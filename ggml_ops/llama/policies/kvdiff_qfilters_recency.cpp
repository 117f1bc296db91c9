// kvdiff finds facts again, Q-Filters know what is looked at on average, and of all else the latest is needed most: a token
// loses RECENCY, in units of a z-score, with every budget's worth of tokens that come after it. So where the budget holds half
// of the text age costs little, and where it holds a sixteenth the cache is mostly a window. Both numbers were tuned on
// SmolLM2-135M, see docs/quality.md.

#include "parts.h"

static constexpr float QFILTERS = 0.5f;
static constexpr float RECENCY  = 1.5f;

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    ggml_tensor * looked_at = ggml_edgekv_score(ctx, in.keys, in.filters, GGML_EDGEKV_SCORE_DOT, 1.0f);

    ggml_tensor * sum = ggml_add(ctx, llama_edgekv_kvdiff(ctx, in), ggml_scale(ctx, llama_edgekv_zscore(ctx, looked_at), QFILTERS));
    return ggml_sub(ctx, sum, ggml_scale(ctx, in.ages, RECENCY));
}

const llama_edgekv_policy llama_edgekv_policy_kvdiff_qfilters_recency = {
    "kvdiff+qfilters+recency", llama_edgekv_policy::FILTERS | llama_edgekv_policy::AGES, scores, nullptr,
};
