#include "edgekv-select.h"

#include "ggml-edgekv.h"

#include "llama-batch.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

static constexpr size_t MAX_NODES = 16; // of a layer, in the graphs that are made here

// Chosen pages lie far apart in memory, and with 4 KiB pages of the system most of them miss the TLB. Called before
// anything is stored: the memory is given back and comes again, in huge pages if the system has them.
static void ask_for_huge_pages(ggml_backend_buffer_t buf) {
#ifdef __linux__
    if (!ggml_backend_buffer_is_host(buf)) {
        return;
    }
    const uintptr_t page  = (uintptr_t) sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t) ggml_backend_buffer_get_base(buf) + page - 1)/page*page;
    const uintptr_t end   = ((uintptr_t) ggml_backend_buffer_get_base(buf) + ggml_backend_buffer_get_size(buf))/page*page;

    if (begin < end && madvise((void *) begin, end - begin, MADV_HUGEPAGE) == 0 && madvise((void *) begin, end - begin, MADV_DONTNEED) == 0) {
        ggml_backend_buffer_clear(buf, 0);
    }
#else
    GGML_UNUSED(buf);
#endif
}

llama_edgekv_selector::llama_edgekv_selector(
        llama_kv_cache & kv,
        const llama_cparams & cparams,
        std::vector<ggml_backend_t> backends,
        std::vector<ggml_backend_buffer_type_t> bufts) :
    kv(kv),
    cfg(cparams.edgekv),
    backends(std::move(backends)),
    n_threads(cparams.n_threads_batch),
    stale(kv.n_stream, false) {

    GGML_ASSERT(!kv.v_trans);

    allocate();
    check_devices();

    for (const auto & [_, buf] : kv.ctxs_bufs) {
        ask_for_huge_pages(buf.get());
    }

    ggml_context_ptr ctx = graph_context();
    ggml_cgraph * gf = build_graph(ctx.get(), 0, kv.get_size());

    if (ggml_graph_n_nodes(gf) > 0) {
        computer = std::make_unique<llama_edgekv_computer>(kv, this->backends, std::move(bufts), gf, kv.hparams.no_alloc, "selection");
    }
}

void llama_edgekv_selector::allocate() {
    layers.resize(kv.layers.size());

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & cache = kv.layers[i];
        auto & l = layers[i];

        if (cfg->select && cache.il >= cfg->n_dense_layers) {
            const int64_t n_pages = (kv.get_size() + cfg->page_size - 1)/cfg->page_size;

            summaries.push_back(llama_edgekv_beside(cache.k, GGML_TYPE_F16,
                    { 2*kv.hparams.n_embd_head_k(cache.il), kv.hparams.n_head_kv(cache.il), n_pages, kv.n_stream },
                    format("edgekv_summaries_l%u", cache.il), kv.hparams.no_alloc, "the summaries of the selection"));
            l.summaries = summaries.back().tensor;
        }
    }
    counters = std::make_unique<llama_edgekv_readback>(kv, GGML_TYPE_I64, std::vector<int64_t>(layers.size(), 4*N_COUNTERS), "edgekv_counters", kv.hparams.no_alloc);
}

// a decode step's operators, as build_attn() makes them
void llama_edgekv_selector::check_devices() const {
    ggml_context_ptr ctx = graph_context();
    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), MAX_NODES*kv.layers.size(), false);

    for (size_t i = 0; i < layers.size(); ++i) {
        const int64_t il   = kv.layers[i].il;
        const int64_t n_k  = kv.hparams.n_embd_head_k(il);
        const int64_t n_v  = kv.hparams.n_embd_head_v(il);
        const int64_t n_h  = kv.hparams.n_head_kv(il);
        const int64_t size = kv.get_size();

        ggml_tensor * q    = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F32, n_k, 1, kv.hparams.n_head(il), 1);
        ggml_tensor * k    = ggml_new_tensor_4d(ctx.get(), kv.layers[i].k->type, n_k, n_h, size, 1);
        ggml_tensor * v    = ggml_new_tensor_4d(ctx.get(), kv.layers[i].v->type, n_v, n_h, size, 1);
        ggml_tensor * mask = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, size, 1, 1, 1);

        ggml_tensor * pages = nullptr;
        if (layers[i].summaries) {
            pages = ggml_edgekv_page_scores(ctx.get(), q, view(ctx.get(), layers[i], size, 0, 1));
            pages = ggml_edgekv_choose_pages(ctx.get(), pages, mask, cfg->page_size, 1, 2);
        }
        ggml_build_forward_expand(gf, ggml_edgekv_attn(ctx.get(), q, k, v, mask, pages, nullptr, cfg->page_size, 1.0f, 0.0f));
    }
    llama_edgekv_check_devices(kv, gf, "selection");
}

