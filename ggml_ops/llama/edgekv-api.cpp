#include "edgekv-evict.h"
#include "edgekv-select.h"
#include "edgekv-tap.h"
#include "llama-edgekv.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

namespace {

// what the accessors work on; valid if kv is set
struct view {
    llama_kv_cache * kv   = nullptr;
    uint32_t         strm = 0;

    std::vector<uint32_t> cells; // that are in use, ascending
};

llama_kv_cache * find_cache(llama_context * ctx) {
    auto * kv = ctx ? llama_edgekv_find_caches(ctx->get_memory()).attn : nullptr;
    if (!kv) {
        llama_edgekv_set_error("the context has no KV cache that can be evicted from");
    }
    return kv;
}

view sequence(llama_context * ctx, llama_seq_id seq_id, int32_t i_layer) {
    view res;

    auto * kv = find_cache(ctx);
    if (!kv) {
        return res;
    }
    if (seq_id < 0 || (uint32_t) seq_id >= kv->get_n_seq_max() || kv->get_n_stream() != kv->get_n_seq_max()) {
        llama_edgekv_set_error(format("there is no sequence %d with a stream of its own", seq_id));
        return res;
    }
    if (i_layer < 0 || (size_t) i_layer >= kv->get_layer_ids().size()) {
        llama_edgekv_set_error(format("there is no cache layer %d", i_layer));
        return res;
    }

    // a pending copy of a stream has to arrive before anybody looks
    ctx->memory_update(false);
    ctx->synchronize();

    res.kv   = kv;
    res.strm = kv->get_stream(seq_id);

    // the first ones under eviction; a stock cache may have holes
    const auto & cells = kv->get_cells(seq_id);
    for (uint32_t i = 0; i < cells.size(); ++i) {
        if (!cells.is_empty(i)) {
            res.cells.push_back(i);
        }
    }
    return res;
}

bool fits(uint32_t n_keep, uint32_t window, uint32_t budget) {
    if ((uint64_t) n_keep + window > budget) {
        llama_edgekv_set_error(format("keep (%u) + window (%u) exceed the budget (%u)", n_keep, window, budget));
        return false;
    }
    return true;
}

} // namespace

bool llama_edgekv_set_keep(llama_context * ctx, llama_seq_id seq_id, uint32_t n_keep) {
    auto * kv = find_cache(ctx);
    if (!kv) {
        return false;
    }
    if (seq_id < -1 || seq_id >= (llama_seq_id) kv->get_n_seq_max()) {
        llama_edgekv_set_error(format("there is no sequence %d", seq_id));
        return false;
    }
    auto * evict = kv->get_evict();
    if (!evict) {
        llama_edgekv_set_error("the context was created without an eviction policy");
        return false;
    }
    if (!fits(n_keep, evict->settings().window, evict->settings().budget)) {
        return false;
    }
    for (llama_seq_id s = 0; s < (llama_seq_id) kv->get_n_seq_max(); ++s) {
        if (seq_id == -1 || s == seq_id) {
            evict->set_keep(kv->get_stream(s), n_keep);
        }
    }
    return true;
}

int64_t llama_edgekv_evict(llama_context * ctx, llama_seq_id seq_id, uint32_t budget) {
    const view v = sequence(ctx, seq_id, 0);
    if (!v.kv) {
        return -1;
    }
    auto * evict = v.kv->get_evict();
    if (!evict) {
        llama_edgekv_set_error("the context was created without an eviction policy");
        return -1;
    }
    const auto & cfg = evict->settings();

    if (budget == 0) {
        budget = cfg.budget;
    }
    if (!fits(evict->n_keep(v.strm), cfg.window, budget)) {
        return -1;
    }
    if (v.cells.size() <= budget) {
        return 0;
    }
    return evict->run(v.strm, budget) ? (int64_t) v.cells.size() - budget : -1;
}

int64_t llama_edgekv_evict_as(llama_context * ctx, llama_seq_id seq_id, const llama_edgekv_params * how, const float * scores, uint64_t n_scores) {
    const view v = sequence(ctx, seq_id, 0);
    if (!v.kv) {
        return -1;
    }
    auto * evict = v.kv->get_evict();
    if (!evict || evict->settings().mode != LLAMA_EDGEKV_MODE_PROMPT) {
        llama_edgekv_set_error("only a context that evicts on demand (mode \"prompt\") can be evicted by other settings than its own");
        return -1;
    }
    const auto settings = llama_edgekv_parse(how);
    if (!settings) {
        return -1;
    }
    if (!settings->policy) {
        llama_edgekv_set_error("policy 'none' evicts nothing");
        return -1;
    }
    if (v.cells.size() <= settings->budget) {
        return 0;
    }
    if ((settings->policy->needs & llama_edgekv_policy::GIVEN) && !settings->policy->score) {
        uint64_t expected = 0;
        for (size_t i = 0; i < evict->n_layers(); ++i) {
            expected += v.cells.size()*evict->n_head_kv(i);
        }
        if (!scores || n_scores != expected) {
            llama_edgekv_set_error(format("%llu scores were given, and the sequence has %llu keys",
                        (unsigned long long) n_scores, (unsigned long long) expected));
            return -1;
        }
    }
    return evict->run_as(v.strm, settings, scores) ? (int64_t) v.cells.size() - settings->budget : -1;
}

