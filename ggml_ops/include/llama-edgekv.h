#pragma once

// The C interface of edgekv: eviction and selection in the KV cache of a llama_context.
//
// `llama_context_params` crosses the language bindings by value, so it is never extended. Settings are handed over
// beforehand instead: llama_edgekv_set_next() stores them for the next llama_init_from_model() of the same thread,
// which consumes them whether it succeeds or not. Without settings a context is byte for byte the stock one.
//
// Every function that can fail says so by its result; llama_edgekv_last_error() then has one line of text.
//
// Vocabulary. A *cell* is a slot of the cache; after an eviction each KV head holds a different token in it. The
// *true position* of a cell is the position at which its token was read, per layer and KV head; the cell metadata
// claims the last positions of the sequence instead, so that the causal mask and the recent window stay exact.
//
// In models with sliding windows only the layers with full attention are evicted from, in hybrids those with attention;
// "the cache" is theirs. The same layers are selected from.
//
// Selection reads, at each decode step, only the pages of cells whose bound on the attention score is highest; nothing is
// deleted. A decode step is a ubatch of at most LLAMA_EDGEKV_DECODE_TOKENS tokens per sequence; longer ones, and steps
// whose budget covers the cache, are computed as without selection, bit for bit. It needs V as rows, so flash_attn_type
// must be ENABLED. A state does not depend on it: any context of the same model and cache can load it.
//
// State: llama_state_* and llama_state_seq_* save and load evicted contexts too, with settings, a hash of the filters,
// floors and true positions in a format of their own. A state that is damaged, stock, of another model or of other
// settings is refused before anything is cleared. Files appear whole or not at all. States of one half only and states
// that stay on the device are refused.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

enum llama_edgekv_mode {
    // cells = pad(min(n_ctx, budget + n_ubatch), 256); an eviction runs before a ubatch of n tokens whenever
    // used + n > budget + n_ubatch
    LLAMA_EDGEKV_MODE_BOUNDED = 0,
    // n_ctx cells and no automatic eviction: llama_edgekv_evict() evicts on demand
    LLAMA_EDGEKV_MODE_PROMPT  = 1,
};

#define LLAMA_EDGEKV_DECODE_TOKENS 8
#define LLAMA_EDGEKV_TAP_TOKENS    64

struct llama_edgekv_params {
    uint32_t struct_size; // sizeof(struct llama_edgekv_params) of the caller

    // eviction: "none" or the name of a policy (llama/policies/)
    const char * policy;
    int32_t  mode;    // enum llama_edgekv_mode
    uint32_t budget;  // cached tokens per sequence and KV head after an eviction
    uint32_t window;  // last tokens, always kept
    uint32_t n_keep;  // first tokens, always kept; n_keep + window <= budget

    // for "qfilters": one vector per KV head of each of these layers of the model, in their order, each of the layer's K
    // head size, F32; a higher projection means: keep. Layers that are not evicted from are ignored. Copied.
    const float   * filters;
    uint64_t        n_filters; // number of floats
    const int32_t * filter_layers;
    uint32_t        n_filter_layers;

    // selection: "none" or "quest"
    const char * select;
    uint32_t select_budget;  // cells read per decode step and KV head, rounded up to pages; 0: llama_edgekv_auto_budget()
    uint32_t page_size;      // cells per page: 8, 16, 32 or 64
    uint32_t n_dense_layers; // the first layers of the model, which are not selected from
    bool select_per_query_head; // each query head chooses pages by itself, as in the paper: K and V are read once per
                                // query head then; for comparisons

    // decode steps that do not select read the cache with our kernel, each row once for all query heads of its KV head.
    // The result differs from stock's in the last bits. Where a step selects, its dense layers are read so anyway.
    bool grouped_attn;

    // collect the post-RoPE queries, see llama_edgekv_tap_get() and llama_edgekv_tap_queries()
    bool tap_queries;
};

struct llama_edgekv_stats {
    uint32_t struct_size;     // set by the caller

