// Q-Filters (arXiv 2503.02812): keep the keys that project highest on the main direction of the head's queries.

#include "edgekv-policy.h"
#include "ggml-edgekv.h"

static ggml_tensor * scores(ggml_context * ctx, ggml_tensor * keys, ggml_tensor * filters) {
    return ggml_edgekv_score(ctx, keys, filters, GGML_EDGEKV_SCORE_DOT, 1.0f);
}

const llama_edgekv_policy llama_edgekv_policy_qfilters = { "qfilters", true, scores };
