#include "edgekv-scorer.h"

#include "edgekv-tap.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <stdexcept>

llama_edgekv_scorer::llama_edgekv_scorer(const llama_kv_cache & kv, llama_edgekv_settings_ptr cfg) :
    kv(kv),
    cfg(std::move(cfg)),
    kq_scale(kv.layers.size(), 1.0f),
    n_queries(LLAMA_EDGEKV_TAP_TOKENS) {

    const auto & hparams = kv.hparams;
    const bool   no_alloc = hparams.no_alloc;

    if (needs(llama_edgekv_policy::FILTERS)) {
        load_filters();
    }
    for (const auto & layer : kv.layers) {
        const int64_t n_embd = hparams.n_embd_head_k(layer.il);

        if (needs(llama_edgekv_policy::QUERIES)) {
            queries.push_back(llama_edgekv_beside(layer.k, GGML_TYPE_F32, { n_embd, n_queries, hparams.n_head(layer.il), 1 },
                    format("edgekv_queries_l%u", layer.il), no_alloc, "the queries of the eviction"));

            const auto buft = ggml_backend_buffer_get_type(layer.k->buffer);
            const auto same = std::find_if(masks.begin(), masks.end(), [&](const llama_edgekv_beside & m) {
                return ggml_backend_buffer_get_type(m.buf.get()) == buft;
            });
            mask_of.push_back(same - masks.begin());
            if (same == masks.end()) {
                masks.push_back(llama_edgekv_beside(layer.k, GGML_TYPE_F32, { kv.get_size(), n_queries, 1, 1 },
                        "edgekv_mask", no_alloc, "the mask of the eviction"));
            }
        }
        if (needs(llama_edgekv_policy::GIVEN | llama_edgekv_policy::AGES)) {
            given.push_back(llama_edgekv_beside(layer.k, GGML_TYPE_F32, { kv.get_size(), hparams.n_head_kv(layer.il), 1, 1 },
                    format("edgekv_given_l%u", layer.il), no_alloc, "the scores or ages of the eviction"));
        }
    }
}

// K may be stored rotated by an orthonormal Hadamard matrix, block by block: <Hf, Hk> = <f, k>
static void rotate(const std::vector<float> & hadamard, int64_t n_rot, float * x, int64_t n) {
    std::vector<float> plain(n_rot);
    for (int64_t b = 0; b < n; b += n_rot) {
        std::copy_n(x + b, n_rot, plain.begin());
        for (int64_t i = 0; i < n_rot; ++i) {
            double s = 0.0;
            for (int64_t j = 0; j < n_rot; ++j) {
                s += (double) hadamard[i*n_rot + j]*plain[j];
            }
            x[b + i] = (float) s;
        }
    }
}

static int64_t rotation_size(int64_t n_embd) {
    int64_t n_rot = 64;
    while (n_embd % (2*n_rot) == 0) {
        n_rot *= 2;
    }
    return n_rot;
}

void llama_edgekv_scorer::load_filters() {
    // where each layer's vectors begin
    std::map<uint32_t, size_t> offsets;
    size_t expected = 0;
    for (const int32_t il : cfg->filter_layers) {
        if (il < 0 || il >= (int32_t) kv.hparams.n_layer_all) {
            throw std::runtime_error("the filters do not fit the model: there is no layer " + std::to_string(il));
        }
        offsets[il] = expected;
        expected += (size_t) kv.hparams.n_head_kv(il)*kv.hparams.n_embd_head_k(il);
    }
    if (expected != cfg->filters.size()) {
        throw std::runtime_error("the filters do not fit the model: " + std::to_string(cfg->filters.size()) +
                " numbers instead of " + std::to_string(expected));
    }

    std::vector<float> rotated;

    for (const auto & layer : kv.layers) {
        const int64_t n_head = kv.hparams.n_head_kv(layer.il);
        const int64_t n_embd = kv.hparams.n_embd_head_k(layer.il);

        const auto it = offsets.find(layer.il);
        if (it == offsets.end()) {
            throw std::runtime_error(format("the filters lack layer %u", layer.il));
        }
        const auto first = cfg->filters.begin() + it->second;
        rotated.assign(first, first + n_head*n_embd);

        for (int64_t h = 0; h < n_head; ++h) {
            double norm = 0.0;
            for (int64_t i = 0; i < n_embd; ++i) {
                norm += (double) rotated[h*n_embd + i]*rotated[h*n_embd + i];
            }
            if (!(norm > 0.0)) {
                throw std::runtime_error(format("the filter of layer %u, KV head %d is zero", layer.il, (int) h));
            }
        }

        if (kv.attn_rot_k) {
            const int64_t n_rot = rotation_size(n_embd);
            rotate(kv.attn_rot_hadamard.at(n_rot), n_rot, rotated.data(), n_head*n_embd);
        }

        llama_edgekv_beside f(layer.k, GGML_TYPE_F32, { n_embd, n_head, 1, 1 }, format("edgekv_filters_l%u", layer.il), false, "the filters");
        ggml_backend_buffer_set_usage(f.buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_set(f.tensor, rotated.data(), 0, ggml_nbytes(f.tensor));
        filters.push_back(std::move(f));
    }
}

bool llama_edgekv_scorer::load_queries(const stream & st) {
    const auto refuse = [&](const char * why) {
        llama_edgekv_set_error(std::string("policy '") + cfg->policy->name + "' looks at the last queries, " + why);
        return false;
    };
    if (!st.tap) {
        return refuse("which this context does not collect: create it with tap_queries");
    }

    // no more than there are in every layer, than stay anyway, and than lie in the last cells
    int64_t n = std::min<int64_t>({ LLAMA_EDGEKV_TAP_TOKENS, cfg->window, st.n_exact, st.n_used });
    for (const auto & layer : kv.layers) {
        const auto tapped = st.tap->layers.find(layer.il);
        const bool found  = tapped != st.tap->layers.end() && tapped->second.streams.count(st.strm);
        n = found ? std::min<int64_t>(n, tapped->second.streams.at(st.strm).pos.size()) : 0;
    }
    if (n == 0) {
        return refuse("and there are none: the sequence was loaded, or its end was taken back");
    }
    n_queries = n;

    std::vector<float> rows;

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const uint32_t il     = kv.layers[i].il;
        const int64_t  n_embd = kv.hparams.n_embd_head_k(il);
        const int64_t  n_head = kv.hparams.n_head(il);

        const auto & last = st.tap->layers.at(il).streams.at(st.strm);

        kq_scale[i] = st.tap->layers.at(il).kq_scale;

        // [n][n_head][n_embd] -> [n_head][n][n_embd]
        rows.resize(n*n_head*n_embd);
        const float * from = last.queries.data() + (last.pos.size() - n)*n_head*n_embd;
        for (int64_t h = 0; h < n_head; ++h) {
            for (int64_t t = 0; t < n; ++t) {
                std::copy_n(from + (t*n_head + h)*n_embd, n_embd, rows.data() + (h*n + t)*n_embd);
            }
        }
        if (kv.attn_rot_k) {
            const int64_t n_rot = rotation_size(n_embd);
            rotate(kv.attn_rot_hadamard.at(n_rot), n_rot, rows.data(), rows.size());
        }
        ggml_backend_tensor_set(queries[i].tensor, rows.data(), 0, rows.size()*sizeof(float));
    }

    std::vector<float> mask(n*st.n_used, 0.0f);
    for (int64_t t = 0; t < n; ++t) {
        std::fill(mask.begin() + t*st.n_used + (st.n_used - n + t + 1), mask.begin() + (t + 1)*st.n_used, -INFINITY);
    }
    for (const auto & m : masks) {
        ggml_backend_tensor_set(m.tensor, mask.data(), 0, mask.size()*sizeof(float));
    }
    return true;
}

