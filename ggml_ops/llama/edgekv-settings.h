#pragma once

// Settings of one context and the thread's last error. A context reads its settings from llama_cparams::edgekv.

#include "edgekv-policy.h"
#include "llama-edgekv.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

struct llama_cparams;
struct llama_edgekv_tap;

struct llama_edgekv_settings {
    const llama_edgekv_policy * policy = nullptr; // NULL: nothing is evicted

    llama_edgekv_mode mode = LLAMA_EDGEKV_MODE_BOUNDED;

    uint32_t budget = 0;
    uint32_t window = 0;
    uint32_t n_keep = 0;

    std::vector<float>   filters;
    std::vector<int32_t> filter_layers;

    bool     select         = false;
    uint32_t select_budget  = 0; // 0: auto
    uint32_t page_size      = 16;
    uint32_t n_dense_layers = 2;
    bool     select_per_query_head = false;
    bool     grouped_attn   = false;

    // whether decode steps read the cache in another way than stock's
    bool reads() const { return select || grouped_attn; }

    std::shared_ptr<llama_edgekv_tap> tap; // NULL: queries are not tapped
};

using llama_edgekv_settings_ptr = std::shared_ptr<const llama_edgekv_settings>;

// NULL, and the error is set, if they contradict themselves
llama_edgekv_settings_ptr llama_edgekv_parse(const llama_edgekv_params * params);

// the settings stored for this thread's next context; consumed
llama_edgekv_settings_ptr llama_edgekv_take_settings();

// takes them back at the end of a scope, whether a context was made or not
struct llama_edgekv_settings_guard {
    ~llama_edgekv_settings_guard() { llama_edgekv_take_settings(); }
};

// the cells that a cache for n_ctx_seq tokens per sequence needs under the context's settings
uint32_t llama_edgekv_kv_size(const llama_cparams & cparams);

// the sliding-window half of a pair: never the whole context where eviction is on, ...
bool llama_edgekv_swa_full(const llama_cparams & cparams, bool swa_full);

// ... and with room for this many tokens beyond the model's window, so that every tail above the floor can be removed
uint32_t llama_edgekv_swa_room(const llama_cparams & cparams);

void llama_edgekv_set_error(std::string text);
