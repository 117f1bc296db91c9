// KeyDiff (arXiv 2504.15364): keep the keys least alike (cosine) to the mean of the normalised keys.

#include "edgekv-policy.h"
#include "ggml-edgekv.h"

static ggml_tensor * scores(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * /*filters*/) {
    // the norm of the mean scales all scores of a head alike, so it need not be divided out
    return ggml_edgekv_score(ctx, keys, ggml_edgekv_key_mean(ctx, keys), GGML_EDGEKV_SCORE_COS, -1.0f);
}

const llama_edgekv_policy llama_edgekv_policy_keydiff = { "keydiff", false, scores };
