// KeyDiff (arXiv 2504.15364): keep the keys least alike (cosine) to the mean of the normalised keys.

#include "parts.h"

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    return llama_edgekv_unlike(ctx, in.keys);
}

const llama_edgekv_policy llama_edgekv_policy_keydiff = { "keydiff", 0, scores, nullptr };
