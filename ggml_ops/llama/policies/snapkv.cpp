// SnapKV (arXiv 2404.14469, section 3.2): keep the keys that the last queries attended to, pooled over neighbours. With
// grouped-query attention the mean over the group's query heads.

#include "edgekv-policy.h"

static constexpr int KERNEL = 5;

static ggml_tensor * scores(ggml_context * ctx, const llama_edgekv_policy_input & in) {
    const int64_t n_used    = in.keys->ne[2];
    const int64_t n_head_kv = in.keys->ne[1];
    const int64_t n_queries = in.queries->ne[1];
    const int64_t n_head    = in.queries->ne[2];
    const int64_t n_before  = n_used - n_queries; // the window's own keys stay anyway

    if (n_before <= 0) {
        return ggml_arange(ctx, 0.0f, (float) n_used, 1.0f);
    }
    ggml_tensor * keys = ggml_permute(ctx, in.keys, 0, 2, 1, 3);
    ggml_tensor * attn = ggml_mul_mat(ctx, keys, in.queries); // [n_used, n_queries, n_head]
    attn = ggml_soft_max_ext(ctx, attn, in.mask, in.kq_scale, 0.0f);

    attn = ggml_cont(ctx, ggml_permute(ctx, attn, 1, 0, 2, 3));
    attn = ggml_reshape_2d(ctx, ggml_mean(ctx, attn), n_used, n_head);
    attn = ggml_cont(ctx, ggml_view_2d(ctx, attn, n_before, n_head, attn->nb[1], 0));

    // zeros beyond both ends count, as in the published code
    attn = ggml_pad_ext(ctx, attn, KERNEL/2, KERNEL/2, 0, 0, 0, 0, 0, 0);
    attn = ggml_pool_1d(ctx, attn, GGML_OP_POOL_AVG, KERNEL, 1, 0);

    attn = ggml_reshape_3d(ctx, attn, n_before, n_head/n_head_kv, n_head_kv);
    attn = ggml_cont(ctx, ggml_permute(ctx, attn, 1, 0, 2, 3));
    attn = ggml_reshape_2d(ctx, ggml_mean(ctx, attn), n_before, n_head_kv);

    return ggml_pad(ctx, attn, (int) n_queries, 0, 0, 0);
}

const llama_edgekv_policy llama_edgekv_policy_snapkv = { "snapkv", llama_edgekv_policy::QUERIES, scores, nullptr };
