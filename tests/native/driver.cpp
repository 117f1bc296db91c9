// Drives the C interface of contexts with eviction, selection or both through everything a conversation does, for the
// sanitizers: no Python, no OpenMP, threads of ggml's own. What it computes is checked elsewhere (tests/test_eviction.py
// and others); here only what must hold at any time is, and memory, threads and undefined behaviour are watched.
//
//   driver SEED FOLDER MODEL...    exit status 0 if all went well

#include "llama-edgekv.h"
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s failed (%s)\n", __FILE__, __LINE__, #x, llama_edgekv_last_error()); exit(1); } } while (0)

namespace {

constexpr int N_UBATCH = 16;
constexpr int N_SEQ    = 2;
constexpr int N_PAGE   = 8;

std::mt19937 rng;

int pick(int n) { return (int) (rng() % (unsigned) n); }

struct setting {
    const char * policy;
    int32_t      mode;
    ggml_type    type_k;
    ggml_type    type_v;
    bool         flash_attn;
    bool         tap;

    const char * select   = "none";
    uint32_t     n_dense  = 0;
    bool         grouped  = false;
};

// filters for every layer with KV heads of one size, whatever the model
std::vector<float> make_filters(const llama_model * model, llama_context * stock, std::vector<int32_t> & layers) {
    std::vector<float> res;
    layers.clear();
    (void) model;
    for (int32_t i = 0; i < llama_edgekv_n_layers(stock); ++i) {
        llama_edgekv_layer layer;
        CHECK(llama_edgekv_get_layer(stock, i, &layer));
        layers.push_back(layer.il);
        for (uint32_t j = 0; j < layer.n_head_kv*layer.head_size_k; ++j) {
            res.push_back((float) pick(2000)/1000.0f - 1.0f);
        }
    }
    return res;
}

llama_context * open(llama_model * model, const setting & s, const std::vector<float> & filters, const std::vector<int32_t> & layers) {
    llama_edgekv_params params = {};
    params.struct_size     = sizeof(params);
    params.policy          = s.policy;
    params.mode            = s.mode;
    params.budget          = 40;
    params.window          = 10;
    params.n_keep          = 4;
    params.filters         = filters.data();
    params.n_filters       = filters.size();
    params.filter_layers   = layers.data();
    params.n_filter_layers = (uint32_t) layers.size();
    params.select          = s.select;
    params.select_budget   = 32;
    params.page_size       = N_PAGE;
    params.n_dense_layers  = s.n_dense;
    params.grouped_attn    = s.grouped;
    params.tap_queries     = s.tap;
    CHECK(llama_edgekv_set_next(&params));

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 512*N_SEQ;
    cparams.n_batch         = 64;
    cparams.n_ubatch        = N_UBATCH;
    cparams.n_seq_max       = N_SEQ;
    cparams.n_threads       = 2;
    cparams.n_threads_batch = 2;
    cparams.type_k          = s.type_k;
    cparams.type_v          = s.type_v;
    cparams.flash_attn_type = s.flash_attn ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    return llama_init_from_model(model, cparams);
}

llama_pos n_past(llama_context * ctx, llama_seq_id seq_id) {
    return llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) + 1;
}

// n tokens of one sequence, or of both
int decode(llama_context * ctx, int n, llama_seq_id seq_id, bool both) {
    llama_batch batch = llama_batch_init(64, 0, 1);
    for (llama_seq_id s = both ? 0 : seq_id; s <= (both ? N_SEQ - 1 : seq_id); ++s) {
        const llama_pos pos = n_past(ctx, s);
        for (int i = 0; i < n; ++i) {
            const int j = batch.n_tokens++;
            batch.token[j]     = pick(320);
            batch.pos[j]       = pos + i;
            batch.n_seq_id[j]  = 1;
            batch.seq_id[j][0] = s;
            batch.logits[j]    = i == n - 1;
        }
    }
    const int code = llama_decode(ctx, batch);
    llama_batch_free(batch);
    return code;
}

using bytes = std::vector<uint8_t>;

bytes save(llama_context * ctx, llama_seq_id seq_id) {
    bytes res(seq_id < 0 ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, seq_id));
    const size_t n = seq_id < 0 ? llama_state_get_data(ctx, res.data(), res.size()) : llama_state_seq_get_data(ctx, res.data(), res.size(), seq_id);
    CHECK(n == res.size() && n > 0);
    return res;
}

bool load(llama_context * ctx, const bytes & state, llama_seq_id seq_id) {
    return (seq_id < 0 ? llama_state_set_data(ctx, state.data(), state.size()) : llama_state_seq_set_data(ctx, state.data(), state.size(), seq_id)) != 0;
}

