#pragma once

// Cases of the operators of eviction.

#include "backend-ops-common.h"

static std::string var_to_str(ggml_edgekv_score_kind kind) {
    switch (kind) {
        case GGML_EDGEKV_SCORE_DOT:  return "dot";
        case GGML_EDGEKV_SCORE_NORM: return "norm";
        case GGML_EDGEKV_SCORE_COS:  return "cos";
    }
    return std::to_string((int) kind);
}

struct test_edgekv_score : public test_edgekv {
    const ggml_edgekv_score_kind kind;
    const ggml_type type;
    const int64_t size, n_head_kv, n_cells;
    const int64_t strm;
    const bool    by_head; // the cells of a head lie together
    const float   scale;

    ggml_tensor * keys = nullptr;

    std::string vars() override { return VARS_TO_STR8(kind, type, size, n_head_kv, n_cells, strm, by_head, scale); }

    test_edgekv_score(ggml_edgekv_score_kind kind, ggml_type type, int64_t size, int64_t n_head_kv, int64_t n_cells,
                      int64_t strm = 0, bool by_head = false, float scale = 1.0f) :
        kind(kind), type(type), size(size), n_head_kv(n_head_kv), n_cells(n_cells), strm(strm), by_head(by_head),
        scale(scale) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        keys = by_head ? ggml_permute(ctx, rows(ctx, type, size, n_cells, n_head_kv, 1, strm), 0, 2, 1, 3)
                       : rows(ctx, type, size, n_head_kv, n_cells, 1, strm);
        ggml_tensor * vec = nullptr;
        if (kind != GGML_EDGEKV_SCORE_NORM) {
            vec = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, size, n_head_kv);
        }

        return result(ggml_edgekv_score(ctx, keys, vec, kind, scale));
    }

    void fill(ggml_tensor * t) override {
        std::vector<float> x = uniform(t, -1.0f, 1.0f);
        if (t == keys->view_src && n_cells > 1) {
            const int64_t zero = element(keys, n_head_kv - 1, n_cells/2); // a key without a direction
            if (zero + size <= (int64_t) x.size()) {
                std::fill_n(x.begin() + zero, size, 0.0f);
            }
        }
        set(t, x);
    }
};

struct test_edgekv_key_mean : public test_edgekv {
    const ggml_type type;
    const int64_t size, n_head_kv, n_cells;
    const int64_t strm;
    const bool    by_head;
    const bool    odd; // a zero key and one with a NaN; without: none

    ggml_tensor * keys = nullptr;

    std::string vars() override { return VARS_TO_STR7(type, size, n_head_kv, n_cells, strm, by_head, odd); }

    test_edgekv_key_mean(ggml_type type, int64_t size, int64_t n_head_kv, int64_t n_cells, int64_t strm = 0,
                         bool by_head = false, bool odd = false) :
        type(type), size(size), n_head_kv(n_head_kv), n_cells(n_cells), strm(strm), by_head(by_head), odd(odd) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        keys = by_head ? ggml_permute(ctx, rows(ctx, type, size, n_cells, n_head_kv, 1, strm), 0, 2, 1, 3)
                       : rows(ctx, type, size, n_head_kv, n_cells, 1, strm);
        return result(ggml_edgekv_key_mean(ctx, keys));
    }

    void fill(ggml_tensor * t) override {
        std::vector<float> x = uniform(t, -1.0f, 1.0f);
        if (odd && t == keys->view_src) {
            std::fill_n(x.begin() + element(keys, 0, 0), size, 0.0f);
            x[element(keys, n_head_kv - 1, n_cells - 1) + size/2] = NOT_A_NUM;
        }
        set(t, x);
    }
};

struct test_edgekv_choose : public test_edgekv {
    const int64_t     n_cells, n_head_kv;
    const bool        shared; // one row of scores for all heads
    const int64_t     n_keep, window, n_chosen;
    const std::string scores;

    ggml_tensor * input = nullptr;

    std::string vars() override { return VARS_TO_STR7(n_cells, n_head_kv, shared, n_keep, window, n_chosen, scores); }

    test_edgekv_choose(int64_t n_cells, int64_t n_head_kv, bool shared, int64_t n_keep, int64_t window,
                       int64_t n_chosen, std::string scores) :
        n_cells(n_cells), n_head_kv(n_head_kv), shared(shared), n_keep(n_keep), window(window), n_chosen(n_chosen),
        scores(std::move(scores)) {}

    bool exact() override { return true; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        input = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, n_cells, shared ? 1 : n_head_kv);
        return result(ggml_edgekv_choose(ctx, input, n_head_kv, n_keep, window, n_chosen));
    }

    void fill(ggml_tensor * t) override {
        if (t == input) {
            fill_scores(t, scores);
        } else {
            test_edgekv::fill(t);
        }
    }
};

struct test_edgekv_compact : public test_edgekv_in_place {
    const ggml_type type;
    const int64_t   size, n_head_kv, n_cells;
    const int64_t   strm;
    const bool      trans;
    const int64_t   n_chosen;
    // same: nothing moves; shift: the last ones; spread: any, others in each head; edge: the first and the last few
    const std::string cells;

    ggml_tensor * view   = nullptr;
    ggml_tensor * chosen = nullptr;
    std::vector<int32_t> list;

    std::string vars() override { return VARS_TO_STR8(type, size, n_head_kv, n_cells, strm, trans, n_chosen, cells); }

