#include "edgekv-evict.h"

#include "edgekv-hash.h"
#include "edgekv-select.h"
#include "edgekv-tap.h"
#include "ggml-edgekv.h"

#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

static constexpr size_t MAX_NODES = 48; // of a layer: views of K and V, scores, choice and its copy, two moves

llama_edgekv_evictor::llama_edgekv_evictor(
        const llama_edgekv_caches & caches,
        const llama_model & model,
        const llama_cparams & cparams,
        std::vector<ggml_backend_t> backends,
        std::vector<ggml_backend_buffer_type_t> bufts) :
    caches(caches),
    kv(*caches.attn),
    model(model),
    cparams(cparams),
    cfg(cparams.edgekv),
    keeps(kv.n_stream, cfg->n_keep),
    n_ctx_seq(cparams.n_ctx_seq),
    n_ubatch(cparams.n_ubatch),
    n_threads(cparams.n_threads_batch),
    own(kv, cfg),
    streams(kv.n_stream) {

    // the worst case, so that no eviction allocates: all cells used. Window and keep change no shape, and in a context
    // smaller than both they never meet.
    const share worst = { std::min(cfg->budget, kv.get_size()), 0, 0 };

    reserve_chosen(worst.budget);

    ggml_context_ptr ctx = graph_context();
    ggml_cgraph * gf = build_graph(ctx.get(), 0, kv.get_size(), own, worst);

    computer = std::make_unique<llama_edgekv_computer>(kv, std::move(backends), std::move(bufts), gf, kv.hparams.no_alloc, "eviction");
}

size_t llama_edgekv_evictor::scratch_bytes() const {
    return computer->n_bytes() + chosen->n_bytes() + own.n_bytes();
}

void llama_edgekv_evictor::reserve_chosen(uint32_t budget) {
    if (budget <= chosen_budget) {
        return;
    }
    std::vector<int64_t> n;
    for (size_t i = 0; i < kv.layers.size(); ++i) {
        n.push_back((int64_t) budget*n_head_kv(i));
    }
    chosen = std::make_unique<llama_edgekv_readback>(kv, GGML_TYPE_I32, n, "edgekv_chosen", kv.hparams.no_alloc);
    chosen_budget = budget;
}

uint32_t llama_edgekv_evictor::n_used(uint32_t strm) const {
    return kv.v_cells[strm].get_used();
}

uint32_t llama_edgekv_evictor::n_room(uint32_t strm) const {
    const uint64_t most = cfg->mode == LLAMA_EDGEKV_MODE_BOUNDED ? (uint64_t) cfg->budget + n_ubatch : kv.get_size();

    return n_used(strm) < most ? (uint32_t) (most - n_used(strm)) : 0;
}

llama_pos llama_edgekv_evictor::n_past(uint32_t strm) const {
    // a stream belongs to the sequence of the same number
    return kv.v_cells[strm].seq_pos_max(strm) + 1;
}

size_t llama_edgekv_evictor::n_layers() const {
    return kv.layers.size();
}

uint32_t llama_edgekv_evictor::n_head_kv(size_t i_layer) const {
    return kv.hparams.n_head_kv(kv.layers[i_layer].il);
}

llama_edgekv_evictor::identity llama_edgekv_evictor::get_identity() const {
    identity res = {};

    const auto add = [](uint64_t & h, uint64_t x) { h = llama_edgekv_hash(h, &x, sizeof(x)); };

    const std::string desc = model.desc();
    res.model = llama_edgekv_hash(res.model, desc.data(), desc.size());
    add(res.model, model.n_elements());
    add(res.model, model.size());
    add(res.model, model.vocab.n_tokens());

    res.filters = llama_edgekv_hash(0, cfg->filters.data(), cfg->filters.size()*sizeof(float));
    res.filters = llama_edgekv_hash(res.filters, cfg->filter_layers.data(), cfg->filter_layers.size()*sizeof(int32_t));

    for (auto * cache : { caches.attn, caches.swa }) {
        if (!cache) {
            continue;
        }
        add(res.layout, cache->v_trans);
        for (const auto & layer : cache->layers) {
            add(res.layout, layer.il);
            add(res.layout, layer.k->type);
            add(res.layout, layer.k->ne[0]);
            add(res.layout, layer.v->type);
            add(res.layout, layer.v->ne[0]);
        }
    }

    res.n_cells     = kv.get_size();
    res.n_cells_swa = caches.swa ? caches.swa->get_size() : 0;
    res.n_ctx_seq   = n_ctx_seq;

    return res;
}

