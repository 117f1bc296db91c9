// Constructors of selection: they assert the contracts of ggml-edgekv.h and record parameters, nothing else. Where a backend
// wants scratch behind the result (Metal), what its size hangs on is among the parameters: RPC clients remember sizes by
// them and by the shape of the result.

#include "ggml-edgekv.h"
#include "ggml-impl.h"

static void assert_query(const struct ggml_tensor * q) {
    GGML_ASSERT(q->type == GGML_TYPE_F32);
    GGML_ASSERT(q->nb[0] == sizeof(float));
}

static void assert_rows(const struct ggml_tensor * rows) {
    GGML_ASSERT(rows->nb[0] == ggml_type_size(rows->type));
    GGML_ASSERT(rows->ne[0] % ggml_blck_size(rows->type) == 0);
    GGML_ASSERT(rows->ne[2] <= INT32_MAX);
}

static void assert_summaries(const struct ggml_tensor * summaries) {
    GGML_ASSERT(summaries->type == GGML_TYPE_F16);
    GGML_ASSERT(summaries->nb[0] == sizeof(ggml_fp16_t));
    GGML_ASSERT(summaries->nb[1] == summaries->ne[0]*summaries->nb[0]);
    GGML_ASSERT(summaries->nb[2] == summaries->ne[1]*summaries->nb[1]);
}

static void assert_mask(const struct ggml_tensor * mask) {
    GGML_ASSERT(mask->type == GGML_TYPE_F16);
    GGML_ASSERT(ggml_is_contiguous(mask));
    GGML_ASSERT(mask->ne[2] == 1);
}

struct ggml_tensor * ggml_edgekv_summarize(
        struct ggml_context * ctx,
        struct ggml_tensor  * summaries,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * cells,
        int64_t               page_size) {
    assert_summaries(summaries);
    assert_rows(keys);
    GGML_ASSERT(page_size >= 1 && page_size <= INT32_MAX);
    GGML_ASSERT(summaries->ne[0] == 2*keys->ne[0]);
    GGML_ASSERT(summaries->ne[1] == keys->ne[1]);
    GGML_ASSERT(summaries->ne[2]*page_size >= keys->ne[2]);
    GGML_ASSERT(summaries->ne[3] == keys->ne[3]);
    if (cells) {
        GGML_ASSERT(cells->type == GGML_TYPE_I64);
        GGML_ASSERT(ggml_is_contiguous(cells));
        GGML_ASSERT(ggml_nelements(cells) == cells->ne[0]);
    }

    struct ggml_tensor * result = ggml_view_tensor(ctx, summaries);

    ggml_set_op_params_i32(result, 0, (int32_t) page_size);

    result->op     = GGML_OP_EDGEKV_SUMMARIZE;
    result->src[0] = summaries;
    result->src[1] = keys;
    result->src[2] = cells;

    return result;
}

struct ggml_tensor * ggml_edgekv_page_scores(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * summaries) {
    assert_query(q);
    assert_summaries(summaries);
    GGML_ASSERT(summaries->ne[0] == 2*q->ne[0]);
    GGML_ASSERT(q->ne[2] % summaries->ne[1] == 0);
    GGML_ASSERT(q->ne[3] == summaries->ne[3]);

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, summaries->ne[2], summaries->ne[1], q->ne[1], q->ne[3]);

    result->op     = GGML_OP_EDGEKV_PAGE_SCORES;
    result->src[0] = q;
    result->src[1] = summaries;

    return result;
}

