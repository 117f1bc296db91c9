#pragma once

// Collects the post-RoPE queries while a context reads text: for calibration their second moments, one matrix per query
// head however long the text; for policies that look at queries those of each stream's last tokens; and for judging a
// selection those of the last decode step, with the pages that were chosen for them. The graph hands them over as nodes of
// known names, which the scheduler's eval callback reads.

#include "ggml-backend.h"
#include "ggml.h"
#include "llama-edgekv.h"

#include <cstdint>
#include <map>
#include <vector>

struct llama_cparams;
struct llama_ubatch;

struct llama_edgekv_tap {
    // collect everything; otherwise only what policies look at
    bool all = false;

    // a stream's last queries, at most so many: a policy looks at LLAMA_EDGEKV_TAP_TOKENS, and a window may be taken back
    uint32_t n_last = LLAMA_EDGEKV_TAP_TOKENS;

    struct last {
        std::vector<llama_pos> pos;
        std::vector<float>     queries; // [n][n_head][n_embd]
    };

    struct layer {
        int64_t n_embd   = 0; // head size
        int64_t n_head   = 0;
        float   kq_scale = 0.0f;
        int64_t count    = 0; // queries per head

        std::map<uint32_t, last> streams;

        std::vector<double> moments; // [n_head][n_embd][n_embd], sum q q^T
        std::vector<double> sums;    // [n_head][n_embd]

        // of the last ubatch, if it had at most LLAMA_EDGEKV_TAP_TOKENS
        std::vector<float>   queries; // [n_tokens][n_head][n_embd]
        std::vector<int32_t> pages;   // [n_tokens][n_head_kv][n_chosen]
    };

    std::map<int, layer> layers; // by layer of the model

    // the stream and position of each token of the ubatch that is computed; empty where nobody asks for last queries
    std::vector<uint32_t>  strm;
    std::vector<llama_pos> pos;

    void copied (uint32_t s_src, uint32_t s_dst);
    void removed(uint32_t strm, llama_pos n_past); // positions from n_past on

    // scratch of the callback
    std::vector<float> queries;
    std::vector<float> block;
};

// Adds the tap to a graph, if the context has one. q is [head_size, n_head, n_tokens], as it meets unrotated keys; kq_scale
// turns its products with them into what the softmax gets.
void llama_edgekv_tap_query(
        const llama_cparams & cparams, ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, float kq_scale, int il);

// ggml_backend_sched_eval_callback; user_data is the llama_edgekv_tap
bool llama_edgekv_tap_eval(ggml_tensor * t, bool ask, void * user_data);
