#pragma once

// Eviction in one llama_kv_cache: when it is due, which cells stay, how rows move, what may be removed afterwards.
// The cache is a model's only one, the full-attention half of a sliding-window pair, or the attention half of a hybrid;
// the other half is never evicted from, but is asked before anything is removed.
//
// The state it relies on: in every stream the used cells are the first ones, and they claim the last positions of the
// sequence in ascending order. It holds because cells are filled in order, only tails can be removed, and an eviction
// restores it.
//
// An eviction has two halves. The metadata half (which positions the cells claim) needs no data and is what
// llama_kv_cache::prepare() plays through when it plans the ubatches of a batch, and takes back. The data half (scores,
// choice, moving rows) runs when the ubatch is applied. A later ubatch that fails leaves earlier evictions done.

#include "edgekv-attach.h"
#include "edgekv-compute.h"
#include "edgekv-scorer.h"
#include "edgekv-settings.h"

#include "ggml-cpp.h"
#include "llama-kv-cells.h"

#include <memory>
#include <utility>
#include <vector>

class  llama_kv_cache;
struct llama_model;
struct llama_ubatch;

// streams to be evicted before a ubatch, and how their metadata was before
struct llama_edgekv_plan {
    bool ok = true;

    std::vector<uint32_t>       strm;
    std::vector<llama_kv_cells> cells;
    std::vector<uint32_t>       heads;
};

class llama_edgekv_evictor {
public:
    // throws std::runtime_error where a device cannot run the operators or the filters do not fit the cache
    llama_edgekv_evictor(
            const llama_edgekv_caches & caches,
            const llama_model & model,
            const llama_cparams & cparams,
            std::vector<ggml_backend_t> backends,
            std::vector<ggml_backend_buffer_type_t> bufts);

    // the layers of the model that read a cache layer: the one that writes it and, where layers share, others behind it
    static std::vector<int32_t> readers(const llama_kv_cache & kv, size_t i_layer);

    // metadata half: evict what has to go before this ubatch; not ok if the ubatch would exceed the context
    llama_edgekv_plan plan(const llama_ubatch & ubatch);
    void              undo(const llama_edgekv_plan & plan);

    // both halves, for the streams that plan() named before this ubatch (or one, down to a budget)
    bool run(const std::vector<uint32_t> & strm, const llama_ubatch & ubatch);
    bool run(uint32_t strm, uint32_t budget);

    // one stream by other settings; `given` are the scores of policy "given", see llama_edgekv_evict_as()
    bool run_as(uint32_t strm, const llama_edgekv_settings_ptr & how, const float * given);

    // the rule for removal; true: go ahead. Otherwise the error is set and the cache must stay as it is.
    bool can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void removed();

    // positions cannot be shifted or divided: sets the error
    void refuse_shift() const;

    // whole sequences can be copied to another stream; normalises the range
    bool can_copy(llama_seq_id src, llama_seq_id dst, llama_pos & p0, llama_pos & p1) const;
    void copied(uint32_t s_src, uint32_t s_dst);

    void cleared();

    uint32_t n_keep(uint32_t strm) const { return keeps[strm]; }
    void     set_keep(uint32_t strm, uint32_t n_keep) { keeps[strm] = n_keep; }

    llama_pos true_position(uint32_t strm, size_t i_layer, uint32_t i_head, uint32_t cell) const;

    const llama_edgekv_settings & settings() const { return *cfg; }

    // a tail can be removed iff it begins here or later; the other half has its say
    llama_pos floor(uint32_t strm) const;
    uint64_t  n_evictions(uint32_t strm) const { return streams[strm].n_evictions; }
    uint64_t  n_evictions_all()          const { return n_all; }
    uint64_t  evict_us()                 const { return t_us; }
    size_t    scratch_bytes()            const;

    // what a saved state says about one stream besides its cells
    struct stream {
        llama_pos floor       = 0;
        uint64_t  n_evictions = 0;

        // true positions of the cells that the last eviction filled, [layer][head*n + cell]; later cells claim theirs
        uint32_t                            n_moved = 0;
        std::vector<std::vector<llama_pos>> moved;
    };

    const stream & get_stream(uint32_t strm) const { return streams[strm]; }
    void           set_stream(uint32_t strm, stream st) { streams[strm] = std::move(st); }

    // Where the sliding-window half goes on writing, -1 if there is none or its used cells are not the first ones. Stock
    // does not restore it; the cells would come in another order, and the last bits of a sum depend on that.
    int64_t swa_head(uint32_t strm) const;
    void    set_swa_head(uint32_t strm, int64_t head);

    // whether the cells of a stream are what the head of this file says, and those of the other half go with them
    bool is_in_order(uint32_t strm) const;

    // empties a stream whatever is in it, which stock's seq_rm() does not where positions are negative
    void drop(uint32_t strm);

    uint32_t  n_streams()           const { return (uint32_t) streams.size(); }
    uint32_t  n_used(uint32_t strm) const;
    uint32_t  n_room(uint32_t strm) const; // tokens that can be read before an eviction is due
    llama_pos n_past(uint32_t strm) const;

    // what contexts must have in common to read each other's states
    struct identity {
        uint64_t model;
        uint64_t filters;
        uint64_t layout; // of the cache: layers, heads, types, order of V

        uint32_t n_cells;     // per sequence
        uint32_t n_cells_swa; // of the other half, 0 if there is none
        uint32_t n_ctx_seq;
    };
    identity get_identity() const;

    uint32_t n_head_kv(size_t i_layer) const;
    size_t   n_layers() const;

private:

    void move_cells(uint32_t strm, uint32_t budget);

    struct share {
        uint32_t budget;
        uint32_t window;
        uint32_t n_keep;
    };

    bool run(uint32_t strm, llama_edgekv_scorer & scorer, share sh, const float * given);

    ggml_cgraph * build_graph(ggml_context * ctx, uint32_t strm, uint32_t n_used, const llama_edgekv_scorer & scorer, share sh) const;
    ggml_context_ptr graph_context() const;

    void reserve_chosen(uint32_t budget);

    const llama_edgekv_caches caches;
    llama_kv_cache &          kv; // caches.attn

    const llama_model &   model;
    const llama_cparams & cparams; // the context's own

    const llama_edgekv_settings_ptr cfg;

    std::vector<uint32_t> keeps; // of each stream: the settings' n_keep, until set_keep()

    const uint32_t n_ctx_seq;
    const uint32_t n_ubatch;
    const int32_t  n_threads;

    std::unique_ptr<llama_edgekv_computer> computer;

    llama_edgekv_scorer own; // by the context's settings

    // the cells that the last eviction kept, for the true positions: [budget, n_head_kv] of each cache layer
    std::unique_ptr<llama_edgekv_readback> chosen;
    uint32_t                               chosen_budget = 0; // it has room for

    std::vector<stream> streams;

    uint64_t n_all = 0; // evictions
    uint64_t t_us  = 0; // spent in them
};