int64_t llama_edgekv_evictor::swa_head(uint32_t strm) const {
    if (!caches.swa || caches.swa->v_cells[strm].used_max_p1() != caches.swa->v_cells[strm].get_used()) {
        return -1;
    }
    return caches.swa->v_heads[strm];
}

void llama_edgekv_evictor::set_swa_head(uint32_t strm, int64_t head) {
    if (head >= 0 && caches.swa && head <= (int64_t) caches.swa->get_size()) {
        caches.swa->v_heads[strm] = (uint32_t) head;
    }
}

bool llama_edgekv_evictor::is_in_order(uint32_t strm) const {
    const auto & cells = kv.v_cells[strm];
    const auto   seq   = (llama_seq_id) strm;

    const int64_t used = n_used(strm);
    const int64_t past = n_past(strm);
    if (used > past) {
        return false;
    }

    const auto is_own = [seq](const llama_kv_cells & cells, uint32_t i) {
        return cells.seq_count(i) == 1 && cells.seq_has(i, seq);
    };
    for (int64_t i = 0; i < used; ++i) {
        const auto pos = (llama_pos) (past - used + i);
        if (!cells.pos_in((uint32_t) i, pos, pos + 1) || !is_own(cells, (uint32_t) i)) {
            return false;
        }
    }
    if (caches.swa) {
        const auto & swa = caches.swa->v_cells[strm];
        uint32_t n = 0;
        for (uint32_t i = 0; i < swa.size(); ++i) {
            n += swa.pos_in(i, 0, (llama_pos) past) && is_own(swa, i);
        }
        if (n != swa.get_used() || swa.seq_pos_max(seq) != past - 1) {
            return false;
        }
    }
    if (!caches.recr) {
        return true;
    }
    uint32_t n = 0;
    for (const auto & cell : caches.recr->cells) {
        if (cell.has_seq_id(seq)) {
            n += 1;
            if (cell.pos != past - 1) {
                return false;
            }
        }
    }
    return n == (past > 0 ? 1 : 0);
}

void llama_edgekv_evictor::drop(uint32_t strm) {
    for (auto * cache : { caches.attn, caches.swa }) {
        if (cache) {
            cache->v_cells[strm].reset();
            cache->v_heads[strm] = 0;
        }
    }
    if (caches.recr) {
        for (auto & cell : caches.recr->cells) {
            if (cell.has_seq_id((llama_seq_id) strm)) {
                cell.pos = std::max(cell.pos, 0); // else seq_rm() passes it by
            }
        }
        caches.recr->seq_rm((llama_seq_id) strm, -1, -1);
    }
    if (auto * select = kv.get_select()) {
        select->changed(strm);
    }
    removed();
}

llama_pos llama_edgekv_evictor::floor(uint32_t strm) const {
    llama_pos res = streams[strm].floor;

    if (caches.swa) {
        // the window of the last token that stays must still be there
        const llama_pos first = caches.swa->v_cells[strm].seq_pos_min(strm);
        if (first > 0) {
            res = std::max(res, first + (llama_pos) caches.swa->n_swa - 1);
        }
    }
    if (caches.recr) {
        res = std::max(res, n_past(strm)); // it cannot roll back
    }
    return res;
}