    uint32_t cells_allocated; // per sequence
    uint32_t cells_used;      // of the sequence (of all sequences for seq_id -1)
    int64_t  tokens_seen;     // highest true position + 1 (summed over the sequences for seq_id -1)
    int64_t  floor;           // a tail of the sequence can be removed iff it begins at or above this position: tokens
                              // before it were evicted, left the sliding window or are in a recurrent state
    uint64_t n_evictions;     // of the sequence (of all for -1); a state that is loaded brings its own
    uint64_t n_evictions_all; // of the whole context since it was created
    uint64_t evict_us;        // microseconds spent in them
    uint64_t k_bytes;         // allocated bytes of K in the cache that is evicted from, all sequences
    uint64_t v_bytes;         // allocated bytes of V there
    uint64_t kv_bytes;        // the memory module's buffers, all halves, as llama.cpp's own memory breakdown counts them
    uint64_t scratch_bytes;   // device buffers reserved for evictions

    // selection, of the whole context since it was created; times are those of the first thread
    uint64_t summary_bytes;   // allocated, part of kv_bytes
    uint64_t n_selections;    // decode steps that read chosen pages, of any sequences
    uint64_t pages_read;      // by these steps: summed over layers, KV heads and tokens
    uint64_t pages_total;     // that had something to read
    uint64_t bytes_read;      // of K and V in the pages read, and of all summaries
    uint64_t summarize_us;    // keeping the summaries, prompts included
    uint64_t scores_us;
    uint64_t choice_us;
    uint64_t attn_us;         // attention on the chosen pages
    uint64_t dense_us;        // attention on all cells by our kernel
};

struct llama_edgekv_layer {
    int32_t  il;              // layer of the model
    uint32_t n_head;          // query heads
    uint32_t n_head_kv;
    uint32_t head_size_k;
    uint32_t head_size_v;
    uint64_t k_row_bytes;     // bytes of one head's K in one cell
    uint64_t v_row_bytes;     // bytes of one head's V in one cell
};

// Settings for the next context of this thread; NULL takes them back. false if they contradict themselves.
LLAMA_API bool llama_edgekv_set_next(const struct llama_edgekv_params * params);

// The last error of this thread, "" if there was none since llama_edgekv_clear_error().
LLAMA_API const char * llama_edgekv_last_error(void);
LLAMA_API void         llama_edgekv_clear_error(void);

// Evict one sequence down to `budget` (0: the context's own) now. Returns the number of tokens that left each KV
// head, 0 if the sequence fits already, -1 on error (nothing changed). An eviction at position n raises the
// sequence's floor to n - window.
LLAMA_API int64_t llama_edgekv_evict(struct llama_context * ctx, llama_seq_id seq_id, uint32_t budget);

// Evict one sequence now by the policy, budget, window, n_keep and filters of `how`, in a context of mode PROMPT. So
// policies are compared on copies of one sequence that was read once. A policy that looks at queries needs a context with
// tap_queries or with such a policy. With policy "given" the scores come from here: F32 [n_used, n_head_kv] layer by layer,
// in cell order, higher means: keep. Returns what llama_edgekv_evict() does.
LLAMA_API int64_t llama_edgekv_evict_as(struct llama_context * ctx, llama_seq_id seq_id, const struct llama_edgekv_params * how,
                                        const float * scores, uint64_t n_scores);

// Keep the first n_keep tokens of a sequence (of all: seq_id -1) from the next eviction on: a system prompt's length is
// known only after the context exists. Copies of the sequence take it along; the state of one sequence does not have it.
// False if n_keep + window exceed the budget, or without eviction.
LLAMA_API bool llama_edgekv_set_keep(struct llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep);

// Statistics of one sequence, or of all (seq_id -1). Works for contexts without settings too (floor and evictions 0).
LLAMA_API bool llama_edgekv_get_stats(struct llama_context * ctx, llama_seq_id seq_id, struct llama_edgekv_stats * stats);

