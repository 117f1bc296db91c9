#pragma once

// Cases of the operators of selection.

#include "backend-ops-common.h"

struct test_edgekv_summarize : public test_edgekv_in_place {
    const ggml_type type;
    const int64_t   size, n_head_kv, n_cells, n_stream, strm, page_size;
    const int64_t   n_named; // cells that are named, 0: all pages
    const bool      odd;     // numbers that F16 cannot hold, infinities, NaN
    const bool      counted;

    ggml_tensor * summaries = nullptr;
    ggml_tensor * keys      = nullptr;
    ggml_tensor * named     = nullptr;
    std::vector<int64_t> list;

    std::string vars() override {
        return VARS_TO_STR10(type, size, n_head_kv, n_cells, n_stream, strm, page_size, n_named, odd, counted);
    }

    test_edgekv_summarize(ggml_type type, int64_t size, int64_t n_head_kv, int64_t n_cells, int64_t n_stream,
                          int64_t strm, int64_t page_size, int64_t n_named, bool odd = false, bool counted = false) :
        type(type), size(size), n_head_kv(n_head_kv), n_cells(n_cells), n_stream(n_stream), strm(strm),
        page_size(page_size), n_named(n_named), odd(odd), counted(counted) {}

    bool exact() override { return true; }

    int64_t n_pages() const { return (n_cells + page_size - 1)/page_size; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        // two pages without keys
        whole = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 2*size, n_head_kv, n_pages() + 2, strm + n_stream);
        summaries = ggml_view_4d(ctx, whole, 2*size, n_head_kv, n_pages() + 2, n_stream,
                                 whole->nb[1], whole->nb[2], whole->nb[3], strm*whole->nb[3]);
        keys  = rows(ctx, type, size, n_head_kv, n_cells, n_stream, strm);
        named = n_named ? ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_named) : nullptr;

        ggml_tensor * out = ggml_edgekv_summarize(ctx, summaries, keys, named, page_size);
        return result(counted ? count(ctx, out) : out);
    }

    void fill(ggml_tensor * t) override {
        if (t == named) {
            list.clear();
            for (int64_t i = 0; i < n_named; ++i) {
                // in any order, some twice
                list.push_back(i%5 == 4 ? list[below(i)] : below(n_cells*n_stream));
            }
            ggml_backend_tensor_set(t, list.data(), 0, ggml_nbytes(t));
            return;
        }
        std::vector<float> x = uniform(t, -1.0f, 1.0f);
        if (odd && t == keys->view_src) {
            const float some[] = { 1.0f + 1.0f/4096, -1.0f - 1.0f/4096, 70000.0f, -70000.0f, 1e-9f, -1e-9f, 0.0f, -0.0f,
                                   INF, -INF, 65504.0f, 65505.0f, -65504.0f, -65520.0f, 6.1e-5f, -6.0e-8f, NOT_A_NUM };
            for (auto & v : x) {
                // not so many that every channel of every page has one of the extremes
                v = below(2*page_size) == 0 ? some[below(sizeof(some)/sizeof(some[0]))] : v;
            }
        }
        set(t, x);
    }

    // all but the pages whose summaries are due
    void expect(std::vector<uint8_t> &, std::vector<bool> & open) override {
        const auto due = [&](int64_t page, int64_t s) {
            const size_t at = summaries->view_offs + page*summaries->nb[2] + s*summaries->nb[3];
            std::fill_n(open.begin() + at, summaries->nb[2], true);
        };
        for (const int64_t c : list) {
            due(c%n_cells/page_size, c/n_cells);
        }
        for (int64_t i = 0; i < n_pages()*n_stream && !named; ++i) {
            due(i%n_pages(), i/n_pages());
        }
    }

    size_t op_size(ggml_tensor * t) override {
        const int64_t n = n_named ? n_named : n_pages()*n_stream;
        return n*(n_head_kv*page_size*ggml_row_size(type, size) + t->nb[2]);
    }
};

struct test_edgekv_page_scores : public test_edgekv {
    const int64_t size, n_head_kv, group, n_pages, n_tokens, n_stream, strm;
    const bool    odd; // zeros in the query, bounds that are infinite
    const bool    counted;

    ggml_tensor * q         = nullptr;
    ggml_tensor * summaries = nullptr;

    std::string vars() override {
        return VARS_TO_STR9(size, n_head_kv, group, n_pages, n_tokens, n_stream, strm, odd, counted);
    }