std::vector<int32_t> llama_edgekv_evictor::readers(const llama_kv_cache & kv, size_t i_layer) {
    std::vector<int32_t> res;
    for (const auto & [il, ikv] : kv.map_layer_ids) {
        if ((size_t) ikv == i_layer) {
            res.push_back(il);
        }
    }
    std::sort(res.begin(), res.end());
    return res;
}

llama_edgekv_plan llama_edgekv_evictor::plan(const llama_ubatch & ubatch) {
    llama_edgekv_plan res;

    if (!cparams.causal_attn) {
        llama_edgekv_set_error("attention must stay causal where eviction is on");
        res.ok = false;
        return res;
    }

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];

        if (ubatch.n_seq_id[i] != 1 || (uint32_t) seq_id >= kv.n_stream) {
            llama_edgekv_set_error(format("a token must belong to one sequence below n_seq_max (%u) where eviction is on", kv.n_stream));
            res.ok = false;
            return res;
        }
        if (ubatch.pos[i] >= (llama_pos) n_ctx_seq) {
            llama_edgekv_set_error(format("the context is full: position %d of %u", ubatch.pos[i], n_ctx_seq));
            res.ok = false;
            return res;
        }
    }

    if (cfg->mode != LLAMA_EDGEKV_MODE_BOUNDED) {
        return res;
    }

    const uint32_t n_tokens = ubatch.n_tokens/ubatch.n_seqs_unq;

    for (uint32_t s = 0; s < ubatch.n_seqs_unq; ++s) {
        const uint32_t strm = kv.seq_to_stream[ubatch.seq_id_unq[s]];

        if (n_tokens <= n_room(strm)) {
            continue;
        }
        res.strm .push_back(strm);
        res.cells.push_back(kv.v_cells[strm]);
        res.heads.push_back(kv.v_heads[strm]);

        move_cells(strm, cfg->budget);
    }

    return res;
}

void llama_edgekv_evictor::undo(const llama_edgekv_plan & plan) {
    for (size_t i = 0; i < plan.strm.size(); ++i) {
        kv.v_cells[plan.strm[i]] = plan.cells[i];
        kv.v_heads[plan.strm[i]] = plan.heads[i];
    }
}

// The first cells take over what the last ones claimed.
void llama_edgekv_evictor::move_cells(uint32_t strm, uint32_t budget) {
    auto & cells = kv.v_cells[strm];

    const uint32_t     used   = cells.get_used();
    const llama_seq_id seq_id = (llama_seq_id) strm;

    GGML_ASSERT(used > budget && cells.used_max_p1() == used);

    std::vector<std::pair<llama_pos, llama_kv_cell_ext>> last(budget);
    for (uint32_t i = 0; i < budget; ++i) {
        last[i] = { cells.pos_get(used - budget + i), cells.ext_get(used - budget + i) };
    }

    cells.reset();
    for (uint32_t i = 0; i < budget; ++i) {
        cells.pos_set(i, last[i].first);
        cells.ext_set(i, last[i].second);
        cells.seq_add(i, seq_id);
    }
    kv.v_heads[strm] = budget;
}

ggml_context_ptr llama_edgekv_evictor::graph_context() const {
    const size_t n_tensors = MAX_NODES*kv.layers.size();

    ggml_init_params params = {
        /*.mem_size   =*/ n_tensors*ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false),
        /*.mem_buffer =*/ NULL,
        /*.no_alloc   =*/ true,
    };
    return ggml_context_ptr { ggml_init(params) };
}