ggml_tensor * llama_edgekv_selector::view(ggml_context * ctx, const layer & l, uint32_t n, uint32_t s0, uint32_t ns) const {
    ggml_tensor * s = l.summaries;

    return ggml_view_4d(ctx, s, s->ne[0], s->ne[1], (n + cfg->page_size - 1)/cfg->page_size, ns, s->nb[1], s->nb[2], s->nb[3], s0*s->nb[3]);
}

ggml_tensor * llama_edgekv_selector::count(ggml_context * ctx, ggml_tensor * op, size_t i_layer, counter what) const {
    ggml_edgekv_set_counters(op, counters->view(ctx, i_layer, 4, 1, 4*what));
    return op;
}

ggml_tensor * llama_edgekv_selector::summarize(ggml_context * ctx, ggml_tensor * stored, ggml_tensor * k_idxs, size_t i_layer) const {
    const auto & l = layers[i_layer];
    if (!l.summaries) {
        return stored;
    }
    const ggml_tensor * k = kv.layers[i_layer].k;

    const int64_t n_k = l.summaries->ne[0]/2;
    ggml_tensor * keys = ggml_view_4d(ctx, stored, n_k, l.summaries->ne[1], kv.get_size(), kv.n_stream,
            ggml_row_size(k->type, n_k), k->nb[1], k->nb[2], 0);

    return count(ctx, ggml_edgekv_summarize(ctx, l.summaries, keys, k_idxs, cfg->page_size), i_layer, SUMMARIZE);
}

ggml_tensor * llama_edgekv_selector::build_attn(
        ggml_context * ctx,
        ggml_cgraph  * gf,
        ggml_backend_sched_t sched,
        const llama_ubatch & ubatch,
        ggml_tensor  * q,
        ggml_tensor  * k,
        ggml_tensor  * v,
        ggml_tensor  * mask,
        ggml_tensor  * sinks,
        float          scale,
        int            il) const {
    if (ubatch.n_tokens > LLAMA_EDGEKV_DECODE_TOKENS*ubatch.n_seqs_unq || k->view_src != kv.get_k_storage(il)) {
        return nullptr;
    }
    const int64_t n_kv     = k->ne[2];
    const int64_t n_stream = k->ne[3];
    const int64_t n_tokens = q->ne[2]/n_stream;

    const int64_t budget   = cfg->select_budget ? cfg->select_budget : llama_edgekv_auto_budget((uint32_t) n_kv);
    const int64_t n_chosen = (budget + cfg->page_size - 1)/cfg->page_size;

    const bool selects = cfg->select && n_chosen*cfg->page_size < n_kv;
    if (!selects && !cfg->grouped_attn) {
        return nullptr;
    }
    const size_t i_layer = kv.map_layer_ids.at(il);
    const auto & l = layers[i_layer];

    q = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], n_tokens, n_stream, q->nb[1], q->nb[2], q->nb[2]*n_tokens, 0);
    q = ggml_permute(ctx, q, 0, 2, 1, 3);

    auto * const home = llama_edgekv_backend_of(backends, kv.get_k_storage(il));
    const auto place = [&](ggml_tensor * op) {
        if (home) {
            ggml_backend_sched_set_tensor_backend(sched, op, home);
        }
    };

    const float    softcap = kv.hparams.attn_soft_cap ? kv.hparams.f_attn_logit_softcapping : 0.0f;
    const bool     chooses = selects && l.summaries && il >= (int) cfg->n_dense_layers;
    const uint32_t s0      = (uint32_t) (k->view_offs/k->nb[3]);

    // one choice for all query heads of a KV head, or the first ones of all KV heads choose, then the second ones, ...
    const int64_t n_choices = chooses && cfg->select_per_query_head ? q->ne[2]/k->ne[1] : 1;

    ggml_tensor * cur       = nullptr;
    ggml_tensor * all_pages = nullptr;

    for (int64_t g = 0; g < n_choices; ++g) {
        ggml_tensor * q_g     = q;
        ggml_tensor * sinks_g = sinks;
        if (n_choices > 1) {
            q_g = ggml_view_4d(ctx, q, q->ne[0], q->ne[1], k->ne[1], q->ne[3], q->nb[1], q->nb[2]*n_choices, q->nb[3], g*q->nb[2]);
            if (sinks) {
                sinks_g = ggml_cont(ctx, ggml_view_2d(ctx, sinks, 1, k->ne[1], sinks->nb[0]*n_choices, g*sinks->nb[0]));
            }
        }

        ggml_tensor * pages = nullptr;
        if (chooses) {
            ggml_tensor * scores = ggml_edgekv_page_scores(ctx, q_g, view(ctx, l, (uint32_t) n_kv, s0, (uint32_t) n_stream));
            count(ctx, scores, i_layer, SCORES);
            place(scores);

            // the sinks are in the first page
            pages = ggml_edgekv_choose_pages(ctx, scores, mask, cfg->page_size, /*n_first =*/ 1, n_chosen);
            count(ctx, pages, i_layer, CHOICE);
            place(pages);
        }

        ggml_tensor * part = ggml_edgekv_attn(ctx, q_g, k, v, mask, pages, sinks_g, cfg->page_size, scale, softcap);
        count(ctx, part, i_layer, pages ? ATTN : DENSE);
        place(part);

        // beside each other in dimension 0: the heads of a group are adjacent then
        cur       = cur ? ggml_concat(ctx, cur, part, 0) : part;
        all_pages = all_pages && cfg->tap ? ggml_concat(ctx, all_pages, pages, 0) : pages;
    }
    if (all_pages) {
        ggml_format_name(all_pages, "edgekv_pages-%d", il);
        ggml_build_forward_expand(gf, all_pages);
    }

    cur = ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]*cur->ne[3]);
    ggml_build_forward_expand(gf, cur);

    return cur;
}

