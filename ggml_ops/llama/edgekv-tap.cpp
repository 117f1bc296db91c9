#include "edgekv-tap.h"

#include "edgekv-settings.h"
#include "llama-cparams.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

static const char TAP_PREFIX[]   = "edgekv_query-";
static const char PAGES_PREFIX[] = "edgekv_pages-"; // see llama_edgekv_selector::build_attn()

// the layer if a tensor has such a name, -1 otherwise
static int layer_of(const ggml_tensor * t, const char * prefix) {
    const size_t n = strlen(prefix);
    return strncmp(t->name, prefix, n) == 0 ? atoi(t->name + n) : -1;
}

void llama_edgekv_tap_query(
        const llama_cparams & cparams, ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int il) {
    if (!cparams.edgekv || !cparams.edgekv->tap) {
        return;
    }
    cparams.edgekv->tap->layers[il].kq_scale = kq_scale;

    ggml_tensor * copy = ggml_cont(ctx, q);
    ggml_format_name(copy, "%s%d", TAP_PREFIX, il);
    ggml_build_forward_expand(gf, copy);
}

// moments += sum over tokens of q q^T. A block of tokens is summed in float, then added in double: fast, and the error
// does not grow with the length of the text. The order is fixed, so the result does not depend on the threads.
static void add_head(llama_edgekv_tap & tap, llama_edgekv_tap::layer & layer, int64_t h, int64_t n_tokens) {
    constexpr int64_t BLOCK = 64;
    constexpr int64_t STEP  = 4; // tokens per pass over the block's matrix, which is what the loop waits for

    const int64_t n      = layer.n_embd;
    const int64_t stride = n*layer.n_head;

    double * moment = layer.moments.data() + h*n*n;
    double * sum    = layer.sums.data()    + h*n;

    const std::vector<float> zero(n, 0.0f); // stands in for the tokens that a last step lacks

    tap.block.resize(n*n);
    float * acc = tap.block.data();

    for (int64_t t0 = 0; t0 < n_tokens; t0 += BLOCK) {
        const int64_t t1 = std::min(n_tokens, t0 + BLOCK);

        std::fill(acc, acc + n*n, 0.0f);
        for (int64_t t = t0; t < t1; t += STEP) {
            const float * q[STEP];
            for (int64_t s = 0; s < STEP; ++s) {
                q[s] = t + s < t1 ? tap.queries.data() + (t + s)*stride + h*n : zero.data();
            }
            for (int64_t i = 0; i < n; ++i) {
                const float a = q[0][i], b = q[1][i], c = q[2][i], d = q[3][i];
                float * row = acc + i*n;
                for (int64_t j = 0; j < n; ++j) {
                    row[j] += a*q[0][j] + b*q[1][j] + c*q[2][j] + d*q[3][j];
                }
                sum[i] += (double) a + b + c + d;
            }
        }
        for (int64_t i = 0; i < n*n; ++i) {
            moment[i] += acc[i];
        }
    }
}

static void drop(llama_edgekv_tap::last & last, int64_t first, int64_t end, int64_t size) {
    last.pos    .erase(last.pos    .begin() + first,      last.pos    .begin() + end);
    last.queries.erase(last.queries.begin() + first*size, last.queries.begin() + end*size);
}

static void add_last(llama_edgekv_tap & tap, llama_edgekv_tap::layer & layer, int64_t n_tokens) {
    if ((int64_t) tap.strm.size() != n_tokens) {
        return; // a graph that is only measured, or nobody asks
    }
    const int64_t size = layer.n_embd*layer.n_head;

    for (int64_t t = 0; t < n_tokens; ++t) {
        auto & last = layer.streams[tap.strm[t]];

        last.pos.push_back(tap.pos[t]);
        last.queries.insert(last.queries.end(), tap.queries.begin() + t*size, tap.queries.begin() + (t + 1)*size);
    }
    for (auto & [_, last] : layer.streams) {
        drop(last, 0, std::max<int64_t>(0, (int64_t) last.pos.size() - (int64_t) tap.n_last), size);
    }
}

void llama_edgekv_tap::copied(uint32_t s_src, uint32_t s_dst) {
    for (auto & [_, layer] : layers) {
        layer.streams[s_dst] = layer.streams[s_src];
    }
}

void llama_edgekv_tap::removed(uint32_t strm, llama_pos n_past) {
    for (auto & [_, layer] : layers) {
        auto & last = layer.streams[strm];

        const auto first = std::lower_bound(last.pos.begin(), last.pos.end(), n_past) - last.pos.begin();
        drop(last, first, last.pos.size(), layer.n_embd*layer.n_head);
    }
}

bool llama_edgekv_tap_eval(ggml_tensor * t, bool ask, void * user_data) {
    const int il_query = layer_of(t, TAP_PREFIX);
    const int il_pages = layer_of(t, PAGES_PREFIX);
    if (ask) {
        return il_query >= 0 || il_pages >= 0;
    }

    auto & tap = *(llama_edgekv_tap *) user_data;

    if (il_pages >= 0 && t->type == GGML_TYPE_I32) {
        auto & pages = tap.layers[il_pages].pages;
        pages.resize(ggml_nelements(t));
        ggml_backend_tensor_get(t, pages.data(), 0, ggml_nbytes(t));
        return true;
    }
    if (il_query < 0 || t->type != GGML_TYPE_F32) {
        return true;
    }
    auto & layer = tap.layers[il_query];

    layer.n_embd = t->ne[0];
    layer.n_head = t->ne[1];

    tap.queries.resize(ggml_nelements(t));
    ggml_backend_tensor_get(t, tap.queries.data(), 0, ggml_nbytes(t));

    add_last(tap, layer, t->ne[2]);

    if (!tap.all) {
        return true;
    }
    if (layer.moments.empty()) {
        layer.moments.resize(layer.n_head*layer.n_embd*layer.n_embd);
        layer.sums.resize(layer.n_head*layer.n_embd);
    }

    for (int64_t h = 0; h < layer.n_head; ++h) {
        add_head(tap, layer, h, t->ne[2]);
    }
    layer.count += t->ne[2];

    // its pages are chosen later
    layer.pages.clear();
    layer.queries.clear();
    if (t->ne[2] <= LLAMA_EDGEKV_TAP_TOKENS) {
        layer.queries = tap.queries;
    }

    return true;
}