    test_edgekv_page_scores(int64_t size, int64_t n_head_kv, int64_t group, int64_t n_pages, int64_t n_tokens = 1,
                            int64_t n_stream = 1, int64_t strm = 0, bool odd = false, bool counted = false) :
        size(size), n_head_kv(n_head_kv), group(group), n_pages(n_pages), n_tokens(n_tokens), n_stream(n_stream),
        strm(strm), odd(odd), counted(counted) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        q = query(ctx, size, n_head_kv*group, n_tokens, n_stream);

        // of a cache that has room for more
        ggml_tensor * all = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 2*size, n_head_kv, n_pages + 2, strm + n_stream);
        summaries = ggml_view_4d(ctx, all, 2*size, n_head_kv, n_pages, n_stream, all->nb[1], all->nb[2], all->nb[3],
                                 strm*all->nb[3]);

        ggml_tensor * out = ggml_edgekv_page_scores(ctx, q, summaries);
        return result(counted ? count(ctx, out) : out);
    }

    void fill(ggml_tensor * t) override {
        std::vector<float> x = uniform(t, -1.0f, 1.0f);
        if (t == summaries->view_src) {
            for (size_t i = 0; i + size < x.size(); ++i) {
                if ((int64_t) i/size%2 == 0) {
                    x[i + size] = x[i] - uniform(0.0f, 1.0f);
                    if (odd && below(size*8) == 0) {
                        x[i] = INF;
                    }
                    if (odd && below(size*8) == 0) {
                        x[i + size] = -INF;
                    }
                }
            }
        } else if (odd && t == q->view_src) {
            for (auto & v : x) {
                v = below(4) == 0 ? 0.0f : v;
            }
        }
        set(t, x);
    }

    size_t op_size(ggml_tensor * t) override {
        return ggml_nbytes(t) + ggml_nbytes(q->view_src) + n_pages*n_stream*summaries->nb[2];
    }
};

struct test_edgekv_choose_pages : public test_edgekv {
    const int64_t n_cells, page_size;
    const int64_t n_spare; // pages beyond the cells
    const int64_t n_head_kv, n_tokens, n_stream, n_first, n_chosen;
    const std::string mask_kind, scores;
    const int64_t n_padding; // tokens that only the mask has
    const bool    counted;

    ggml_tensor * input = nullptr;
    ggml_tensor * mask  = nullptr;

    std::string vars() override {
        return VARS_TO_STR12(n_cells, page_size, n_spare, n_head_kv, n_tokens, n_stream, n_first, n_chosen, mask_kind,
                             scores, n_padding, counted);
    }

    test_edgekv_choose_pages(int64_t n_cells, int64_t page_size, int64_t n_spare, int64_t n_head_kv, int64_t n_tokens,
                             int64_t n_stream, int64_t n_first, int64_t n_chosen, std::string mask_kind,
                             std::string scores, int64_t n_padding = 0, bool counted = false) :
        n_cells(n_cells), page_size(page_size), n_spare(n_spare), n_head_kv(n_head_kv), n_tokens(n_tokens),
        n_stream(n_stream), n_first(n_first), n_chosen(n_chosen), mask_kind(std::move(mask_kind)),
        scores(std::move(scores)), n_padding(n_padding), counted(counted) {}

    bool exact() override { return true; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const int64_t n_pages = (n_cells + page_size - 1)/page_size + n_spare;

        input = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, n_pages, n_head_kv, n_tokens, n_stream);
        mask  = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_cells, n_tokens + n_padding, 1, n_stream);

        ggml_tensor * out = ggml_edgekv_choose_pages(ctx, input, mask, page_size, n_first, n_chosen);
        return result(counted ? count(ctx, out) : out);
    }

    void fill(ggml_tensor * t) override {
        if (t == mask) {
            fill_mask(t, mask_kind, n_tokens);
        } else if (t == input) {
            fill_scores(t, scores);
        } else {
            test_edgekv::fill(t);
        }
    }

    bool check() override {
        if (!counted) {
            return true;
        }
        std::vector<ggml_fp16_t> x(ggml_nelements(mask));
        ggml_backend_tensor_get(mask, x.data(), 0, ggml_nbytes(mask));
        int64_t n_read = 0;
        int64_t n_seen = 0;
        for (int64_t i = 0; i < n_tokens*n_stream; ++i) {
            const ggml_fp16_t * row = x.data() + (i/n_tokens*mask->ne[1] + i%n_tokens)*n_cells;
            std::set<int64_t> pages;
            for (int64_t c = 0; c < n_cells; ++c) {
                if (ggml_fp16_to_fp32(row[c]) != -INF) {
                    pages.insert(c/page_size);
                }
            }
            n_seen += n_head_kv*pages.size();
            n_read += n_head_kv*std::min<int64_t>(n_chosen, pages.size());
        }
        return check_counters({ n_read, n_seen });
    }
};