bool llama_edgekv_get_stats(llama_context * ctx, llama_seq_id seq_id, llama_edgekv_stats * stats) {
    if (stats->struct_size != sizeof(llama_edgekv_stats)) {
        llama_edgekv_set_error("llama_edgekv_stats has another size here: the bindings and the library are of different versions");
        return false;
    }
    auto * kv = find_cache(ctx);
    if (!kv) {
        return false;
    }
    if (seq_id < -1 || seq_id >= (llama_seq_id) kv->get_n_seq_max()) {
        llama_edgekv_set_error(format("there is no sequence %d", seq_id));
        return false;
    }

    *stats = {};
    stats->struct_size     = sizeof(llama_edgekv_stats);
    stats->cells_allocated = kv->get_size();

    const auto * evict = kv->get_evict();

    for (llama_seq_id s = 0; s < (llama_seq_id) kv->get_n_seq_max(); ++s) {
        if (seq_id != -1 && s != seq_id) {
            continue;
        }
        const auto & cells = kv->get_cells(s);

        // in a unified cache all sequences share the cells
        if (s == 0 || seq_id != -1 || kv->get_n_stream() > 1) {
            stats->cells_used += cells.get_used();
        }
        stats->tokens_seen += cells.seq_pos_max(s) + 1;

        if (evict) {
            stats->n_evictions += evict->n_evictions(kv->get_stream(s));
            stats->floor        = std::max<int64_t>(stats->floor, evict->floor(kv->get_stream(s)));
        }
    }

    if (evict) {
        stats->n_evictions_all = evict->n_evictions_all();
        stats->evict_us        = evict->evict_us();
        stats->scratch_bytes   = evict->scratch_bytes();
    }

    if (const auto * select = kv->get_select()) {
        ctx->synchronize();
        select->add_to(*stats);
    }

    for (const uint32_t il : kv->get_layer_ids()) {
        stats->k_bytes += ggml_nbytes(kv->get_k_storage(il));
        if (auto * v = kv->get_v_storage(il)) {
            stats->v_bytes += ggml_nbytes(v);
        }
    }
    for (const auto & [_, size] : ctx->get_memory()->memory_breakdown()) {
        stats->kv_bytes += size;
    }

    return true;
}

bool llama_edgekv_get_sequence(llama_context * ctx, llama_seq_id seq_id, llama_edgekv_sequence * sequence) {
    if (sequence->struct_size != sizeof(llama_edgekv_sequence)) {
        llama_edgekv_set_error("llama_edgekv_sequence has another size here: the caller and the library are of different versions");
        return false;
    }
    auto * kv = find_cache(ctx);
    if (!kv) {
        return false;
    }
    if (seq_id < 0 || seq_id >= (llama_seq_id) kv->get_n_seq_max()) {
        llama_edgekv_set_error(format("there is no sequence %d", seq_id));
        return false;
    }
    const auto &   cells = kv->get_cells(seq_id);
    const auto *   evict = kv->get_evict();
    const uint32_t strm  = kv->get_stream(seq_id);

    sequence->cells_allocated = kv->get_size();
    sequence->cells_used      = cells.get_used();
    if (kv->get_n_seq_max() > 1 && kv->get_n_stream() == 1) { // others have cells among them
        sequence->cells_used = 0;
        for (uint32_t i = 0; i < cells.size(); ++i) {
            sequence->cells_used += cells.seq_has(i, seq_id);
        }
    }
    sequence->n_keep          = evict ? evict->n_keep(strm) : 0;
    sequence->n_room          = evict ? evict->n_room(strm) : kv->get_size() - cells.get_used();
    sequence->tokens_seen     = cells.seq_pos_max(seq_id) + 1;
    sequence->floor           = evict ? evict->floor(strm) : 0;
    sequence->n_evictions     = evict ? evict->n_evictions(strm) : 0;

    return true;
}

