#pragma once

// Cases of llama.cpp's test-backend-ops for the operators of ggml-edgekv.h. A patch includes this file where all of its
// own kinds of cases are defined, and calls the two functions at the end.
//
// Inputs follow from the parameters of a case alone, so every run and every backend sees the same ones. Tensors lie as
// the runtime's do: keys and values are views of a cache with other streams before and unused cells behind, queries are
// a permuted view. Results that are choices or copies must be equal; of the others the worst element counts.
//
// CPU kernels are compared with each other by naming a second variant of the CPU backend:
//   GGML_BACKEND_PATH=.../libggml-cpu-x64.so test-backend-ops -b CPU -o 'EDGEKV.*'

#include "backend-ops-evict.h"
#include "backend-ops-select.h"

using edgekv_cases = std::vector<std::unique_ptr<test_case>>;

template <typename T, typename... A>
static void edgekv_add(edgekv_cases & cases, A... arguments) {
    cases.emplace_back(new T(arguments...));
}

static const ggml_type edgekv_types[] = {
    GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_Q4_1, GGML_TYPE_Q5_0,
    GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL,
};

static const int64_t edgekv_sizes[] = { 64, 80, 96, 128, 192, 256 };

// at and around the edges of pages, blocks of threads and parts
static const int64_t edgekv_n_cells[] = {
    1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1025,
};

static bool edgekv_fits(ggml_type type, int64_t size) {
    return size%ggml_blck_size(type) == 0;
}

