#pragma once

// Parameters of the kernels, in the order in which each takes them: first these, then its buffers. Strides (nb) are in
// bytes, counts are of what their names say; contracts of the operators stand in ggml-edgekv.h. Plain numbers of fixed
// size only: they cross from the host to the device byte by byte.

#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

enum ek_type { // the values of enum ggml_type
    EK_F32    = 0,
    EK_F16    = 1,
    EK_Q4_0   = 2,
    EK_Q4_1   = 3,
    EK_Q5_0   = 6,
    EK_Q5_1   = 7,
    EK_Q8_0   = 8,
    EK_IQ4_NL = 20,
    EK_BF16   = 30,
    EK_ANY    = -1, // as a template's argument: known when the kernel runs
};

// the choices (pick.h)
#define EK_PICK_BITS  11
#define EK_PICK_BINS  (1 << EK_PICK_BITS)
#define EK_PICK_WORDS (EK_PICK_BINS + 68) // of shared memory
#define EK_PICK_EACH  4                   // items of a thread at once

// One warp per key. Grid: cells/(warps of a block) x KV heads.
//   keys, vec [head_size, n_head_kv] (not read for norms), out [n_cells, n_head_kv]
struct ek_score_args {
    uint64_t nb1, nb2; // of keys
    int32_t  type;     // enum ek_type
    int32_t  kind;     // enum ggml_edgekv_score_kind
    int32_t  head_size;
    int32_t  n_cells;
    float    scale;
};

// The sum of the keys of a part of the cells, each divided by its norm, then the sum of the parts in their order.
// Grid of the first: parts x KV heads; of the second: 1 x KV heads. The cells of a part are dealt out to stripes, and so
// are the parts: sums of a fixed shape.
//   ek_key_sum:  keys, parts [head_size, n_head_kv, n_parts]
//   ek_key_mean: parts, out [head_size, n_head_kv]
#define EK_MEAN_PARTS    128 // at most
#define EK_SUM_CELLS     256 // at once
#define EK_SUM_CHANNELS  256 // at once
#define EK_SUM_STRIPES   16
#define EK_SUM_SHARED    (4*(EK_SUM_CELLS + EK_SUM_STRIPES*EK_SUM_CHANNELS))
#define EK_MEAN_CHANNELS 128 // at once
#define EK_MEAN_STRIPES  32
#define EK_MEAN_SHARED   (4*EK_MEAN_STRIPES*EK_MEAN_CHANNELS)

struct ek_key_mean_args {
    uint64_t nb1, nb2; // of keys
    int32_t  type;
    int32_t  head_size;
    int32_t  n_head_kv;
    int32_t  n_cells;
    int32_t  n_parts;
    int32_t  per_part; // cells, a multiple of EK_SUM_STRIPES
};

// Grid: KV heads.
//   scores, out [n_chosen, n_head_kv]
#define EK_CHOOSE_SHARED (4*EK_PICK_WORDS)

struct ek_choose_args {
    int32_t n_cells;
    int32_t n_chosen;
    int32_t n_keep;
    int32_t window;
    int32_t per_head; // 0: all heads share the scores
};

// Pieces of 2, 4, 8 or 16 bytes: piece p of row i of head h lies at h*nb_head + i*nb_row + p*nb_piece. A block moves a
// slice of the pieces of all rows, so no other block reads what it writes. Grid: slices x heads. A template's argument
// is the size of a piece.
//   rows, chosen [n_chosen, n_head]
#define EK_COMPACT_SLICE 32 // pieces, at most

struct ek_compact_args {
    uint64_t nb_head, nb_row, nb_piece;
    int32_t  n_chosen;
    int32_t  n_pieces;
    int32_t  slice;    // pieces
};

// One warp per page and head. Grid: pages or named cells /(warps of a block) x KV heads x streams (1 where cells are named).
//   keys, cells (not read if n_named is 0), summaries, counters (two words each; not touched if counted is 0)
struct ek_summarize_args {
    uint64_t nb1, nb2, nb3;    // of keys
    uint64_t nbs1, nbs2, nbs3; // of summaries
    int32_t  type;
    int32_t  head_size;
    int32_t  n_cells;
    int32_t  n_named;          // cells; 0: all pages
    int32_t  page_size;
    int32_t  counted;
};

// Grid: tiles of pages x KV heads x (token + n_tokens*stream).
//   q, summaries, out [n_pages, n_head_kv, n_tokens, n_stream]
#define EK_PAGES_TILE 64 // pages of a block

struct ek_page_scores_args {
    uint64_t nbq1, nbq2, nbq3;
    uint64_t nbs1, nbs2, nbs3;
    int32_t  head_size;
    int32_t  group;            // query heads per KV head
    int32_t  n_head_kv;
    int32_t  n_pages;
    int32_t  n_tokens;
};

// Grid: KV heads x (token + n_tokens*stream).
//   scores, mask, ranks [n_pages] per block (scratch), out [n_chosen, n_head_kv, n_tokens, n_stream],
//   counters (two words each; not touched if counted is 0)
#define EK_CHOOSE_PAGES_SHARED (4*EK_PICK_WORDS)

struct ek_choose_pages_args {
    uint64_t nbm1, nbm3; // of mask
    int32_t  n_head_kv;
    int32_t  n_tokens;
    int32_t  n_pages;
    int32_t  n_cells;
    int32_t  page_size;
    int32_t  n_first;
    int32_t  n_chosen;
    int32_t  counted;
};

// A part of the listed cells of one KV head, then all parts together.
// Grid of the first: parts x (KV head + n_head_kv*(token + n_tokens*stream)) x chunks of the group's query heads;
// of the second: query heads x (token + n_tokens*stream).
//   q, keys, values, mask, pages (not read if all_pages), partials [head_size_v + 2, n_parts] per query head and token,
//   then partials, sinks (not read if has_sinks is 0), out
#define EK_ATTN_TILE 64   // cells that a block works on at once
#define EK_ATTN_RED  1024 // floats of the last sum, per warp
#define EK_ATTN_WARPS 4   // of a block, at most

struct ek_attn_args {
    uint64_t nbq1, nbq2, nbq3;
    uint64_t nbk1, nbk2, nbk3;
    uint64_t nbv1, nbv2, nbv3;
    uint64_t nbm1, nbm3;
    int32_t  type_k, type_v;
    int32_t  head_size, head_size_v;
    int32_t  group;     // query heads per KV head
    int32_t  n_head_kv;
    int32_t  n_tokens;
    int32_t  n_cells;
    int32_t  page_size;
    int32_t  n_listed;  // pages per KV head and token
    int32_t  all_pages;
    int32_t  n_parts;
    int32_t  per_part;  // cells of listed pages in a part
    int32_t  has_sinks;
    float    scale;
    float    softcap;
};
