// Constructors: they assert the contracts of ggml-edgekv.h and record parameters, nothing else.

#include "ggml-edgekv.h"
#include "ggml-impl.h"

struct ggml_tensor * ggml_edgekv_score(
        struct ggml_context * ctx,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * vec,
        enum ggml_edgekv_score_kind kind,
        float                 scale) {
    GGML_ASSERT(keys->nb[0] == ggml_type_size(keys->type));
    GGML_ASSERT(keys->ne[0] % ggml_blck_size(keys->type) == 0);
    GGML_ASSERT(keys->ne[3] == 1);

    if (kind == GGML_EDGEKV_SCORE_NORM) {
        GGML_ASSERT(vec == NULL);
    } else {
        GGML_ASSERT(kind == GGML_EDGEKV_SCORE_DOT || kind == GGML_EDGEKV_SCORE_COS);
        GGML_ASSERT(vec != NULL);
        GGML_ASSERT(vec->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_contiguous(vec));
        GGML_ASSERT(vec->ne[0] == keys->ne[0]);
        GGML_ASSERT(vec->ne[1] == keys->ne[1]);
        GGML_ASSERT(vec->ne[2] == 1 && vec->ne[3] == 1);
    }

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, keys->ne[2], keys->ne[1]);

    ggml_set_op_params_i32(result, 0, (int32_t) kind);
    ggml_set_op_params_f32(result, 1, scale);

    result->op     = GGML_OP_EDGEKV_SCORE;
    result->src[0] = keys;
    result->src[1] = vec;

    return result;
}

struct ggml_tensor * ggml_edgekv_key_mean(
        struct ggml_context * ctx,
        struct ggml_tensor  * keys) {
    GGML_ASSERT(keys->nb[0] == ggml_type_size(keys->type));
    GGML_ASSERT(keys->ne[0] % ggml_blck_size(keys->type) == 0);
    GGML_ASSERT(keys->ne[3] == 1);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, keys->ne[0], keys->ne[1]);

    result->op     = GGML_OP_EDGEKV_KEY_MEAN;
    result->src[0] = keys;

    return result;
}

struct ggml_tensor * ggml_edgekv_choose(
        struct ggml_context * ctx,
        struct ggml_tensor  * scores,
        int64_t               n_head_kv,
        int64_t               n_keep,
        int64_t               window,
        int64_t               n_chosen) {
    const int64_t n_cells = scores->ne[0];

    GGML_ASSERT(scores->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_is_contiguous(scores));
    GGML_ASSERT(scores->ne[1] == n_head_kv || scores->ne[1] == 1);
    GGML_ASSERT(scores->ne[2] == 1 && scores->ne[3] == 1);
    GGML_ASSERT(n_cells <= INT32_MAX);
    GGML_ASSERT(n_keep >= 0 && window >= 0);
    GGML_ASSERT(n_keep + window <= n_chosen);
    GGML_ASSERT(n_chosen >= 1 && n_chosen <= n_cells);

    struct ggml_tensor * result = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_chosen, n_head_kv);

    ggml_set_op_params_i32(result, 0, (int32_t) n_keep);
    ggml_set_op_params_i32(result, 1, (int32_t) window);

    result->op     = GGML_OP_EDGEKV_CHOOSE;
    result->src[0] = scores;

    return result;
}

struct ggml_tensor * ggml_edgekv_compact(
        struct ggml_context * ctx,
        struct ggml_tensor  * rows,
        struct ggml_tensor  * chosen) {
    const size_t ts = ggml_type_size(rows->type);

    GGML_ASSERT(rows->nb[0] == ts || (ggml_blck_size(rows->type) == 1 && rows->nb[2] == ts));
    GGML_ASSERT(rows->ne[0] % ggml_blck_size(rows->type) == 0);
    GGML_ASSERT(rows->ne[3] == 1);
    GGML_ASSERT(chosen->type == GGML_TYPE_I32);
    GGML_ASSERT(ggml_is_contiguous(chosen));
    GGML_ASSERT(chosen->ne[0] <= rows->ne[2]);
    GGML_ASSERT(chosen->ne[1] == rows->ne[1]);
    GGML_ASSERT(chosen->ne[2] == 1 && chosen->ne[3] == 1);

    struct ggml_tensor * result = ggml_view_tensor(ctx, rows);

    result->op     = GGML_OP_EDGEKV_COMPACT;
    result->src[0] = rows;
    result->src[1] = chosen;

    return result;
}