bool llama_edgekv_get_settings(const llama_context * ctx, llama_edgekv_params * params) {
    if (params->struct_size != sizeof(llama_edgekv_params)) {
        llama_edgekv_set_error("llama_edgekv_params has another size here: the caller and the library are of different versions");
        return false;
    }
    const auto & cfg = ctx->get_cparams().edgekv;
    if (!cfg) {
        llama_edgekv_set_error("the context was created without settings");
        return false;
    }
    *params = {};
    params->struct_size = sizeof(llama_edgekv_params);

    params->policy = cfg->policy ? cfg->policy->name : "none";
    params->mode   = cfg->mode;
    params->budget = cfg->budget;
    params->window = cfg->window;
    params->n_keep = cfg->n_keep;

    params->select                = cfg->select ? "quest" : "none";
    params->select_budget         = cfg->select_budget;
    params->page_size             = cfg->page_size;
    params->n_dense_layers        = cfg->n_dense_layers;
    params->select_per_query_head = cfg->select_per_query_head;
    params->grouped_attn          = cfg->grouped_attn;
    params->tap_queries           = cfg->tap && cfg->tap->all;

    return true;
}

bool llama_edgekv_is_swa(const llama_model * model, int32_t il) {
    const auto & hparams = model->hparams;

    return il >= 0 && il < (int32_t) hparams.n_layer_all && hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.is_swa(il);
}

uint64_t llama_edgekv_token_bytes(const llama_model * model, ggml_type type_k, ggml_type type_v) {
    const auto & hparams = model->hparams;

    uint64_t res = 0;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.has_kv(il) || hparams.is_recr(il) || llama_edgekv_is_swa(model, il)) {
            continue;
        }
        const uint32_t n_k = hparams.n_embd_k_gqa(il);
        const uint32_t n_v = hparams.n_embd_v_gqa(il);
        if (n_k % ggml_blck_size(type_k) || n_v % ggml_blck_size(type_v)) {
            return 0;
        }
        res += ggml_row_size(type_k, n_k) + ggml_row_size(type_v, n_v);
    }
    return res;
}

int32_t llama_edgekv_n_layers(llama_context * ctx) {
    auto * kv = find_cache(ctx);
    return kv ? (int32_t) kv->get_layer_ids().size() : -1;
}

bool llama_edgekv_get_layer(llama_context * ctx, int32_t i_layer, llama_edgekv_layer * layer) {
    auto * kv = find_cache(ctx);
    if (!kv) {
        return false;
    }
    const auto ids = kv->get_layer_ids();
    if (i_layer < 0 || (size_t) i_layer >= ids.size()) {
        llama_edgekv_set_error(format("there is no cache layer %d", i_layer));
        return false;
    }

    const auto & hparams = llama_get_model(ctx)->hparams;
    const uint32_t il = ids[i_layer];

    layer->il          = (int32_t) il;
    layer->n_head      = hparams.n_head(il);
    layer->n_head_kv   = hparams.n_head_kv(il);
    layer->head_size_k = hparams.n_embd_head_k(il);
    layer->head_size_v = hparams.n_embd_head_v(il);
    layer->k_row_bytes = ggml_row_size(kv->type_k(), layer->head_size_k);
    layer->v_row_bytes = kv->get_v_storage(il) ? ggml_row_size(kv->type_v(), layer->head_size_v) : 0;

    return true;
}

int64_t llama_edgekv_positions(llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, int32_t i_head_kv, llama_pos * out, int64_t n_max) {
    const view v = sequence(ctx, seq_id, i_layer);
    if (!v.kv) {
        return -1;
    }
    llama_edgekv_layer layer;
    llama_edgekv_get_layer(ctx, i_layer, &layer);
    if (i_head_kv < 0 || i_head_kv >= (int32_t) layer.n_head_kv) {
        llama_edgekv_set_error(format("there is no KV head %d in cache layer %d", i_head_kv, i_layer));
        return -1;
    }

    const auto * evict = v.kv->get_evict();
    for (size_t i = 0; i < v.cells.size() && (int64_t) i < n_max; ++i) {
        const uint32_t cell = v.cells[i];
        out[i] = evict ? evict->true_position(v.strm, i_layer, i_head_kv, cell) : v.kv->get_cells(seq_id).pos_get(cell);
    }
    return (int64_t) v.cells.size();
}