    test_edgekv_compact(ggml_type type, int64_t size, int64_t n_head_kv, int64_t n_cells, int64_t strm, bool trans,
                        int64_t n_chosen, std::string cells) :
        type(type), size(size), n_head_kv(n_head_kv), n_cells(n_cells), strm(strm), trans(trans), n_chosen(n_chosen),
        cells(std::move(cells)) {}

    bool exact() override { return true; }

    ggml_tensor * build_graph(ggml_context * ctx) override {
        if (trans) {
            ggml_tensor * cache = ggml_new_tensor_3d(ctx, type, size*n_head_kv, n_cells + SPARE, strm + 1);
            const size_t nb = ggml_type_size(type)*cache->ne[1];
            view = ggml_view_3d(ctx, cache, n_cells, size, n_head_kv, nb, nb*size, strm*cache->nb[2]);
            view = ggml_permute(ctx, view, 2, 0, 1, 3);
        } else {
            view = rows(ctx, type, size, n_head_kv, n_cells, 1, strm);
        }
        whole  = view->view_src;
        chosen = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_chosen, n_head_kv);

        return result(ggml_edgekv_compact(ctx, view, chosen));
    }

    void fill(ggml_tensor * t) override {
        if (t != chosen) {
            test_edgekv::fill(t);
            return;
        }
        list.clear();
        for (int64_t h = 0; h < n_head_kv; ++h) {
            std::vector<int32_t> x(n_chosen);
            if (cells == "spread") {
                x = subset(n_cells, n_chosen);
            } else {
                std::iota(x.begin(), x.end(), 0);
                const int64_t kept = cells == "same" ? n_chosen : cells == "edge" ? (n_chosen + 7)/8 : 0;
                for (int64_t i = kept; i < n_chosen; ++i) {
                    x[i] = (int32_t) (n_cells - n_chosen + i);
                }
            }
            list.insert(list.end(), x.begin(), x.end());
        }
        ggml_backend_tensor_set(t, list.data(), 0, ggml_nbytes(t));
    }

    void expect(std::vector<uint8_t> & bytes, std::vector<bool> & open) override {
        const int64_t n_parts = trans ? size : 1; // adjacent ones of a row
        const size_t  length  = trans ? ggml_type_size(type) : ggml_row_size(type, size);

        for (int64_t h = 0; h < n_head_kv; ++h) {
            for (int64_t part = 0; part < n_parts; ++part) {
                const size_t at = view->view_offs + h*view->nb[1] + part*view->nb[0];
                for (int64_t i = 0; i < n_cells; ++i) {
                    const size_t to = at + i*view->nb[2];
                    if (i < n_chosen) {
                        memcpy(&bytes[to], &before[at + list[h*n_chosen + i]*view->nb[2]], length);
                    } else {
                        std::fill_n(open.begin() + to, length, true);
                    }
                }
            }
        }
    }

    // without the rows whose content is unspecified, which come last
    double err(const float * a, const float * b, size_t n) override {
        if ((int64_t) n != n_out) {
            return test_edgekv::err(a, b, n);
        }
        return worst(a, b, size*n_head_kv*n_chosen) == 0.0 && check() ? 0.0 : INFINITY;
    }

    // rows that stay are neither read nor written
    size_t op_size(ggml_tensor *) override {
        return 2*n_chosen*n_head_kv*ggml_row_size(type, size);
    }
};

// Scores, choice and move in one graph, as an eviction runs them. The scores are far enough apart.
struct test_edgekv_evict : public test_edgekv {
    const ggml_type type;
    const int64_t   size, n_head_kv, n_cells, n_keep, window, n_chosen;

    ggml_tensor * keys = nullptr;
    ggml_tensor * vec  = nullptr;

    std::string op_desc(ggml_tensor *) override { return "EDGEKV_EVICT"; }

    std::string vars() override { return VARS_TO_STR7(type, size, n_head_kv, n_cells, n_keep, window, n_chosen); }

    test_edgekv_evict(ggml_type type, int64_t size, int64_t n_head_kv, int64_t n_cells, int64_t n_keep, int64_t window,
                      int64_t n_chosen) :
        type(type), size(size), n_head_kv(n_head_kv), n_cells(n_cells), n_keep(n_keep), window(window),
        n_chosen(n_chosen) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        keys = rows(ctx, type, size, n_head_kv, n_cells, 1, 0);
        vec  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, size, n_head_kv);

        ggml_tensor * scores = ggml_edgekv_score(ctx, keys, vec, GGML_EDGEKV_SCORE_DOT, 1.0f);
        ggml_tensor * chosen = ggml_edgekv_choose(ctx, scores, n_head_kv, n_keep, window, n_chosen);
        return result(ggml_edgekv_compact(ctx, keys, chosen));
    }

    // the key of a cell is its rank times the vector, whose elements are 1 or -1
    void fill(ggml_tensor * t) override {
        std::vector<float> x(ggml_nelements(t));
        if (t == vec) {
            for (size_t i = 0; i < x.size(); ++i) {
                x[i] = sign(i);
            }
        } else if (t == keys->view_src) {
            std::vector<int32_t> rank(n_cells);
            std::iota(rank.begin(), rank.end(), 1);
            for (int64_t h = 0; h < n_head_kv; ++h) {
                std::shuffle(rank.begin(), rank.end(), rng);
                for (int64_t c = 0; c < n_cells; ++c) {
                    for (int64_t i = 0; i < size; ++i) {
                        x[element(keys, h, c) + i] = rank[c]*sign(h*size + i);
                    }
                }
            }
        }
        set(t, x);
    }

    double err(const float * a, const float * b, size_t n) override {
        return worst(a, b, (int64_t) n == n_out ? size*n_head_kv*n_chosen : n);
    }
};
