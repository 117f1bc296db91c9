// Q-Filters (arXiv 2503.02812): keep the keys that project highest on the main direction of the head's queries.

#include "edgekv-policy.h"
#include "ggml-edgekv.h"

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    return ggml_edgekv_score(ctx, in.keys, in.filters, GGML_EDGEKV_SCORE_DOT, 1.0f);
}

const llama_edgekv_policy llama_edgekv_policy_qfilters = { "qfilters", llama_edgekv_policy::FILTERS, scores, nullptr };
