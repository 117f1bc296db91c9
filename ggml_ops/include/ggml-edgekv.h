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
// are left with unspecified old content.
//   rows   [head_size, n_head_kv, n_cells], any cache type. Either the elements of a row are adjacent (nb[0] is the
//          type's size), or the type is not quantised and a row is strided (a transposed V, nb[2] is the type's size)
//   chosen [n_chosen, n_head_kv] I32, contiguous, strictly ascending per KV head, so chosen[i, h] >= i
//   result a view of rows
// Not every backend must have it: an in-place operator cannot fall back to another one, so ask supports_op first.
GGML_API struct ggml_tensor * ggml_edgekv_compact(
        struct ggml_context * ctx,
        struct ggml_tensor  * rows,
        struct ggml_tensor  * chosen);

#ifdef __cplusplus
}
#endif
