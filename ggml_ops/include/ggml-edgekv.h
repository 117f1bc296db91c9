#pragma once

// ggml operators of edgekv: the contracts. Each is asserted once, in its constructor (ggml/ggml-edgekv.c).
//
// Common shapes
//   keys   [head_size, n_head_kv, n_cells]   rows of one stream of the K cache, any cache type, any nb[1], nb[2];
//                                            the head_size elements of a row are adjacent
//   scores [n_cells, n_head_kv or 1]  F32    higher means: keep; with 1, all KV heads share the scores
//   chosen [n_chosen, n_head_kv]      I32    cells, strictly ascending per KV head
//
// Results do not depend on the number of threads.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

enum ggml_edgekv_score_kind {
    GGML_EDGEKV_SCORE_DOT  = 0, // <vec, key>
    GGML_EDGEKV_SCORE_NORM = 1, // |key|
    GGML_EDGEKV_SCORE_COS  = 2, // <vec, key> / |key|, 0 for a zero key
};

// One number per key, times `scale`. Keys are converted to F32 from their own type; no copy of the cache is made.
//   keys   as above
//   vec    [head_size, n_head_kv] F32, contiguous; NULL for GGML_EDGEKV_SCORE_NORM
//   result [n_cells, n_head_kv]   F32
GGML_API struct ggml_tensor * ggml_edgekv_score(
        struct ggml_context * ctx,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * vec,
        enum ggml_edgekv_score_kind kind,
        float                 scale);

// The mean of the keys, each divided by its norm (keys whose norm is zero or NaN count as zero vectors), per KV head.
//   keys   as above
//   result [head_size, n_head_kv] F32
GGML_API struct ggml_tensor * ggml_edgekv_key_mean(
        struct ggml_context * ctx,
        struct ggml_tensor  * keys);

// The cells that stay: the first n_keep, the last window, and the best-scored of the rest until there are n_chosen.
// Ties go to the later cell; NaN ranks below everything; -0 equals 0.
//   scores [n_cells, n_head_kv or 1] F32, contiguous
//   result [n_chosen, n_head_kv]     I32
//   0 <= n_keep, 0 <= window, n_keep + window <= n_chosen <= n_cells, n_chosen >= 1
GGML_API struct ggml_tensor * ggml_edgekv_choose(
        struct ggml_context * ctx,
        struct ggml_tensor  * scores,
        int64_t               n_head_kv,
        int64_t               n_keep,
        int64_t               window,
        int64_t               n_chosen);

// In place: row i of KV head h becomes what row chosen[i, h] was before the call, bit for bit; rows from n_chosen on
// are left with unspecified old content; nothing outside of the rows is touched.
//   rows   [head_size, n_head_kv, n_cells], any cache type. Either the elements of a row are adjacent (nb[0] is the
//          type's size), or the type is not quantised and a row is strided (a transposed V, nb[2] is the type's size)
//   chosen [n_chosen, n_head_kv] I32, contiguous, strictly ascending per KV head, so chosen[i, h] >= i
//   result a view of rows
// Not every backend must have it: an in-place operator cannot fall back to another one, so ask supports_op first.
GGML_API struct ggml_tensor * ggml_edgekv_compact(
        struct ggml_context * ctx,
        struct ggml_tensor  * rows,
        struct ggml_tensor  * chosen);