// What of the statistics of one sequence is at hand without waiting for the device: an error for seq_id -1.
struct llama_edgekv_sequence {
    uint32_t struct_size;     // set by the caller
    uint32_t cells_allocated;
    uint32_t cells_used;
    uint32_t n_keep;          // first tokens, always kept
    uint32_t n_room;          // tokens that can be read before an eviction is due
    int64_t  tokens_seen;
    int64_t  floor;
    uint64_t n_evictions;
};
LLAMA_API bool llama_edgekv_get_sequence(struct llama_context * ctx, llama_seq_id seq_id, struct llama_edgekv_sequence * sequence);

// The settings that the context was made with, their filters left out; its strings live as long as the library. policy and
// select are "none" where nothing is evicted or selected. False if the context has none.
LLAMA_API bool llama_edgekv_get_settings(const struct llama_context * ctx, struct llama_edgekv_params * params);

// The budget that grows with the context, in cells, for a step that could read n of them: 768 and a 32nd of them. A fixed
// budget is Quest's known weakness: the share of the attention that it holds falls as the context grows.
LLAMA_API uint32_t llama_edgekv_auto_budget(uint32_t n);

// Whether a layer of a model attends to a sliding window only, and so is not evicted from.
LLAMA_API bool llama_edgekv_is_swa(const struct llama_model * model, int32_t il);

// Bytes of K and V of one token, in all layers of a model that are evicted from, in a cache of these types: a budget in
// bytes has to become tokens before there is a context. 0 if a row does not divide into the blocks of its type.
LLAMA_API uint64_t llama_edgekv_token_bytes(const struct llama_model * model, enum ggml_type type_k, enum ggml_type type_v);

// The layers of the cache that evictions work on, in its order.
LLAMA_API int32_t llama_edgekv_n_layers(struct llama_context * ctx);
LLAMA_API bool    llama_edgekv_get_layer(struct llama_context * ctx, int32_t i_layer, struct llama_edgekv_layer * layer);

// True positions of the used cells of a sequence, in cell order (ascending). Returns their number, -1 on error;
// writes at most n_max.
LLAMA_API int64_t llama_edgekv_positions(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, int32_t i_head_kv,
                                         llama_pos * out, int64_t n_max);

// The stored bytes of K (or V) of the used cells, in cell order, as rows of k_row_bytes (v_row_bytes) bytes; a
// transposed V is gathered into rows. Returns the number of bytes, -1 on error; needs room for all of them.
LLAMA_API int64_t llama_edgekv_rows(struct llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, int32_t i_head_kv,
                                    bool v, void * out, uint64_t out_size);

// Calibration (tap_queries): for query head i_head of cache layer i_layer, the uncentred second moment
// sum q q^T [head_size, head_size] and the sum [head_size] of all post-RoPE queries so far, in float64; where several
// layers of the model read this cache layer, of all of them.
// Returns the number of queries in them, -1 on error.
LLAMA_API int64_t llama_edgekv_tap_get(struct llama_context * ctx, int32_t i_layer, int32_t i_head, double * moment, double * sum);

// What the last ubatch did in cache layer i_layer (tap_queries): its post-RoPE queries, F32 [n_tokens, n_head, head_size],
// if there were at most LLAMA_EDGEKV_TAP_TOKENS, and the pages that were chosen for them, I32 [n_tokens, n_head_kv, n_chosen]
// ([n_tokens, n_head, n_chosen] with select_per_query_head), ascending, then -1; none where all cells were read. Both
// return how many numbers there are, -1 on error, and write at most n_max.
LLAMA_API int64_t llama_edgekv_tap_queries(struct llama_context * ctx, int32_t i_layer, float   * out, int64_t n_max);
LLAMA_API int64_t llama_edgekv_tap_pages  (struct llama_context * ctx, int32_t i_layer, int32_t * out, int64_t n_max);

#ifdef __cplusplus
}
#endif