ggml_cgraph * llama_edgekv_evictor::build_graph(
        ggml_context * ctx, uint32_t strm, uint32_t n_used, const llama_edgekv_scorer & scorer, share sh) const {
    ggml_cgraph * gf = ggml_new_graph_custom(ctx, MAX_NODES*kv.layers.size(), false);

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const auto & layer = kv.layers[i];

        const int64_t n_head = kv.hparams.n_head_kv(layer.il);
        const int64_t n_k    = kv.hparams.n_embd_head_k(layer.il);
        const int64_t n_v    = kv.hparams.n_embd_head_v(layer.il);

        ggml_tensor * k = layer.k_stream[strm];
        ggml_tensor * v = layer.v_stream[strm];

        ggml_tensor * keys = ggml_view_3d(ctx, k, n_k, n_head, n_used, ggml_row_size(k->type, n_k), k->nb[1], 0);

        ggml_tensor * values;
        if (kv.v_trans) {
            const size_t nb = ggml_type_size(v->type)*kv.get_size();
            values = ggml_view_3d(ctx, v, n_used, n_v, n_head, nb, nb*n_v, 0);
            values = ggml_permute(ctx, values, 2, 0, 1, 3);
        } else {
            values = ggml_view_3d(ctx, v, n_v, n_head, n_used, ggml_row_size(v->type, n_v), v->nb[1], 0);
        }

        ggml_tensor * scores = scorer.scores(ctx, i, keys, values);
        ggml_tensor * idx    = ggml_edgekv_choose(ctx, scores, n_head, sh.n_keep, sh.window, sh.budget);

        ggml_build_forward_expand(gf, ggml_cpy(ctx, idx, chosen->view(ctx, i, sh.budget, n_head)));
        ggml_build_forward_expand(gf, ggml_edgekv_compact(ctx, keys,   idx));
        ggml_build_forward_expand(gf, ggml_edgekv_compact(ctx, values, idx));
    }

    return gf;
}

bool llama_edgekv_evictor::run(const std::vector<uint32_t> & strms, const llama_ubatch & ubatch) {
    for (uint32_t strm : strms) {
        if (!run(strm, cfg->budget)) {
            return false;
        }
    }
    if (cfg->tap) {
        cfg->tap->strm.clear();
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            cfg->tap->strm.push_back(kv.seq_to_stream[ubatch.seq_id[i][0]]);
        }
        cfg->tap->pos.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    }
    return true;
}

bool llama_edgekv_evictor::run(uint32_t strm, uint32_t budget) {
    return run(strm, own, { budget, cfg->window, keeps[strm] }, nullptr);
}

bool llama_edgekv_evictor::run_as(uint32_t strm, const llama_edgekv_settings_ptr & how, const float * given) {
    const share sh = { how->budget, how->window, how->n_keep };

    try {
        llama_edgekv_scorer scorer(kv, how);

        reserve_chosen(sh.budget);

        ggml_context_ptr ctx = graph_context();
        llama_edgekv_check_devices(kv, build_graph(ctx.get(), strm, n_used(strm), scorer, { sh.budget, 0, 0 }), "eviction");

        return run(strm, scorer, sh, given);
    } catch (const std::exception & err) {
        llama_edgekv_set_error(err.what());
        return false;
    }
}

bool llama_edgekv_evictor::run(uint32_t strm, llama_edgekv_scorer & scorer, share sh, const float * given) {
    // the last ubatch may still be computing on the same buffers
    computer->synchronize();

    const int64_t t_start = ggml_time_us();

    const uint32_t used   = n_used(strm);
    const uint32_t budget = sh.budget;

    const llama_edgekv_scorer::stream about = {
        strm, used, (uint32_t) (n_past(strm) - streams[strm].floor), n_past(strm), budget, cfg->tap.get(),
        [&](size_t i_layer, uint32_t i_head, uint32_t cell) { return true_position(strm, i_layer, i_head, cell); }, given
    };
    if (!scorer.prepare(about)) {
        return false;
    }

    try {
        reserve_chosen(budget);
    } catch (const std::exception & err) {
        llama_edgekv_set_error(err.what());
        return false;
    }
    ggml_context_ptr ctx = graph_context();
    ggml_cgraph * gf = build_graph(ctx.get(), strm, used, scorer, sh);

    if (!computer->run(gf, n_threads)) {
        llama_edgekv_set_error("the eviction could not be computed");
        return false;
    }

    // what was where: an eviction may start from cells that an earlier one has filled
    auto & st = streams[strm];

    std::vector<std::vector<llama_pos>> moved = chosen->read<int32_t>();

    for (size_t i = 0; i < moved.size(); ++i) {
        moved[i].resize((size_t) budget*n_head_kv(i)); // there may be room for more
        for (size_t j = 0; j < moved[i].size(); ++j) {
            moved[i][j] = true_position(strm, i, (uint32_t) (j/budget), moved[i][j]);
        }
    }

    st.moved   = std::move(moved);
    st.n_moved = budget;
    st.floor   = std::max<llama_pos>(st.floor, n_past(strm) - (llama_pos) sh.window);
    st.n_evictions++;
    n_all++;

    move_cells(strm, budget);

    if (auto * select = kv.get_select()) {
        select->changed(strm);
    }

    t_us += ggml_time_us() - t_start;

    return true;
}