void llama_edgekv_scorer::load(
        const stream & st, const std::function<float(size_t i_layer, uint32_t i_head_kv, llama_pos pos)> & score) {
    std::vector<float> rows;

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const uint32_t n_head = kv.hparams.n_head_kv(kv.layers[i].il);

        rows.resize((size_t) n_head*st.n_used);
        for (uint32_t h = 0; h < n_head; ++h) {
            for (uint32_t c = 0; c < st.n_used; ++c) {
                rows[(size_t) h*st.n_used + c] = score(i, h, st.position(i, h, c));
            }
        }
        ggml_backend_tensor_set(given[i].tensor, rows.data(), 0, rows.size()*sizeof(float));
    }
}

void llama_edgekv_scorer::load_given(const stream & st) {
    if (cfg->policy->score) {
        load(st, [&](size_t i, uint32_t h, llama_pos pos) { return cfg->policy->score((uint32_t) i, h, pos); });
        return;
    }
    const float * scores = st.given;

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const size_t n = (size_t) kv.hparams.n_head_kv(kv.layers[i].il)*st.n_used;

        ggml_backend_tensor_set(given[i].tensor, scores, 0, n*sizeof(float));
        scores += n;
    }
}

void llama_edgekv_scorer::load_ages(const stream & st) {
    load(st, [&](size_t, uint32_t, llama_pos pos) { return (float) (st.n_past - pos)/(float) st.budget; });
}

bool llama_edgekv_scorer::prepare(const stream & st) {
    if (needs(llama_edgekv_policy::QUERIES) && !load_queries(st)) {
        return false;
    }
    if (needs(llama_edgekv_policy::GIVEN)) {
        load_given(st);
    }
    if (needs(llama_edgekv_policy::AGES)) {
        load_ages(st);
    }
    return true;
}

ggml_tensor * llama_edgekv_scorer::scores(ggml_context * ctx, size_t i_layer, ggml_tensor * keys, ggml_tensor * values) const {
    const int64_t n_used = keys->ne[2];

    // what was loaded lies at the beginning of the tensors, without gaps
    const auto view = [&](const llama_edgekv_beside & b, int64_t n0, int64_t n1, int64_t n2) {
        return ggml_view_3d(ctx, b.tensor, n0, n1, n2, n0*sizeof(float), n0*n1*sizeof(float), 0);
    };

    if (needs(llama_edgekv_policy::GIVEN)) {
        return view(given[i_layer], n_used, given[i_layer].tensor->ne[1], 1);
    }

    llama_edgekv_policy_input in = {};
    in.keys   = keys;
    in.values = values;
    if (!filters.empty()) {
        in.filters = filters[i_layer].tensor;
    }
    if (needs(llama_edgekv_policy::AGES)) {
        in.ages = view(given[i_layer], n_used, given[i_layer].tensor->ne[1], 1);
    }
    if (!queries.empty()) {
        const ggml_tensor * q = queries[i_layer].tensor;
        const int64_t       n = std::min(n_queries, n_used);

        in.queries  = view(queries[i_layer], q->ne[0], n, q->ne[2]);
        in.mask     = view(masks[mask_of[i_layer]], n_used, n, 1);
        in.kq_scale = kq_scale[i_layer];
    }
    return cfg->policy->scores(ctx, in);
}

size_t llama_edgekv_scorer::n_bytes() const {
    size_t res = 0;
    for (const auto * all : { &filters, &queries, &masks, &given }) {
        for (const auto & b : *all) {
            res += ggml_backend_buffer_get_size(b.buf.get());
        }
    }
    return res;
}
