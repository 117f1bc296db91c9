#include "edgekv-settings.h"

#include "edgekv-tap.h"
#include "llama-cparams.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static thread_local std::string               last_error;
static thread_local llama_edgekv_settings_ptr next_settings;

void llama_edgekv_set_error(std::string text) {
    last_error = std::move(text);
}

const char * llama_edgekv_last_error(void) {
    return last_error.c_str();
}

void llama_edgekv_clear_error(void) {
    last_error.clear();
}

llama_edgekv_settings_ptr llama_edgekv_take_settings() {
    return std::move(next_settings);
}

static std::nullptr_t refuse(std::string text) {
    llama_edgekv_set_error(std::move(text));
    return nullptr;
}

bool llama_edgekv_set_next(const llama_edgekv_params * params) {
    next_settings = params ? llama_edgekv_parse(params) : nullptr;

    if (next_settings && next_settings->policy == &llama_edgekv_policy_given) {
        next_settings.reset();
        refuse("policy 'given' is for llama_edgekv_evict_as(): a context has to know how to score by itself");
    }
    return !params || next_settings;
}

llama_edgekv_settings_ptr llama_edgekv_parse(const llama_edgekv_params * params) {
    if (params->struct_size != sizeof(llama_edgekv_params)) {
        return refuse("llama_edgekv_params has another size here: the bindings and the library are of different versions");
    }

    auto s = std::make_shared<llama_edgekv_settings>();

    if (params->policy && strcmp(params->policy, "none") != 0) {
        s->policy = llama_edgekv_policy_find(params->policy);
        if (!s->policy) {
            return refuse(std::string("unknown eviction policy '") + params->policy + "'");
        }
        if (params->mode != LLAMA_EDGEKV_MODE_BOUNDED && params->mode != LLAMA_EDGEKV_MODE_PROMPT) {
            return refuse("unknown eviction mode " + std::to_string(params->mode));
        }
        if (params->budget == 0) {
            return refuse("the eviction budget must be at least 1 token");
        }
        if ((uint64_t) params->n_keep + params->window > params->budget) {
            return refuse("keep (" + std::to_string(params->n_keep) + ") + window (" + std::to_string(params->window) +
                          ") exceed the budget (" + std::to_string(params->budget) + ")");
        }
        if ((s->policy->needs & llama_edgekv_policy::QUERIES) && params->window == 0) {
            return refuse(std::string("policy '") + s->policy->name + "' looks at the queries of the window: give one (--kv-window)");
        }
        if (s->policy->needs & llama_edgekv_policy::FILTERS) {
            if (!params->filters || params->n_filters == 0) {
                return refuse(std::string("policy '") + s->policy->name + "' needs filters");
            }
            if (!params->filter_layers || params->n_filter_layers == 0) {
                return refuse("the filters do not say for which layers they are");
            }
            s->filters.assign(params->filters, params->filters + params->n_filters);
            s->filter_layers.assign(params->filter_layers, params->filter_layers + params->n_filter_layers);
            if (!std::all_of(s->filters.begin(), s->filters.end(), [](float x) { return std::isfinite(x); })) {
                return refuse("the filters hold values that are not finite");
            }
        }

        s->mode   = (llama_edgekv_mode) params->mode;
        s->budget = params->budget;
        s->window = params->window;
        s->n_keep = params->n_keep;
    }

    if (params->select && strcmp(params->select, "none") != 0) {
        if (strcmp(params->select, "quest") != 0) {
            return refuse(std::string("unknown selection '") + params->select + "'");
        }
        if (params->page_size != 8 && params->page_size != 16 && params->page_size != 32 && params->page_size != 64) {
            return refuse("the page size must be 8, 16, 32 or 64 cells, not " + std::to_string(params->page_size));
        }
        if (params->select_budget != 0 && params->select_budget < 2*params->page_size) {
            return refuse("the selection budget (" + std::to_string(params->select_budget) + ") must be two pages at least (" +
                          std::to_string(2*params->page_size) + "): the first and the newest are always read");
        }
        if (params->select_budget > INT32_MAX) {
            return refuse("the selection budget is too large");
        }
        s->select         = true;
        s->select_budget  = params->select_budget;
        s->page_size      = params->page_size;
        s->n_dense_layers = params->n_dense_layers;
        s->select_per_query_head = params->select_per_query_head;
    }
    s->grouped_attn = params->grouped_attn;

    if (params->tap_queries || (s->policy && (s->policy->needs & llama_edgekv_policy::QUERIES))) {
        s->tap = std::make_shared<llama_edgekv_tap>();
        s->tap->all     = params->tap_queries;
        s->tap->n_last += s->window;
    }
    return s;
}

uint32_t llama_edgekv_auto_budget(uint32_t n) {
    return 768 + n/32;
}

uint32_t llama_edgekv_kv_size(const llama_cparams & cparams) {
    const auto & s = cparams.edgekv;

    if (!s || !s->policy || s->mode != LLAMA_EDGEKV_MODE_BOUNDED) {
        return cparams.n_ctx_seq;
    }
    const uint64_t wanted = std::min<uint64_t>(cparams.n_ctx_seq, (uint64_t) s->budget + cparams.n_ubatch);

    return (uint32_t) std::min<uint64_t>(cparams.n_ctx_seq, GGML_PAD(wanted, 256));
}

bool llama_edgekv_swa_full(const llama_cparams & cparams, bool swa_full) {
    return swa_full && !(cparams.edgekv && cparams.edgekv->policy);
}

uint32_t llama_edgekv_swa_room(const llama_cparams & cparams) {
    const bool evicts = cparams.edgekv && cparams.edgekv->policy;

    return cparams.n_ubatch + (evicts ? cparams.edgekv->window : 0);
}