static void edgekv_eval_eviction(edgekv_cases & cases) {
    const ggml_edgekv_score_kind kinds[] = { GGML_EDGEKV_SCORE_DOT, GGML_EDGEKV_SCORE_NORM, GGML_EDGEKV_SCORE_COS };

    // every type and head size
    for (const ggml_type type : edgekv_types) {
        for (const int64_t size : edgekv_sizes) {
            if (!edgekv_fits(type, size)) {
                continue;
            }
            for (const auto kind : kinds) {
                edgekv_add<test_edgekv_score>(cases, kind, type, size, 3, 65, 1);
            }
            edgekv_add<test_edgekv_key_mean>(cases, type, size, 3, 65, 1);
            edgekv_add<test_edgekv_compact>(cases, type, size, 3, 65, 1, false, 41, "spread");
            if (ggml_blck_size(type) == 1) {
                edgekv_add<test_edgekv_key_mean>(cases, type, size, 2, 17, 0, false, true);
                edgekv_add<test_edgekv_compact>(cases, type, size, 3, 65, 1, true, 41, "spread");
            }
        }
    }
    // every number of cells
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int64_t n_cells : edgekv_n_cells) {
            for (const int64_t n_head_kv : { 1, 8 }) {
                for (const auto kind : kinds) {
                    edgekv_add<test_edgekv_score>(cases, kind, type, 128, n_head_kv, n_cells);
                }
                edgekv_add<test_edgekv_key_mean>(cases, type, 128, n_head_kv, n_cells);
            }
            for (const std::string cells : { "same", "shift", "spread", "edge" }) {
                for (const int64_t n_chosen : std::set<int64_t> { n_cells, n_cells - 1, n_cells/2, 1 }) {
                    if (n_chosen < 1 || (n_chosen == n_cells && cells != "same")) {
                        continue;
                    }
                    edgekv_add<test_edgekv_compact>(cases, type, 64, 2, n_cells, 0, false, n_chosen, cells);
                    if (type == GGML_TYPE_F16) {
                        edgekv_add<test_edgekv_compact>(cases, type, 64, 2, n_cells, 0, true, n_chosen, cells);
                    }
                }
            }
        }
        // a cache large enough for several blocks of threads per head
        edgekv_add<test_edgekv_score>(cases, GGML_EDGEKV_SCORE_DOT, type, 64, 3, 4097);
        edgekv_add<test_edgekv_key_mean>(cases, type, 64, 3, 4097);
        for (const std::string cells : { "shift", "spread", "edge" }) {
            edgekv_add<test_edgekv_compact>(cases, type, 64, 3, 2561, 0, false, 2049, cells);
            if (type == GGML_TYPE_F16) {
                edgekv_add<test_edgekv_compact>(cases, type, 64, 3, 2561, 0, true, 2049, cells);
            }
        }
    }
    // other strides, scales and head sizes
    for (const auto kind : kinds) {
        for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            edgekv_add<test_edgekv_score>(cases, kind, type,  96, 5,  33, 1, true);
            edgekv_add<test_edgekv_score>(cases, kind, type,  32, 1,  33, 0, false, -0.125f);
            edgekv_add<test_edgekv_score>(cases, kind, type, 512, 2,   9, 0, false, 16.0f);
        }
    }
    for (const ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
        edgekv_add<test_edgekv_key_mean>(cases, type,  96, 5, 33, 1, true);
        edgekv_add<test_edgekv_key_mean>(cases, type,  32, 1, 33);
        edgekv_add<test_edgekv_key_mean>(cases, type, 512, 2,  9);
    }
    // nothing but a key that does not count
    edgekv_add<test_edgekv_key_mean>(cases, GGML_TYPE_F16, 64, 1, 1, 0, false, true);

    for (const std::string scores : { "distinct", "ties", "equal", "special" }) {
        for (const int64_t n_cells : edgekv_n_cells) {
            const int64_t keep   = std::min<int64_t>(4, n_cells/4);
            const int64_t window = std::min<int64_t>(8, n_cells/3);
            std::set<std::array<int64_t, 3>> shapes = {
                { 0,    0,      1                                  }, // only the best one
                { 0,    0,      (n_cells + 1)/2                    },
                { 0,    0,      n_cells                            }, // all
                { keep, window, std::max<int64_t>(1, keep + window)}, // no room for a third one
                { keep, window, std::min(n_cells, keep + window + 1) },
                { keep, window, std::max<int64_t>(keep + window, n_cells - 1) },
                { 0,    n_cells - n_cells/4, n_cells - n_cells/4 + n_cells/8 },
                { n_cells/2, 0, n_cells/2 + (n_cells + 1)/4        },
                { n_cells/2, n_cells - n_cells/2, n_cells          }, // no candidates
            };
            for (const auto & [first, last, all] : shapes) {
                if (all >= 1 && all <= n_cells && first + last <= all) {
                    edgekv_add<test_edgekv_choose>(cases, n_cells, 3, false, first, last, all, scores);
                }
            }
            const int64_t half = std::max<int64_t>(1, (n_cells + keep + window)/2);
            edgekv_add<test_edgekv_choose>(cases, n_cells, 4, true, keep, window, half, scores);
        }
        for (const int64_t n_cells : { 2560, 4097, 33000 }) {
            edgekv_add<test_edgekv_choose>(cases, n_cells, 8, false, 4, 256, 2048, scores);
            edgekv_add<test_edgekv_choose>(cases, n_cells, 1, false, 0,   0, 2049, scores);
            edgekv_add<test_edgekv_choose>(cases, n_cells, 8, true,  4, 256, 2048, scores);
        }
    }

    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        edgekv_add<test_edgekv_evict>(cases, type,  64, 3, 513, 4, 64, 257);
        edgekv_add<test_edgekv_evict>(cases, type, 128, 8,  65, 0,  0,  64);
        edgekv_add<test_edgekv_evict>(cases, type, 128, 1, 300, 4, 32,  37);
    }
}

