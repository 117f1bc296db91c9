#pragma once

// The flags of eviction and selection, for every program of llama.cpp that parses common_params. They mean what
// edgekv/settings.py says, and errors are worded as there.

#include "edgekv-filters.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct common_arg;
struct common_params;

// Member of common_params.
struct edgekv_params {
    // as given, "" where nothing was
    std::string evict  = "none";
    std::string budget;        // tokens, xN: a share of a sequence's context, or a size in bytes
    std::string window;
    std::string select = "none";
    std::string select_budget; // tokens or "auto"
    std::string page_size;
    std::string dense_layers;
    std::string filters;       // a GGUF with filters; else they are in the model's
    bool        grouped_attn = false;

    // what edgekv_check_args() made of them
    uint32_t n_select_budget = 0; // 0: auto
    uint32_t n_page_size     = 16;
    uint32_t n_dense_layers  = 2;

    // what edgekv_apply() made of them, in tokens
    uint32_t n_budget = 0;
    uint32_t n_window = 0;
    uint32_t n_keep   = 0;

    std::shared_ptr<const edgekv_filters> qfilters; // once they were read

    bool evicts() const { return evict != "none"; }

    bool selects() const { return select != "none"; }

    // whether decode steps read the cache in another way than stock's
    bool reads() const { return selects() || grouped_attn; }
};

// Registers the flags with common/arg.cpp's parser.
void edgekv_add_args(const std::function<void(common_arg)> & add_opt);

// Checks what does not need the model. Throws std::invalid_argument with one line that names the flag and a way out.
// Turns flash attention on where it is left to choose and selection needs it.
void edgekv_check_args(common_params & params);

// Hands the settings over to the next llama_init_from_model() of this thread; nothing if all is off. False, after one
// line of log, if the model or its filters do not go with them.
bool edgekv_apply(common_params & params, const llama_model * model, const llama_context_params & cparams);

// While this lives, the contexts by which common/fit.cpp measures memory get the settings of `params`, through
// edgekv_apply_again(). Those of other models (drafts) get none.
class edgekv_fitting {
  public:
    explicit edgekv_fitting(common_params & params);
    ~edgekv_fitting();

    edgekv_fitting(const edgekv_fitting &) = delete;
    edgekv_fitting & operator=(const edgekv_fitting &) = delete;
};

// Settings that edgekv_apply() would refuse are left out here: it says why afterwards.
void edgekv_apply_again(const char * path_model, const llama_model * model, const llama_context_params & cparams);