int64_t llama_edgekv_rows(llama_context * ctx, llama_seq_id seq_id, int32_t i_layer, int32_t i_head_kv, bool values, void * out, uint64_t out_size) {
    const view v = sequence(ctx, seq_id, i_layer);
    if (!v.kv) {
        return -1;
    }
    llama_edgekv_layer layer;
    llama_edgekv_get_layer(ctx, i_layer, &layer);

    const uint64_t row_bytes = values ? layer.v_row_bytes : layer.k_row_bytes;
    if (i_head_kv < 0 || i_head_kv >= (int32_t) layer.n_head_kv || row_bytes == 0) {
        llama_edgekv_set_error(format("there is no KV head %d in cache layer %d", i_head_kv, i_layer));
        return -1;
    }
    if (out_size < row_bytes*v.cells.size()) {
        llama_edgekv_set_error("the buffer is too small");
        return -1;
    }

    ggml_tensor * t    = values ? v.kv->get_v_storage(layer.il) : v.kv->get_k_storage(layer.il);
    const size_t  base = v.strm*t->nb[2];
    char        * dst  = (char *) out;

    if (values && v.kv->get_v_trans()) {
        const size_t ts = ggml_type_size(t->type);

        std::vector<char> channel(ts*v.kv->get_size());
        for (uint32_t e = 0; e < layer.head_size_v; ++e) {
            const size_t row = (size_t) i_head_kv*layer.head_size_v + e;
            ggml_backend_tensor_get(t, channel.data(), base + row*ts*v.kv->get_size(), channel.size());
            for (size_t i = 0; i < v.cells.size(); ++i) {
                memcpy(dst + i*row_bytes + e*ts, channel.data() + v.cells[i]*ts, ts);
            }
        }
    } else {
        for (size_t i = 0; i < v.cells.size(); ++i) {
            ggml_backend_tensor_get(t, dst + i*row_bytes, base + v.cells[i]*t->nb[1] + i_head_kv*row_bytes, row_bytes);
        }
    }
    return (int64_t) (row_bytes*v.cells.size());
}

// the tap of a cache layer, NULL with an error if there is none
static const llama_edgekv_tap::layer * find_tap(llama_context * ctx, int32_t i_layer) {
    llama_edgekv_layer info;
    if (!llama_edgekv_get_layer(ctx, i_layer, &info)) {
        return nullptr;
    }
    const auto & cfg = ctx->get_cparams().edgekv;
    if (!cfg || !cfg->tap || !cfg->tap->all) {
        llama_edgekv_set_error("the context was created without tap_queries");
        return nullptr;
    }
    ctx->synchronize();

    const auto it = cfg->tap->layers.find(info.il);
    if (it == cfg->tap->layers.end() || it->second.n_embd == 0) {
        llama_edgekv_set_error(format("no queries were seen in layer %d", info.il));
        return nullptr;
    }
    return &it->second;
}

int64_t llama_edgekv_tap_get(llama_context * ctx, int32_t i_layer, int32_t i_head, double * moment, double * sum) {
    const auto * layer = find_tap(ctx, i_layer);
    if (!layer) {
        return -1;
    }
    if (i_head < 0 || i_head >= layer->n_head) {
        llama_edgekv_set_error(format("there is no query head %d in cache layer %d", i_head, i_layer));
        return -1;
    }

    const size_t n = layer->n_embd;
    std::fill_n(moment, n*n, 0.0);
    std::fill_n(sum,    n,   0.0);

    int64_t count = 0;
    for (const int32_t il : llama_edgekv_evictor::readers(*find_cache(ctx), i_layer)) {
        const auto & reader = ctx->get_cparams().edgekv->tap->layers[il];
        if (reader.n_head != layer->n_head || reader.n_embd != layer->n_embd) {
            llama_edgekv_set_error(format("layer %d reads cache layer %d with other heads than its own", il, i_layer));
            return -1;
        }
        for (size_t i = 0; i < n*n; ++i) {
            moment[i] += reader.moments[i_head*n*n + i];
        }
        for (size_t i = 0; i < n; ++i) {
            sum[i] += reader.sums[i_head*n + i];
        }
        count += reader.count;
    }
    return count;
}

int64_t llama_edgekv_tap_queries(llama_context * ctx, int32_t i_layer, float * out, int64_t n_max) {
    const auto * layer = find_tap(ctx, i_layer);
    if (!layer) {
        return -1;
    }
    std::copy_n(layer->queries.begin(), std::min<int64_t>(n_max, layer->queries.size()), out);

    return (int64_t) layer->queries.size();
}

int64_t llama_edgekv_tap_pages(llama_context * ctx, int32_t i_layer, int32_t * out, int64_t n_max) {
    const auto * layer = find_tap(ctx, i_layer);
    if (!layer) {
        return -1;
    }
    std::copy_n(layer->pages.begin(), std::min<int64_t>(n_max, layer->pages.size()), out);

    return (int64_t) layer->pages.size();
}