ggml_context_ptr llama_edgekv_selector::graph_context() const {
    const size_t n_tensors = MAX_NODES*kv.layers.size();

    ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    return ggml_context_ptr { ggml_init(params) };
}

ggml_cgraph * llama_edgekv_selector::build_graph(ggml_context * ctx, uint32_t strm, uint32_t n) const {
    ggml_cgraph * gf = ggml_new_graph_custom(ctx, MAX_NODES*kv.layers.size(), false);

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & l = layers[i];
        if (!l.summaries) {
            continue;
        }
        ggml_tensor * k = kv.layers[i].k_stream[strm];

        const int64_t n_k  = l.summaries->ne[0]/2;
        ggml_tensor * keys = ggml_view_4d(ctx, k, n_k, l.summaries->ne[1], n, 1, ggml_row_size(k->type, n_k), k->nb[1], n*k->nb[1], 0);

        ggml_tensor * op = ggml_edgekv_summarize(ctx, view(ctx, l, n, strm, 1), keys, nullptr, cfg->page_size);
        ggml_build_forward_expand(gf, count(ctx, op, i, SUMMARIZE));
    }
    return gf;
}

bool llama_edgekv_selector::refresh() {
    if (!computer || std::find(stale.begin(), stale.end(), true) == stale.end()) {
        return true;
    }
    computer->synchronize();

    for (uint32_t strm = 0; strm < stale.size(); ++strm) {
        // beyond the used cells nothing is read before it is written
        const uint32_t n = stale[strm] ? kv.v_cells[strm].used_max_p1() : 0;
        if (n > 0) {
            ggml_context_ptr ctx = graph_context();
            if (!computer->run(build_graph(ctx.get(), strm, n), n_threads)) {
                llama_edgekv_set_error("the summaries of the selection could not be computed");
                return false;
            }
        }
        stale[strm] = false;
    }
    return true;
}

void llama_edgekv_selector::add_to(std::map<ggml_backend_buffer_type_t, size_t> & breakdown) const {
    for (const auto & l : layers) {
        if (l.summaries) {
            auto * buft = ggml_backend_buffer_get_type(l.summaries->buffer);
            breakdown[buft] += ggml_backend_buft_get_alloc_size(buft, l.summaries);
        }
    }
}

void llama_edgekv_selector::add_to(llama_edgekv_stats & stats) const {
    if (kv.hparams.no_alloc) {
        return;
    }
    uint64_t ns[N_COUNTERS] = {};

    const auto counts = counters->read<int64_t>();

    for (size_t i = 0; i < layers.size(); ++i) {
        const auto & l = layers[i];

        for (int c = 0; c < N_COUNTERS; ++c) {
            ns[c] += counts[i][4*c];
        }
        if (!l.summaries) {
            continue;
        }
        const uint32_t il   = kv.layers[i].il;
        const uint64_t page = cfg->page_size*(ggml_row_size(kv.layers[i].k->type, kv.hparams.n_embd_head_k(il)) +
                                              ggml_row_size(kv.layers[i].v->type, kv.hparams.n_embd_head_v(il)));

        const int64_t * choice = counts[i].data() + 4*CHOICE;

        stats.summary_bytes += ggml_nbytes(l.summaries);
        const uint64_t n_choices = cfg->select_per_query_head ? kv.hparams.n_head(il)/kv.hparams.n_head_kv(il) : 1;

        stats.n_selections   = std::max<uint64_t>(stats.n_selections, choice[1]/n_choices);
        stats.pages_read    += choice[2];
        stats.pages_total   += choice[3];
        stats.bytes_read    += choice[2]*page + choice[3]*l.summaries->nb[1];
    }

    stats.summarize_us = ns[SUMMARIZE]/1000;
    stats.scores_us    = ns[SCORES]/1000;
    stats.choice_us    = ns[CHOICE]/1000;
    stats.attn_us      = ns[ATTN]/1000;
    stats.dense_us     = ns[DENSE]/1000;
}