void look(llama_context * ctx) {
    for (llama_seq_id s = -1; s < N_SEQ; ++s) {
        llama_edgekv_stats stats;
        stats.struct_size = sizeof(stats);
        CHECK(llama_edgekv_get_stats(ctx, s, &stats));
        CHECK(s < 0 || stats.cells_used <= stats.cells_allocated);
        CHECK(stats.pages_read <= stats.pages_total);
        if (s < 0) {
            continue;
        }
        for (int32_t il = 0; il < llama_edgekv_n_layers(ctx); ++il) {
            llama_edgekv_layer layer;
            CHECK(llama_edgekv_get_layer(ctx, il, &layer));
            const int h = pick((int) layer.n_head_kv);
            std::vector<llama_pos> pos(stats.cells_used);
            CHECK(llama_edgekv_positions(ctx, s, il, h, pos.data(), (int64_t) pos.size()) == (int64_t) pos.size());
            for (size_t i = 1; i < pos.size(); ++i) {
                CHECK(pos[i - 1] < pos[i]);
            }
            for (bool v : { false, true }) {
                bytes rows(stats.cells_used*(v ? layer.v_row_bytes : layer.k_row_bytes));
                CHECK(llama_edgekv_rows(ctx, s, il, h, v, rows.data(), rows.size()) == (int64_t) rows.size());
            }
        }
    }
}

// what the last decode step asked and chose, of a context that taps queries
void look_at_step(llama_context * ctx) {
    llama_edgekv_stats stats;
    stats.struct_size = sizeof(stats);
    CHECK(llama_edgekv_get_stats(ctx, -1, &stats));

    for (int32_t il = 0; il < llama_edgekv_n_layers(ctx); ++il) {
        const int64_t n_queries = llama_edgekv_tap_queries(ctx, il, nullptr, 0);
        const int64_t n_pages   = llama_edgekv_tap_pages(ctx, il, nullptr, 0);
        if (n_queries < 0 || n_pages < 0) {
            continue; // nothing was read yet
        }
        std::vector<float>   queries(n_queries);
        std::vector<int32_t> pages(n_pages);
        CHECK(llama_edgekv_tap_queries(ctx, il, queries.data(), n_queries) == n_queries);
        CHECK(llama_edgekv_tap_pages(ctx, il, pages.data(), n_pages) == n_pages);
        for (int32_t page : pages) {
            CHECK(page >= -1 && page*N_PAGE < (int32_t) stats.cells_allocated);
        }
    }
}

uint64_t n_selections(llama_context * ctx) {
    llama_edgekv_stats stats;
    stats.struct_size = sizeof(stats);
    CHECK(llama_edgekv_get_stats(ctx, -1, &stats));
    return stats.n_selections;
}

void live(llama_context * ctx, llama_context * stock, const std::string & folder, bool tap, int n_steps) {
    auto * memory = llama_get_memory(ctx);
    std::vector<std::pair<llama_seq_id, bytes>> states;

    for (int step = 0; step < n_steps; ++step) {
        const llama_seq_id s = pick(N_SEQ);
        switch (pick(14)) {
            case 0: case 1: case 2: case 3: decode(ctx, 1 + pick(40), s, false); break;
            case 4: case 5: decode(ctx, 1 + pick(20), s, true); break;
            case 6: llama_memory_seq_rm(memory, pick(5) ? s : -1, n_past(ctx, s) - pick(25), -1); break;
            case 7: llama_memory_seq_rm(memory, s, pick(100), pick(2) ? -1 : 100 + pick(100)); break;
            case 8: llama_memory_seq_cp(memory, s, 1 - s, pick(3) ? -1 : 5, -1); break;
            case 9: llama_edgekv_evict(ctx, s, pick(2) ? 0 : 15 + pick(30)); break;
            case 10: llama_edgekv_set_keep(ctx, pick(4) - 2, pick(40)); break;
            case 11: { const llama_seq_id which = pick(3) - 1; states.emplace_back(which, save(ctx, which)); } break;
            case 12:
                if (!states.empty()) {
                    const auto & [which, state] = states[pick((int) states.size())];
                    bytes bad = state;
                    bad.resize(pick((int) bad.size()));
                    CHECK(!load(ctx, bad, which < 0 ? -1 : s));
                    bad = state;
                    bad[8 + pick((int) bad.size() - 8)] ^= (uint8_t) (1 << pick(8));
                    if (which < 0) {
                        CHECK(!load(ctx, bad, -1));
                    } else {
                        CHECK(!load(ctx, bad, s));
                    }
                    CHECK(!load(stock, state, which < 0 ? -1 : s));
                    CHECK(load(ctx, state, which < 0 ? -1 : s));
                }
                break;
            case 13:
                if (!pick(4)) {
                    llama_memory_clear(memory, pick(2));
                } else if (!pick(4)) {
                    const std::string path = folder + "/state";
                    const llama_token tokens[] = { 1, 2, 3 };
                    llama_token read[8];
                    size_t n_read = 0;
                    CHECK(llama_state_save_file(ctx, path.c_str(), tokens, 3));
                    CHECK(llama_state_load_file(ctx, path.c_str(), read, 8, &n_read) && n_read == 3);
                    CHECK(llama_state_seq_save_file(ctx, path.c_str(), s, tokens, 3));
                    CHECK(llama_state_seq_load_file(ctx, path.c_str(), 1 - s, read, 8, &n_read) && n_read == 3);
                }
                llama_memory_seq_add(memory, s, 0, -1, 1); // refused
                break;
        }
        look(ctx);
        if (tap) {
            look_at_step(ctx);
        }
    }
}

