// K-norm (arXiv 2406.11430): keep the keys of the smallest norm.

#include "edgekv-policy.h"
#include "ggml-edgekv.h"

static ggml_tensor * scores(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * /*filters*/) {
    return ggml_edgekv_score(ctx, keys, nullptr, GGML_EDGEKV_SCORE_NORM, -1.0f);
}

const llama_edgekv_policy llama_edgekv_policy_knorm = { "knorm", false, scores };