llama_pos llama_edgekv_evictor::true_position(uint32_t strm, size_t i_layer, uint32_t i_head, uint32_t cell) const {
    const auto & st = streams[strm];

    if (cell < st.n_moved) {
        const auto & moved = st.moved[i_layer];
        return moved[i_head*(moved.size()/kv.hparams.n_head_kv(kv.layers[i_layer].il)) + cell];
    }
    return kv.v_cells[strm].pos_get(cell);
}

bool llama_edgekv_evictor::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    if (p0 < 0) {
        p0 = 0;
    }
    if (p1 < 0) {
        p1 = std::numeric_limits<llama_pos>::max();
    }
    for (uint32_t strm = 0; strm < streams.size(); ++strm) {
        if (seq_id >= 0 && seq_id != (llama_seq_id) strm) {
            continue;
        }
        const llama_pos n = n_past(strm);

        const bool nothing = p0 >= std::min(p1, n);
        const bool all     = p0 == 0 && p1 >= n;
        const bool tail    = p1 >= n && p0 >= floor(strm);

        if (!nothing && !all && !tail) {
            llama_edgekv_set_error(p1 < n ?
                format("positions [%d, %d) are inside the evicted sequence %u: only tails can be removed", p0, p1, strm) :
                format("tokens from position %d on cannot be removed from sequence %u: its floor is %d",
                        p0, strm, floor(strm)));
            return false;
        }
    }
    return true;
}

void llama_edgekv_evictor::refuse_shift() const {
    llama_edgekv_set_error("positions cannot be shifted or divided where eviction is on");
}

void llama_edgekv_evictor::removed() {
    for (uint32_t strm = 0; strm < streams.size(); ++strm) {
        auto & st = streams[strm];

        const uint32_t used = n_used(strm);
        if (used == 0) {
            const uint64_t n_evictions = st.n_evictions;
            st = {};
            st.n_evictions = n_evictions;
        } else {
            st.n_moved = std::min(st.n_moved, used);
        }
        if (cfg->tap) {
            cfg->tap->removed(strm, n_past(strm));
        }
    }
}

bool llama_edgekv_evictor::can_copy(llama_seq_id src, llama_seq_id dst, llama_pos & p0, llama_pos & p1) const {
    if (src == dst) {
        return false;
    }
    if (src < 0 || dst < 0 || (uint32_t) std::max(src, dst) >= streams.size()) {
        llama_edgekv_set_error(format("there are only %u sequences, %d cannot be copied to %d", n_streams(), src, dst));
        return false;
    }
    if (p0 > 0 || (p1 >= 0 && p1 < n_past(src))) {
        llama_edgekv_set_error("only whole sequences can be copied where eviction is on");
        return false;
    }
    p0 = -1;
    p1 = -1;
    return true;
}

void llama_edgekv_evictor::copied(uint32_t s_src, uint32_t s_dst) {
    streams[s_dst] = streams[s_src];
    keeps[s_dst]   = keeps[s_src];
    if (cfg->tap) {
        cfg->tap->copied(s_src, s_dst);
    }
}

void llama_edgekv_evictor::cleared() {
    removed();
}