static void edgekv_eval_selection(edgekv_cases & cases) {
    // summaries
    for (const ggml_type type : edgekv_types) {
        for (const int64_t size : edgekv_sizes) {
            if (edgekv_fits(type, size)) {
                edgekv_add<test_edgekv_summarize>(cases, type, size, 3, 65, 2, 1, 16, 0);
                edgekv_add<test_edgekv_summarize>(cases, type, size, 3, 65, 2, 1, 16, 7);
            }
        }
        for (const bool counted : { false, true }) {
            if (ggml_blck_size(type) == 1) {
                edgekv_add<test_edgekv_summarize>(cases, type, 64, 2, 257, 1, 0, 16, 0, true, counted);
            }
        }
    }
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const int64_t n_cells : edgekv_n_cells) {
            for (const int64_t page_size : { 8, 16, 32, 64 }) {
                edgekv_add<test_edgekv_summarize>(cases, type, 64, 2, n_cells, 1, 0, page_size, 0);
            }
            for (const int64_t n_named : { 1, 2, 6, 33 }) {
                edgekv_add<test_edgekv_summarize>(cases, type, 128, 8, n_cells, 2, 0, 16, n_named);
            }
        }
        for (const int64_t page_size : { 1, 3, 17, 128, 300 }) {
            edgekv_add<test_edgekv_summarize>(cases, type, 64, 2, 131, 2, 0, page_size, 0);
            edgekv_add<test_edgekv_summarize>(cases, type, 64, 2, 131, 2, 0, page_size, 5, false, true);
        }
        edgekv_add<test_edgekv_summarize>(cases, type, 64, 1, 1025, 3, 1, 16, 600);
    }

    // scores of pages
    for (const int64_t size : edgekv_sizes) {
        for (const int64_t group : { 1, 2, 3, 4, 7, 8, 16 }) {
            edgekv_add<test_edgekv_page_scores>(cases, size, 2, group, 33, 2, 2, 1);
        }
    }
    for (const int64_t n_pages : { 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1025 }) {
        edgekv_add<test_edgekv_page_scores>(cases, 128, 8, 4, n_pages);
        edgekv_add<test_edgekv_page_scores>(cases,  64, 3, 3, n_pages, 4, 1);
        edgekv_add<test_edgekv_page_scores>(cases,  64, 1, 8, n_pages, 1, 2, 1, false, true);
        edgekv_add<test_edgekv_page_scores>(cases,  80, 2, 7, n_pages, 3, 2, 0, true);
    }
    for (const int64_t size : { 8, 32, 40, 512 }) {
        edgekv_add<test_edgekv_page_scores>(cases, size, 2, 2, 9);
    }
    edgekv_add<test_edgekv_page_scores>(cases, 64, 1, 71, 9); // Falcon

    // choice of pages
    for (const std::string scores : { "distinct", "ties", "equal", "special" }) {
        for (const std::string mask : { "none", "causal", "used", "holes", "blind" }) {
            for (const int64_t n_cells : { 15, 16, 17, 65, 511, 512, 513, 1040 }) {
                const int64_t n_pages = (n_cells + 15)/16;
                std::set<std::array<int64_t, 2>> shapes = {
                    { 0, 1 }, { 1, 2 }, { 1, 3 }, { 0, 2 }, { 1, (n_pages + 1)/2 }, { 2, n_pages - 1 }, { 1, n_pages },
                    { 3, n_pages + 5 },
                };
                for (const auto & [n_first, n_chosen] : shapes) {
                    if (n_first + 1 <= n_chosen) {
                        edgekv_add<test_edgekv_choose_pages>(cases, n_cells, 16, 0, 3, 2, 2, n_first, n_chosen,
                                                             mask, scores);
                    }
                }
            }
        }
        for (const int64_t page_size : { 1, 3, 8, 17, 32, 64, 300 }) {
            edgekv_add<test_edgekv_choose_pages>(cases, 257, page_size, 2, 2, 3, 1, 1, 4, "holes", scores);
            edgekv_add<test_edgekv_choose_pages>(cases, 257, page_size, 0, 2, 1, 2, 1, 4, "used",  scores, 3, true);
        }
        edgekv_add<test_edgekv_choose_pages>(cases, 16384, 16, 0, 8, 1, 1, 1,  64, "causal", scores, 0, true);
        edgekv_add<test_edgekv_choose_pages>(cases, 16400, 16, 0, 8, 1, 1, 1, 256, "holes",  scores);
        edgekv_add<test_edgekv_choose_pages>(cases, 70000, 16, 1, 3, 1, 1, 1, 512, "used",   scores);
    }

    // attention
    const auto add = [&](const edgekv_attn_shape & shape) { edgekv_add<test_edgekv_attn>(cases, shape); };

    for (const int64_t n_chosen : { 3, 0 }) {
        edgekv_attn_shape base;
        base.n_chosen = n_chosen;

        // every pair of types
        const auto types = { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, GGML_TYPE_F32, GGML_TYPE_BF16 };
        for (const ggml_type type_k : types) {
            for (const ggml_type type_v : types) {
                edgekv_attn_shape x = base;
                x.type_k = type_k;
                x.type_v = type_v;
                add(x);
            }
        }
        for (const ggml_type type : { GGML_TYPE_Q4_1, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1, GGML_TYPE_IQ4_NL }) {
            edgekv_attn_shape x = base;
            x.type_k = x.type_v = type;
            add(x);
        }
        for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 }) {
            base.type_k = base.type_v = type;

            // head sizes and groups
            for (const int64_t size : edgekv_sizes) {
                for (const int64_t group : { 1, 2, 3, 4, 7, 8, 16 }) {
                    edgekv_attn_shape x = base;
                    x.size_k = x.size_v = size;
                    x.group  = group;
                    if (edgekv_fits(type, size)) {
                        add(x);
                    }
                }
            }
            // K and V of different size
            const std::array<int64_t, 2> unequal[] = { { 192, 128 }, { 64, 128 }, { 128, 64 }, { 256, 96 } };
            for (const auto & [size_k, size_v] : unequal) {
                edgekv_attn_shape x = base;
                x.size_k = size_k;
                x.size_v = size_v;
                add(x);
            }
            // numbers of cells, tokens and streams
            for (const int64_t n_cells : edgekv_n_cells) {
                edgekv_attn_shape x = base;
                x.n_cells = n_cells;
                add(x);
                x.mask_kind = "causal";
                x.n_tokens  = 4;
                x.n_stream  = 2;
                x.strm      = 1;
                x.sinks     = true;
                x.n_chosen  = n_chosen ? (n_cells + 15)/16 : 0; // all pages
                add(x);
            }
            for (int64_t n_tokens = 1; n_tokens <= 4; ++n_tokens) {
                for (const int64_t n_stream : { 1, 2 }) {
                    for (const std::string mask : { "none", "causal", "used", "holes", "bias", "blind" }) {
                        edgekv_attn_shape x = base;
                        x.n_cells   = 129;
                        x.n_tokens  = n_tokens;
                        x.n_stream  = n_stream;
                        x.strm      = n_tokens%2;
                        x.n_chosen  = n_chosen ? 5 : 0;
                        x.mask_kind = mask;
                        x.sinks     = n_tokens == 3;
                        add(x);
                    }
                }
            }
            // terms of the scores
            for (const bool sinks : { false, true }) {
                for (const float softcap : { 0.0f, 10.0f }) {
                    // the last one overflows if no maximum is taken off
                    for (const float sharpness : { 0.25f, 1.0f, 64.0f }) {
                        edgekv_attn_shape x = base;
                        x.n_cells   = 257;
                        x.n_chosen  = n_chosen ? 9 : 0;
                        x.mask_kind = "bias";
                        x.sinks     = sinks;
                        x.softcap   = softcap;
                        x.sharpness = sharpness;
                        add(x);
                    }
                }
            }
            // page sizes; they say nothing where there are no pages
            for (const int64_t page_size : { 1, 3, 8, 17, 32, 64, 128, 300 }) {
                edgekv_attn_shape x = base;
                x.n_cells   = 257;
                x.page_size = page_size;
                x.counted   = page_size == 8;
                add(x);
            }
            // models
            for (const int64_t n_cells : { 1024, 4096, 4099 }) {
                edgekv_attn_shape x = base;
                x.n_cells   = n_cells;
                x.n_chosen  = n_chosen ? 64 : 0;
                x.mask_kind = "causal";
                x.size_k = x.size_v = 128;
                x.n_head_kv = 8;
                x.group     = 4;
                add(x);
                x.size_k = x.size_v = 64;
                x.n_head_kv = 3;
                x.group     = 3;
                add(x);
                x.n_chosen  = n_chosen ? 300 : 0; // more than there are
                x.counted   = true;
                add(x);
            }
        }
    }

    // a whole step
    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (const bool summarized : { false, true }) {
            for (const std::string mask : { "causal", "holes" }) {
                edgekv_add<test_edgekv_select>(cases, type,  64, 3, 3,  513, 1, 1, 0, 16,  8, mask, summarized);
                edgekv_add<test_edgekv_select>(cases, type, 128, 8, 4, 1000, 1, 2, 1, 16, 16, mask, summarized);
                edgekv_add<test_edgekv_select>(cases, type,  96, 2, 7,  300, 4, 1, 0, 32,  4, mask, summarized);
            }
        }
    }
}