struct edgekv_attn_shape {
    ggml_type   type_k    = GGML_TYPE_F16;
    ggml_type   type_v    = GGML_TYPE_F16;
    int64_t     size_k    = 64;
    int64_t     size_v    = 64;
    int64_t     n_head_kv = 2;
    int64_t     group     = 3;
    int64_t     n_cells   = 65;
    int64_t     n_tokens  = 1;
    int64_t     n_stream  = 1;
    int64_t     strm      = 0;
    int64_t     page_size = 16;
    int64_t     n_chosen  = 3; // pages; 0: attention on all cells
    std::string mask_kind = "holes";
    bool        sinks     = false;
    float       softcap   = 0.0f;
    float       sharpness = 1.0f; // factor of the usual scale
    bool        counted   = false;
};

struct test_edgekv_attn : public test_edgekv, public edgekv_attn_shape {
    ggml_tensor * q     = nullptr;
    ggml_tensor * mask  = nullptr;
    ggml_tensor * pages = nullptr;

    std::string vars() override {
        return VARS_TO_STR17(type_k, type_v, size_k, size_v, n_head_kv, group, n_cells, n_tokens, n_stream, strm,
                             page_size, n_chosen, mask_kind, sinks, softcap, sharpness, counted);
    }

    explicit test_edgekv_attn(const edgekv_attn_shape & shape) : edgekv_attn_shape(shape) {}

    // room for weights or sums in F16
    double max_nmse_err() override { return 1e-6; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        q    = query(ctx, size_k, n_head_kv*group, n_tokens, n_stream);
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_cells, n_tokens + strm, 1, n_stream); // some are padded

        ggml_tensor * keys   = rows(ctx, type_k, size_k, n_head_kv, n_cells, n_stream, strm);
        ggml_tensor * values = rows(ctx, type_v, size_v, n_head_kv, n_cells, n_stream, strm);
        ggml_tensor * sink   = sinks ? ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n_head_kv*group) : nullptr;

        pages = n_chosen ? ggml_new_tensor_4d(ctx, GGML_TYPE_I32, n_chosen, n_head_kv, n_tokens, n_stream) : nullptr;

        ggml_tensor * out = ggml_edgekv_attn(ctx, q, keys, values, mask, pages, sink, page_size,
                                             sharpness/sqrtf((float) size_k), softcap);
        return result(counted ? count(ctx, out) : out);
    }

    void fill(ggml_tensor * t) override {
        if (t == mask) {
            fill_mask(t, mask_kind, n_tokens);
        } else if (t == q->view_src) {
            set(t, uniform(t, -4.0f, 4.0f));
        } else if (t == pages) {
            const int64_t n_pages = (n_cells + page_size - 1)/page_size;
            std::vector<int32_t> x;
            for (int64_t unit = 0; unit < n_head_kv*n_tokens*n_stream; ++unit) {
                const int64_t most = std::min(n_chosen, n_pages);
                // full lists, padded ones, and now and then an empty one
                const int64_t n = mode == MODE_PERF || unit%3 == 0 ? most : unit%7 == 6 ? 0 : 1 + below(most);

                std::vector<int32_t> list = subset(n_pages, n);
                list.resize(n_chosen, -1);
                x.insert(x.end(), list.begin(), list.end());
            }
            ggml_backend_tensor_set(t, x.data(), 0, ggml_nbytes(t));
        } else {
            test_edgekv::fill(t);
        }
    }

    // rows of K and V that are read, once per KV head and token
    size_t op_size(ggml_tensor * t) override {
        const int64_t n_read = n_chosen ? std::min(n_cells, n_chosen*page_size) : n_cells;
        const size_t  cell   = ggml_row_size(type_k, size_k) + ggml_row_size(type_v, size_v) + sizeof(ggml_fp16_t);
        return ggml_nbytes(t) + ggml_nbytes(q->view_src) + n_read*cell*n_head_kv*n_tokens*n_stream +
               (pages ? ggml_nbytes(pages) : 0);
    }
};

// Scores of pages, choice and attention in one graph, as a decode step runs them. The scores are far enough apart.
struct test_edgekv_select : public test_edgekv {
    const ggml_type type;
    const int64_t   size, n_head_kv, group, n_cells, n_tokens, n_stream, strm, page_size, n_chosen;
    const std::string mask_kind;
    const bool      summarized; // in the same graph, as when a token was stored

    ggml_tensor * q         = nullptr;
    ggml_tensor * keys      = nullptr;
    ggml_tensor * summaries = nullptr;
    ggml_tensor * mask      = nullptr;