// without eviction: what only a stock cache can do, holes and shifted positions, and stock's states
void live_unevicted(llama_context * ctx, llama_context * stock, bool tap, int n_steps) {
    auto * memory = llama_get_memory(ctx);

    for (int step = 0; step < n_steps; ++step) {
        const llama_seq_id s = pick(N_SEQ);
        switch (pick(9)) {
            case 0: case 1: decode(ctx, 1 + pick(40), s, false); break;
            case 2: decode(ctx, 1 + pick(20), s, true); break;
            case 3: llama_memory_seq_rm(memory, s, n_past(ctx, s) - pick(25), -1); break;
            case 4: { const llama_pos p0 = pick(100); llama_memory_seq_rm(memory, s, p0, p0 + pick(60)); } break;
            case 5: {
                const llama_pos p0 = pick(100), n = 1 + pick(30);
                if (llama_memory_can_shift(memory) && llama_memory_seq_rm(memory, s, p0, p0 + n)) {
                    llama_memory_seq_add(memory, s, p0 + n, -1, -n);
                }
            } break;
            case 6: llama_memory_seq_cp(memory, s, 1 - s, -1, -1); break;
            case 7: {
                const llama_seq_id which = pick(3) - 1;
                const bytes state = save(ctx, which);
                for (llama_context * to : { ctx, stock }) { // a state does not depend on selection
                    CHECK(load(to, state, which < 0 ? -1 : s));
                }
            } break;
            case 8: if (!pick(4)) { llama_memory_clear(memory, pick(2)); } break;
        }
        if (tap) {
            look_at_step(ctx);
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    CHECK(argc >= 4);
    rng.seed((unsigned) atoi(argv[1]));

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    const std::vector<setting> settings = {
        { "qfilters",  LLAMA_EDGEKV_MODE_BOUNDED, GGML_TYPE_F16,  GGML_TYPE_F16,  false, false },
        { "keydiff",   LLAMA_EDGEKV_MODE_BOUNDED, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0, true,  false },
        { "knorm",     LLAMA_EDGEKV_MODE_PROMPT,  GGML_TYPE_F16,  GGML_TYPE_F16,  true,  false },
        { "streaming", LLAMA_EDGEKV_MODE_BOUNDED, GGML_TYPE_F32,  GGML_TYPE_BF16, false, true  },
        { "none",      LLAMA_EDGEKV_MODE_BOUNDED, GGML_TYPE_F16,  GGML_TYPE_F16,  false, true  },
        { "knorm",     LLAMA_EDGEKV_MODE_BOUNDED, GGML_TYPE_F16,  GGML_TYPE_F16,  true,  true,  "quest", 0, false },
        { "qfilters",  LLAMA_EDGEKV_MODE_PROMPT,  GGML_TYPE_Q8_0, GGML_TYPE_Q8_0, true,  false, "quest", 1, true  },
        { "none",      LLAMA_EDGEKV_MODE_BOUNDED, GGML_TYPE_F16,  GGML_TYPE_F16,  true,  true,  "quest", 1, false },
    };

    for (int i = 3; i < argc; ++i) {
        llama_model_params mparams = llama_model_default_params();
        mparams.n_gpu_layers = 0;
        llama_model * model = llama_model_load_from_file(argv[i], mparams);
        CHECK(model);

        llama_context * stock = open(model, { "none", 0, GGML_TYPE_F16, GGML_TYPE_F16, false, false }, {}, {});
        CHECK(stock);
        std::vector<int32_t> layers;
        const auto filters = make_filters(model, stock, layers);

        for (const auto & s : settings) {
            llama_context * ctx = open(model, s, filters, layers);
            CHECK(ctx);
            const bool selects = strcmp(s.select, "none") != 0;
            if (strcmp(s.policy, "none") != 0) {
                live(ctx, stock, argv[2], s.tap, 120);
            } else if (selects) {
                llama_context * other = open(model, { "none", 0, s.type_k, s.type_v, s.flash_attn, false }, {}, {});
                CHECK(other);
                live_unevicted(ctx, other, s.tap, 120);
                llama_free(other);
            }
            CHECK((n_selections(ctx) > 0) == selects);
            if (s.tap) {
                decode(ctx, 20, 0, false);
                llama_edgekv_layer layer;
                CHECK(llama_edgekv_get_layer(ctx, 0, &layer));
                const size_t n = layer.head_size_k;
                std::vector<double> moment(n*n), sum(n);
                CHECK(llama_edgekv_tap_get(ctx, 0, 0, moment.data(), sum.data()) > 0);
            }
            llama_free(ctx);
        }

        // refused: filters of another shape, selection without flash attention
        auto few = filters;
        few.pop_back();
        CHECK(!open(model, settings[0], few, layers));
        CHECK(!open(model, { "none", 0, GGML_TYPE_F16, GGML_TYPE_F16, false, false, "quest", 0, false }, {}, {}));

        llama_free(stock);
        llama_model_free(model);
        printf("%s: ok\n", argv[i]);
    }

    llama_backend_free();
    return 0;
}