static void edgekv_add_eval_cases(edgekv_cases & cases) {
    edgekv_eval_eviction (cases);
    edgekv_eval_selection(cases);
}

// Decode steps and evictions of models with 32/8 heads of 128 and 9/3 heads of 64
static void edgekv_add_perf_cases(edgekv_cases & cases) {
    struct heads { int64_t size, n_head_kv, group; };

    for (const auto & m : { heads { 128, 8, 4 }, heads { 64, 3, 3 } }) {
        for (const int64_t n_cells : { 8192, 16384, 32768, 65536, 131072, 262144 }) {
            const int64_t n_pages = n_cells/16;

            edgekv_add<test_edgekv_page_scores>(cases, m.size, m.n_head_kv, m.group, n_pages);

            for (const int64_t n_read : { 0, 1024, 2048, 4096, 8192 }) { // 0: all
                if (n_read >= n_cells) {
                    continue;
                }
                if (n_read) {
                    edgekv_add<test_edgekv_choose_pages>(cases, n_cells, 16, 0, m.n_head_kv, 1, 1, 1, n_read/16,
                                                                    "none", "distinct");
                }
                for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                    edgekv_attn_shape x;
                    x.type_k    = x.type_v = type;
                    x.size_k    = x.size_v = m.size;
                    x.n_head_kv = m.n_head_kv;
                    x.group     = m.group;
                    x.n_cells   = n_cells;
                    x.n_chosen  = n_read/16;
                    x.mask_kind = "none";
                    edgekv_add<test_edgekv_attn>(cases, x);
                }
            }
            // what upstream needs for the same step
            for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
                cases.emplace_back(new test_flash_attn_ext(
                    m.size, m.size, m.n_head_kv, { m.group, 1 }, n_cells, 1, true, false, 0.0f, 0.0f, GGML_PREC_F32,
                    type, type, { 0, 2, 1, 3 }, false));
            }
        }
        for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
            edgekv_add<test_edgekv_summarize>(cases, type, m.size, m.n_head_kv, 131072, 1, 0, 16, 1);
            edgekv_add<test_edgekv_summarize>(cases, type, m.size, m.n_head_kv, 131072, 1, 0, 16, 0);

            for (const int64_t n_chosen : { 2048, 4096, 8192 }) {
                const int64_t n_cells = n_chosen + 512;
                for (const auto kind : { GGML_EDGEKV_SCORE_DOT, GGML_EDGEKV_SCORE_NORM, GGML_EDGEKV_SCORE_COS }) {
                    edgekv_add<test_edgekv_score>(cases, kind, type, m.size, m.n_head_kv, n_cells);
                }
                edgekv_add<test_edgekv_key_mean>(cases, type, m.size, m.n_head_kv, n_cells);
                edgekv_add<test_edgekv_compact>(cases, type, m.size, m.n_head_kv, n_cells, 0, false, n_chosen,
                                                "spread");
                if (type == GGML_TYPE_F16) {
                    edgekv_add<test_edgekv_compact>(cases, type, m.size, m.n_head_kv, n_cells, 0, true, n_chosen,
                                                    "spread");
                    edgekv_add<test_edgekv_choose>(cases, n_cells, m.n_head_kv, false, 4, 256, n_chosen, "distinct");
                }
            }
        }
    }
}