struct ggml_tensor * ggml_edgekv_choose_pages(
        struct ggml_context * ctx,
        struct ggml_tensor  * scores,
        struct ggml_tensor  * mask,
        int64_t               page_size,
        int64_t               n_first,
        int64_t               n_chosen) {
    GGML_ASSERT(scores->type == GGML_TYPE_F32);
    GGML_ASSERT(ggml_is_contiguous(scores));
    assert_mask(mask);
    GGML_ASSERT(page_size >= 1 && page_size <= INT32_MAX);
    GGML_ASSERT(scores->ne[0]*page_size >= mask->ne[0]);
    GGML_ASSERT(mask->ne[1] >= scores->ne[2]); // a mask may be padded
    GGML_ASSERT(mask->ne[3] == scores->ne[3]);
    GGML_ASSERT(n_first >= 0 && n_first + 1 <= n_chosen && n_chosen <= INT32_MAX);

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_chosen, scores->ne[1], scores->ne[2], scores->ne[3]);

    ggml_set_op_params_i32(result, 0, (int32_t) page_size);
    ggml_set_op_params_i32(result, 1, (int32_t) n_first);
    ggml_set_op_params_i32(result, 2, (int32_t) scores->ne[0]);

    result->op     = GGML_OP_EDGEKV_CHOOSE_PAGES;
    result->src[0] = scores;
    result->src[1] = mask;

    return result;
}

struct ggml_tensor * ggml_edgekv_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * values,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * pages,
        struct ggml_tensor  * sinks,
        int64_t               page_size,
        float                 scale,
        float                 softcap) {
    assert_query(q);
    assert_rows(keys);
    assert_rows(values);
    assert_mask(mask);
    GGML_ASSERT(q->ne[0] == keys->ne[0]);
    GGML_ASSERT(q->ne[2] % keys->ne[1] == 0);
    GGML_ASSERT(q->ne[3] == keys->ne[3]);
    GGML_ASSERT(values->ne[1] == keys->ne[1] && values->ne[2] == keys->ne[2] && values->ne[3] == keys->ne[3]);
    GGML_ASSERT(mask->ne[0] == keys->ne[2] && mask->ne[1] >= q->ne[1] && mask->ne[3] == q->ne[3]);
    GGML_ASSERT(page_size >= 1 && page_size <= INT32_MAX);
    if (pages) {
        GGML_ASSERT(pages->type == GGML_TYPE_I32);
        GGML_ASSERT(ggml_is_contiguous(pages));
        GGML_ASSERT(pages->ne[1] == keys->ne[1] && pages->ne[2] == q->ne[1] && pages->ne[3] == q->ne[3]);
    }
    if (sinks) {
        GGML_ASSERT(sinks->type == GGML_TYPE_F32);
        GGML_ASSERT(ggml_is_contiguous(sinks));
        GGML_ASSERT(ggml_nelements(sinks) == q->ne[2]);
    }

    struct ggml_tensor * result = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, values->ne[0], q->ne[2], q->ne[1], q->ne[3]);

    ggml_set_op_params_i32(result, 0, (int32_t) page_size);
    ggml_set_op_params_f32(result, 1, scale);
    ggml_set_op_params_f32(result, 2, softcap);
    ggml_set_op_params_i32(result, 3, (int32_t) keys->ne[1]);

    result->op     = GGML_OP_EDGEKV_ATTN;
    result->src[0] = q;
    result->src[1] = keys;
    result->src[2] = values;
    result->src[3] = mask;
    result->src[4] = pages;
    result->src[5] = sinks;

    return result;
}

void ggml_edgekv_set_counters(
        struct ggml_tensor * op,
        struct ggml_tensor * counters) {
    GGML_ASSERT(op->op == GGML_OP_EDGEKV_SUMMARIZE || op->op == GGML_OP_EDGEKV_PAGE_SCORES ||
                op->op == GGML_OP_EDGEKV_CHOOSE_PAGES || op->op == GGML_OP_EDGEKV_ATTN);
    GGML_ASSERT(counters->type == GGML_TYPE_I64);
    GGML_ASSERT(ggml_is_contiguous(counters));
    GGML_ASSERT(ggml_nelements(counters) == 4);

    op->src[GGML_EDGEKV_SRC_COUNTERS] = counters;
}