    std::vector<float> cache; // K before it was rounded

    std::string op_desc(ggml_tensor *) override { return "EDGEKV_SELECT"; }

    std::string vars() override {
        return VARS_TO_STR12(type, size, n_head_kv, group, n_cells, n_tokens, n_stream, strm, page_size, n_chosen,
                             mask_kind, summarized);
    }

    test_edgekv_select(ggml_type type, int64_t size, int64_t n_head_kv, int64_t group, int64_t n_cells,
                       int64_t n_tokens, int64_t n_stream, int64_t strm, int64_t page_size, int64_t n_chosen,
                       std::string mask_kind, bool summarized) :
        type(type), size(size), n_head_kv(n_head_kv), group(group), n_cells(n_cells), n_tokens(n_tokens),
        n_stream(n_stream), strm(strm), page_size(page_size), n_chosen(n_chosen), mask_kind(std::move(mask_kind)),
        summarized(summarized) {}

    double max_nmse_err() override { return 1e-6; }

    int64_t n_pages() const { return (n_cells + page_size - 1)/page_size; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        q    = query(ctx, size, n_head_kv*group, n_tokens, n_stream);
        keys = rows(ctx, type, size, n_head_kv, n_cells, n_stream, strm);
        mask = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, n_cells, n_tokens, 1, n_stream);

        ggml_tensor * values = rows(ctx, type, size, n_head_kv, n_cells, n_stream, strm);
        ggml_tensor * all    = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, 2*size, n_head_kv, n_pages(), strm + n_stream);

        summaries = ggml_view_4d(ctx, all, 2*size, n_head_kv, n_pages(), n_stream, all->nb[1], all->nb[2], all->nb[3],
                                 strm*all->nb[3]);

        ggml_tensor * current = summaries;
        if (summarized) {
            current = ggml_edgekv_summarize(ctx, summaries, keys, nullptr, page_size);
        }
        ggml_tensor * scores = ggml_edgekv_page_scores(ctx, q, current);
        ggml_tensor * pages  = ggml_edgekv_choose_pages(ctx, scores, mask, page_size, 1, n_chosen);
        return result(ggml_edgekv_attn(ctx, q, keys, values, mask, pages, nullptr, page_size, 1.0f/size, 0.0f));
    }

    // The query is a vector of 1 and -1, a key a multiple of it, both with noise. The multiples are at least 1/20 apart
    // from page to page, the noise is at most a tenth of that.
    void fill(ggml_tensor * t) override {
        if (t == mask) {
            fill_mask(t, mask_kind, n_tokens);
        } else if (t == q->view_src) {
            std::vector<float> x(ggml_nelements(t));
            for (size_t i = 0; i < x.size(); ++i) {
                x[i] = sign(i%size) + uniform(-0.005f, 0.005f);
            }
            set(t, x);
        } else if (t == keys->view_src) {
            draw();
            set(t, cache);
        } else if (t == summaries->view_src) {
            if (cache.empty()) {
                draw();
            }
            // of the keys before they were rounded; summarized ones replace them
            std::vector<float> x(ggml_nelements(t));
            for (int64_t s = 0; s < strm + n_stream; ++s) {
                for (int64_t c = 0; c < n_cells; ++c) {
                    for (int64_t i = 0; i < size*n_head_kv; ++i) {
                        const float key = cache[(s*(n_cells + SPARE) + c)*size*n_head_kv + i];
                        float * hi = x.data() + ((s*n_pages() + c/page_size)*n_head_kv + i/size)*2*size + i%size;
                        float * lo = hi + size;
                        *hi = c%page_size ? std::max(*hi, key) : key;
                        *lo = c%page_size ? std::min(*lo, key) : key;
                    }
                }
            }
            set(t, x);
        } else {
            test_edgekv::fill(t);
        }
    }

    void draw() {
        cache.assign((strm + n_stream)*(n_cells + SPARE)*size*n_head_kv, 0.0f);
        std::vector<int32_t> rank(n_pages());
        std::iota(rank.begin(), rank.end(), 1);
        for (int64_t s = 0; s < strm + n_stream; ++s) {
            for (int64_t h = 0; h < n_head_kv; ++h) {
                std::shuffle(rank.begin(), rank.end(), rng);
                for (int64_t c = 0; c < n_cells; ++c) {
                    for (int64_t i = 0; i < size; ++i) {
                        cache[((s*(n_cells + SPARE) + c)*n_head_kv + h)*size + i] =
                            rank[c/page_size]/20.0f*sign(i) + uniform(-0.005f, 0.005f);
                    }
                }
            }
        }
    }
};
