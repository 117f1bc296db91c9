// K-norm (arXiv 2406.11430): keep the keys of the smallest norm.

#include "edgekv-policy.h"
#include "ggml-edgekv.h"

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    return ggml_edgekv_score(ctx, in.keys, nullptr, GGML_EDGEKV_SCORE_NORM, -1.0f);
}

const llama_edgekv_policy llama_edgekv_policy_knorm = { "knorm", 0, scores, nullptr };
