#pragma once

// What the cases of edgekv's operators share: tensors as the runtime lays them out, their content, comparisons.

#include "ggml-edgekv.h"

#include <cmath>
#include <limits>
#include <numeric>

struct test_edgekv : public test_case {
    static constexpr float INF         = std::numeric_limits<float>::infinity();
    static constexpr float NOT_A_NUM   = std::numeric_limits<float>::quiet_NaN();
    static constexpr int64_t SPARE     = 3;       // unused cells behind those of a view
    static constexpr int64_t MAX_DRAWN = 1 << 20; // numbers; the same again in what is larger

    std::mt19937  rng;
    ggml_tensor * counters = nullptr; // with one row per kind of operator, as the runtime has them
    int64_t       n_out    = 0;       // numbers in the result

    // whether all numbers must be equal
    virtual bool exact() { return false; }

    virtual void fill(ggml_tensor * t) {
        set(t, uniform(t, -1.0f, 1.0f));
    }

    // for what else can be seen after the result was computed: on the backend under test
    virtual bool check() { return true; }

    // --- inputs ---

    void initialize_tensors(ggml_context * ctx) override {
        const std::string text = vars();
        std::seed_seq     seed(text.begin(), text.end());
        rng.seed(seed);

        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
            if (t->op != GGML_OP_NONE || t->view_src) {
                continue;
            }
            if (counters && t == counters->view_src) {
                const std::vector<int64_t> zeros(ggml_nelements(t), 0);
                ggml_backend_tensor_set(t, zeros.data(), 0, ggml_nbytes(t));
            } else {
                fill(t);
            }
        }
    }

    float uniform(float low, float high) {
        return low + (high - low)*((float) (rng() >> 8)/(1 << 24));
    }

    std::vector<float> uniform(const ggml_tensor * t, float low, float high) {
        std::vector<float> x(std::min(ggml_nelements(t), MAX_DRAWN));
        for (auto & v : x) {
            v = uniform(low, high);
        }
        return x;
    }

    int64_t below(int64_t n) { return rng()%n; }

    // of element i in a direction without a pattern
    static float sign(int64_t i) { return i*i%7 < 3 ? 1.0f : -1.0f; }

    // x, again and again, in the tensor's type
    static void set(ggml_tensor * t, const std::vector<float> & x) {
        std::vector<uint8_t> bytes(ggml_row_size(t->type, x.size()));
        switch (t->type) {
            case GGML_TYPE_F32:  memcpy(bytes.data(), x.data(), bytes.size());                             break;
            case GGML_TYPE_F16:  ggml_fp32_to_fp16_row(x.data(), (ggml_fp16_t *) bytes.data(), x.size());  break;
            case GGML_TYPE_BF16: ggml_fp32_to_bf16_row(x.data(), (ggml_bf16_t *) bytes.data(), x.size());  break;
            default:
                GGML_ASSERT(ggml_is_quantized(t->type));
                ggml_quantize_chunk(t->type, x.data(), bytes.data(), 0, 1, x.size(), nullptr);
        }
        for (size_t offset = 0; offset < ggml_nbytes(t); offset += bytes.size()) {
            ggml_backend_tensor_set(t, bytes.data(), offset, std::min(bytes.size(), ggml_nbytes(t) - offset));
        }
    }

    // k of the numbers below n, ascending
    std::vector<int32_t> subset(int64_t n, int64_t k) {
        std::vector<int32_t> res;
        for (int64_t i = 0; i < n && k > 0; ++i) {
            if (below(n - i) < k) {
                res.push_back((int32_t) i);
                --k;
            }
        }
        return res;
    }

    // [size, n_head_kv, n_cells, n_stream] of a cache whose streams begin with one that is not in the view if strm is 1
    ggml_tensor * rows(ggml_context * ctx, ggml_type type, int64_t size, int64_t n_head_kv, int64_t n_cells,
                       int64_t n_stream, int64_t strm) {
        ggml_tensor * cache = ggml_new_tensor_3d(ctx, type, size*n_head_kv, n_cells + SPARE, n_stream + strm);
        return ggml_view_4d(ctx, cache, size, n_head_kv, n_cells, n_stream,
                            ggml_row_size(type, size), cache->nb[1], cache->nb[2], strm*cache->nb[2]);
    }

    // [size, n_tokens, n_head, n_stream] of what a projection gives
    ggml_tensor * query(ggml_context * ctx, int64_t size, int64_t n_head, int64_t n_tokens, int64_t n_stream) {
        return ggml_permute(ctx, ggml_new_tensor_4d(ctx, GGML_TYPE_F32, size, n_head, n_tokens, n_stream), 0, 2, 1, 3);
    }

    // where row (h, c) of a view begins among the elements of its cache
    static int64_t element(const ggml_tensor * view, int64_t h, int64_t c) {
        return (view->view_offs + h*view->nb[1] + c*view->nb[2])/ggml_type_size(view->type)*ggml_blck_size(view->type);
    }

    // none      every token sees every cell
    // causal    the last tokens of the cache are those that ask
    // used      causal, and the streams use different numbers of cells
    // holes     causal, with pages and single cells that no one may see
    // bias      as holes, and finite numbers elsewhere
    // blind     as holes, and the first token sees nothing
    void fill_mask(ggml_tensor * t, const std::string & kind, int64_t n_tokens) {
        const int64_t n_cells = t->ne[0];
        std::vector<float> x(ggml_nelements(t), 0.0f);

        for (int64_t s = 0; s < t->ne[3] && kind != "none"; ++s) {
            const int64_t used = kind == "used" ? 1 + (n_cells - 1)*(s + 1)/(t->ne[3] + 1) : n_cells;

            for (int64_t i = 0; i < n_tokens; ++i) {
                float * row = x.data() + (s*t->ne[1] + i)*n_cells;
                for (int64_t c = 0; c < n_cells; ++c) {
                    row[c] = kind == "bias" ? uniform(-2.0f, 0.0f) : 0.0f;
                    if (c > std::max<int64_t>(0, used - n_tokens + i)) {
                        row[c] = -INF;
                    }
                }
                if (kind == "holes" || kind == "bias" || kind == "blind") {
                    for (int64_t c = 0; c < n_cells; ++c) {
                        if (below(8) == 0) {
                            const int64_t end = std::min(n_cells, c + (below(2) ? 1 : 1 + below(64)));
                            std::fill(row + c, row + end, -INF);
                            c = end;
                        }
                    }
                }
                if (kind == "blind" && s == 0 && i == 0) {
                    std::fill(row, row + n_cells, -INF);
                }
            }
        }
        set(t, x);
    }

    // distinct  no ties
    // ties      of many
    // equal     all the same
    // special   NaN, infinities, both zeros, and numbers that differ in the last bit
    void fill_scores(ggml_tensor * t, const std::string & kind) {
        const std::array<float, 12> some = {
            NOT_A_NUM, INF, -INF, 0.0f, -0.0f, 1.0f, std::nextafter(1.0f, 2.0f), -1.0f, std::nextafter(-1.0f, -2.0f),
            FLT_MAX, -FLT_MAX, FLT_MIN,
        };
        const int64_t n = t->ne[0];
        std::vector<float> x(ggml_nelements(t), -0.5f);

        for (size_t i = 0; i < x.size() && kind != "equal"; ++i) {
            x[i] = kind == "special" ? some[below(some.size())] :
                   kind == "ties"    ? below(4) - 1.5f : 0.37f*((int64_t) i%n - n/3);
        }
        for (auto row = x.begin(); row != x.end() && kind == "distinct"; row += n) {
            std::shuffle(row, row + n, rng);
        }
        set(t, x);
    }

    // --- results ---

    ggml_tensor * count(ggml_context * ctx, ggml_tensor * op) {
        ggml_tensor * all = ggml_new_tensor_2d(ctx, GGML_TYPE_I64, 4, 3);
        counters = ggml_view_1d(ctx, all, 4, all->nb[1]);
        ggml_edgekv_set_counters(op, counters);
        return op;
    }

    ggml_tensor * result(ggml_tensor * out) {
        ggml_set_name(out, "out");
        n_out = ggml_nelements(out);
        return out;
    }

    double max_nmse_err() override { return exact() ? 0.0 : 1e-7; }

    // The greatest squared difference over the mean square. Zeros, infinities and NaN do not make it pass.
    static double worst(const float * a, const float * b, size_t n) {
        double diff = 0.0;
        double sum  = 0.0;
        size_t n_finite = 0;
        for (size_t i = 0; i < n; ++i) {
            if (std::isfinite(a[i])) {
                sum += (double) a[i]*a[i];
                ++n_finite;
            }
            if (a[i] != b[i]) {
                const double d = (double) a[i] - b[i];
                diff = d*d <= diff ? diff : d == d ? d*d : INFINITY;
            }
        }
        return diff == 0.0 ? 0.0 : sum == 0.0 ? INFINITY : diff*n_finite/sum;
    }

    double err(const float * a, const float * b, size_t n) override {
        const double res = worst(a, b, n);
        if ((int64_t) n == n_out && (!check() || !check_counters({}))) {
            return INFINITY;
        }
        return exact() && res > 0.0 ? INFINITY : res;
    }

    // each operator was computed once; pages: chosen and visible ones
    bool check_counters(const std::vector<int64_t> & pages) {
        if (!counters) {
            return true;
        }
        int64_t x[3][4];
        ggml_backend_tensor_get(counters->view_src, x, 0, sizeof(x));
        const bool others = std::all_of(x[0], x[0] + 4, [](int64_t v) { return v == 0; }) &&
                            std::all_of(x[2], x[2] + 4, [](int64_t v) { return v == 0; });
        const bool ok = others && x[1][0] >= 0 && x[1][1] == 1 &&
                        (pages.empty() || (x[1][2] == pages[0] && x[1][3] == pages[1]));
        if (!ok) {
            printf("counters: %" PRId64 " ns, %" PRId64 " computations, %" PRId64 " of %" PRId64 " pages ",
                   x[1][0], x[1][1], x[1][2], x[1][3]);
        }
        return ok;
    }
};

// An operator that works in place. What it must not touch, and what it must move, is compared byte by byte.
struct test_edgekv_in_place : public test_edgekv {
    ggml_tensor *        whole = nullptr; // that a view of is worked on
    std::vector<uint8_t> before;

    // turns the bytes before into those after; `open` marks bytes that are not compared here
    virtual void expect(std::vector<uint8_t> & bytes, std::vector<bool> & open) = 0;

    void initialize_tensors(ggml_context * ctx) override {
        test_edgekv::initialize_tensors(ctx);
        if (mode == MODE_TEST) {
            before.resize(ggml_nbytes(whole));
            ggml_backend_tensor_get(whole, before.data(), 0, before.size());
        }
    }

    bool check() override {
        std::vector<uint8_t> after(before.size());
        std::vector<uint8_t> want = before;
        std::vector<bool>    open(before.size());
        ggml_backend_tensor_get(whole, after.data(), 0, after.size());
        expect(want, open);

        for (size_t i = 0; i < want.size(); ++i) {
            if (!open[i] && after[i] != want[i]) {
                printf("byte %zu of %zu is wrong ", i, want.size());
                return false;
            }
        }
        return true;
    }
};
