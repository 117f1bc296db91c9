// StreamingLLM (arXiv 2309.17453): keep the latest, beside the sinks that every policy keeps.

#include "edgekv-policy.h"

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    // cells lie in the order of their positions, and F32 counts them exactly up to 2^24
    return ggml_arange(ctx, 0.0f, (float) in.keys->ne[2], 1.0f);
}

const llama_edgekv_policy llama_edgekv_policy_streaming = { "streaming", 0, scores, nullptr };