// --- selection: which cells a decode step reads (Quest, arXiv 2406.10774) --------------------------------------------
//
// A page is page_size adjacent cells of a stream: page p has the cells [p*page_size, (p + 1)*page_size), the last one
// those that are left.
//
// Common shapes
//   q         [head_size, n_tokens, n_head, n_stream]      F32, the elements of a row adjacent, any other nb
//   keys      [head_size, n_head_kv, n_cells, n_stream]    any cache type, the elements of a row adjacent, any other nb
//   values    [head_size_v, n_head_kv, n_cells, n_stream]  as keys
//   mask      [n_cells, n_tokens or more, 1, n_stream]     F16, contiguous: added to the scores, -inf where a token may
//                                                          not look; a cell is visible if it is not -inf
//   summaries [2*head_size, n_head_kv, n_pages, n_stream]  F16, each stream contiguous: per page and KV head the maximum
//                                                          of each channel of the keys, then the minima
//   pages     [n_chosen, n_head_kv, n_tokens, n_stream]    I32, strictly ascending pages with cells, then -1
//
// n_head is a multiple of n_head_kv: query head h belongs to KV head h/(n_head/n_head_kv).

// In place: the summaries of the pages that hold these cells, or of all pages, from the keys as they are stored. Rounded
// outward, so that maxima are never too small and minima never too large; NaN counts as both infinities.
//   summaries, keys  as above, n_pages*page_size >= n_cells
//   cells            [n] I64: cell + n_cells*stream, any order, may repeat; NULL for all pages
//   result           a view of summaries
GGML_API struct ggml_tensor * ggml_edgekv_summarize(
        struct ggml_context * ctx,
        struct ggml_tensor  * summaries,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * cells,
        int64_t               page_size);

// A bound on the scores in each page: the greatest, over the query heads of the group, of
// sum_i max(q_i*max_i, q_i*min_i). Not below any <q, key> of the page but for the rounding of an F32 sum; may be +inf where
// one of its maxima or minima is infinite.
//   result [n_pages, n_head_kv, n_tokens, n_stream] F32
GGML_API struct ggml_tensor * ggml_edgekv_page_scores(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * summaries);

// The pages to read: among those with a visible cell the first n_first, the last one, and the best-scored of the rest
// until there are n_chosen. Ties go to the later page; NaN ranks below everything. -1 where no page is left.
//   scores  [n_pages, n_head_kv, n_tokens, n_stream] F32, contiguous
//   mask    as above, n_pages*page_size >= n_cells
//   result  pages;  0 <= n_first, 1 <= n_chosen, n_first + 1 <= n_chosen
GGML_API struct ggml_tensor * ggml_edgekv_choose_pages(
        struct ggml_context * ctx,
        struct ggml_tensor  * scores,
        struct ggml_tensor  * mask,
        int64_t               page_size,
        int64_t               n_first,
        int64_t               n_chosen);

// Attention on the cells of the pages, or on all cells (pages NULL), each row of K and V read once per KV head and token.
// As flash attention: softmax over s = softcap*tanh(scale*<q, k>/softcap) + mask, or scale*<q, k> + mask where softcap
// is 0; with sinks, one more term exp(sink) in each head's denominator. A token that sees no cell gets zeros.
//   q, keys, values, mask, pages  as above
//   sinks   [n_head] F32, contiguous, or NULL
//   result  [head_size_v, n_head, n_tokens, n_stream] F32
GGML_API struct ggml_tensor * ggml_edgekv_attn(
        struct ggml_context * ctx,
        struct ggml_tensor  * q,
        struct ggml_tensor  * keys,
        struct ggml_tensor  * values,
        struct ggml_tensor  * mask,
        struct ggml_tensor  * pages,
        struct ggml_tensor  * sinks,
        int64_t               page_size,
        float                 scale,
        float                 softcap);

// Statistics of an operator of selection: each computation adds to counters
//   counters [4] I64, contiguous: nanoseconds of the first thread (GPUs add none), computations (GPUs count those of
//            summarize and choose_pages), and, for choose_pages only, the pages chosen and those that had a visible cell,
//            over all KV heads, tokens and streams
// They become the operator's last source.
#define GGML_EDGEKV_SRC_COUNTERS (GGML_MAX_SRC - 1)

GGML_API void ggml_edgekv_set_counters(
        struct ggml_tensor * op,
        struct ggml_tensor * counters);

#ifdef __cplusplus
}
#endif
