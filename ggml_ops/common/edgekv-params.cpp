#include "edgekv-params.h"

#include "arg.h"
#include "common.h"
#include "llama-edgekv.h"
#include "log.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <locale>
#include <regex>
#include <sstream>
#include <stdexcept>

namespace {

// as edgekv/settings.py has them
const char * const POLICIES   = "none, kvdiff+qfilters+recency, kvdiff, qfilters, qfilters+keydiff, keydiff, knorm, "
                                "snapkv, streaming, random";
const char * const SELECTIONS = "none, quest";
const char * const PAGE_SIZES = "8, 16, 32, 64";

constexpr int64_t MAX_TOKENS = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(const std::string & text) {
    throw std::invalid_argument(text);
}

bool is_among(const std::string & word, const std::string & list) {
    const auto words = string_split<std::string>(list, ',');
    return std::any_of(words.begin(), words.end(), [&](const std::string & w) { return string_strip(w) == word; });
}

bool needs_filters(const std::string & policy) {
    const auto parts = string_split<std::string>(policy, '+');
    return std::find(parts.begin(), parts.end(), "qfilters") != parts.end();
}

// --- numbers --------------------------------------------------------------------------------------------------------

// of digits and a point, whatever the locale
double number(const std::string & text) {
    std::istringstream in(text);
    in.imbue(std::locale::classic());
    double res = 0.0;
    in >> res;
    return res;
}

uint32_t count(const std::string & flag, const std::string & given, const char * unit) {
    const std::string text = string_strip(given);

    static const std::regex whole("-?[0-9]{1,10}");
    if (!std::regex_match(text, whole)) {
        refuse(flag + " " + text + ": give a number of " + unit);
    }
    const double value = number(text);
    if (value < 0) {
        refuse(flag + " " + text + ": must not be negative");
    }
    if (value > MAX_TOKENS) {
        refuse(flag + " " + text + ": too large");
    }
    return (uint32_t) value;
}

struct budget {
    enum { TOKENS, SHARE, BYTES } unit;
    double amount;
};

budget parse_budget(const std::string & text) {
    static const std::regex tokens("-?[0-9]+");
    static const std::regex share ("[xX]([0-9]+(\\.[0-9]+)?)");
    static const std::regex size  ("([0-9]+(\\.[0-9]+)?)\\s*([kmgKMG]?)(i?)[bB]");

    std::smatch match;
    if (text.size() <= 20) {
        if (std::regex_match(text, tokens)) {
            return { budget::TOKENS, number(text) };
        }
        if (std::regex_match(text, match, share) && number(match[1]) >= 1.0) {
            return { budget::SHARE, number(match[1]) };
        }
        if (std::regex_match(text, match, size) && (match[3].length() || !match[4].length())) {
            // "": 0, k: 1, m: 2, g: 3
            const size_t power = match[3].length() ? std::string("kKmMgG").find(match[3].str())/2 + 1 : 0;
            return { budget::BYTES, number(match[1])*std::pow(match[4].length() ? 1024.0 : 1000.0, (double) power) };
        }
    }
    refuse("--kv-budget " + text + ": give tokens (2048), a share of the context (x8) or a size (1.5GiB)");
}

// --- what goes together ---------------------------------------------------------------------------------------------

// budget, window and keep in tokens; n_ctx: of one sequence, token_bytes: K and V of one token, 0: not known
void resolve_eviction(common_params & params, uint32_t n_ctx, uint64_t token_bytes) {
    auto & p = params.edgekv;

    const std::string text   = string_strip(p.budget);
    const budget      wanted = parse_budget(text);
    if (wanted.unit == budget::BYTES && token_bytes == 0) {
        refuse("--kv-budget " + text + ": a size in bytes is not known for this model, give tokens");
    }
    const double exact = wanted.unit == budget::TOKENS ? wanted.amount :
                         wanted.unit == budget::SHARE  ? n_ctx/wanted.amount : wanted.amount/token_bytes;
    if (exact < 1.0) {
        refuse("--kv-budget " + text + ": must leave at least 1 token");
    }
    if (exact >= MAX_TOKENS + 1.0) {
        refuse("--kv-budget " + text + ": too large");
    }
    const int64_t tokens = (int64_t) exact;

    // a default gives way to a small budget, a wish is an error below
    const int64_t keep   = params.n_keep > 0 ? params.n_keep : std::min<int64_t>(4, tokens);
    const int64_t window = !p.window.empty() ? count("--kv-window", p.window, "tokens") :
                           std::max<int64_t>(0, std::min<int64_t>({ 256, tokens/4, tokens - keep }));
    if (keep + window > tokens) {
        refuse("--keep " + std::to_string(keep) + " and --kv-window " + std::to_string(window) + " exceed "
               "--kv-budget " + std::to_string(tokens) + ": raise the budget or lower them");
    }
    p.n_budget = (uint32_t) tokens;
    p.n_window = (uint32_t) window;
    p.n_keep   = (uint32_t) keep;
}

// what cannot work on a cache that is evicted from
void check_company(const common_params & params) {
    const auto & p = params.edgekv;

    const auto clash = [&](const std::string & flag, const char * why) {
        refuse(flag + " does not go with --kv-evict " + p.evict + ": " + why);
    };
    if (params.ctx_shift) {
        clash("--context-shift", "an evicted cache cannot be shifted; drop one of them");
    }
    if (params.n_cache_reuse > 0) {
        clash("--cache-reuse " + std::to_string(params.n_cache_reuse),
              "pieces of an evicted cache cannot be moved; drop one of them");
    }
    if (params.kv_unified_per_slot > 0) {
        clash("--kv-unified-per-slot " + std::to_string(params.kv_unified_per_slot),
              "each sequence needs cells of its own; give -c and -np instead");
    }
    if (params.kv_unified) {
        clash("--kv-unified", "each sequence needs cells of its own; drop it, and give -np");
    }
    if (params.swa_full) {
        clash("--swa-full", "layers with sliding windows keep those; drop one of them");
    }
    if (params.n_keep < 0) {
        clash("--keep " + std::to_string(params.n_keep),
              "not all of a prompt can stay; give a number of tokens, 0 for the default");
    }
    if (!params.mmproj.empty() || !params.mmproj.url.empty()) {
        clash("--mmproj", "images are not supported; drop it (--no-mmproj where -hf brings it)");
    }
    if (params.embedding) {
        const bool ranks = params.pooling_type == LLAMA_POOLING_TYPE_RANK;
        clash(ranks ? "--reranking" : "--embedding",
              "a text longer than the budget would count by what is left of it; drop one of them");
    }
    if (params.speculative.has_dft()) {
        clash("--model-draft", "speculative decoding is not supported; drop one of them");
    }
    const auto & types = params.speculative.types;
    if (std::any_of(types.begin(), types.end(), [](auto type) { return type != COMMON_SPECULATIVE_TYPE_NONE; })) {
        clash("--spec-type", "speculative decoding is not supported; drop one of them");
    }
    if (params.grp_attn_n != 1) {
        clash("--grp-attn-n " + std::to_string(params.grp_attn_n),
              "positions of an evicted cache cannot be changed; drop one of them");
    }
}

// --- filters --------------------------------------------------------------------------------------------------------

std::shared_ptr<const edgekv_filters> read_given_filters(const std::string & path) {
    try {
        auto res = edgekv_read_filters(path);
        if (!res) {
            refuse(path + ": this GGUF holds no Q-Filters; make some with edgekv calibrate");
        }
        return res;
    } catch (const std::invalid_argument & e) {
        refuse(std::string("--kv-filters ") + e.what());
    }
}

// those of the flag or of the model's file, which fit the model
void load_filters(common_params & params) {
    auto & p = params.edgekv;

    const auto & model = params.model.path;
    auto found = p.filters.empty() ? edgekv_read_filters(model) : p.qfilters ? p.qfilters : read_given_filters(p.filters);
    if (!found) {
        refuse("--kv-evict " + p.evict + ": " + model + ": has no Q-Filters: run `edgekv convert " + model +
               " --with-qfilters`, or give --kv-filters FILE");
    }
    if (found->model_sha256 != edgekv_model_fingerprint(model)) {
        refuse((p.filters.empty() ? model : "--kv-filters " + p.filters) + ": Q-Filters were made for another "
               "model (model_sha256 differs); make them again with edgekv calibrate");
    }
    p.qfilters = std::move(found);
}

// throws std::invalid_argument
void hand_over(common_params & params, const llama_model * model, const llama_context_params & cparams) {
    auto & p = params.edgekv;
    if (!p.evicts() && !p.reads()) {
        return;
    }
    llama_edgekv_params next = {};
    next.struct_size = sizeof(next);

    if (p.evicts()) {
        check_company(params);
        // as llama_context computes it
        const uint32_t n_ctx = GGML_PAD(cparams.n_ctx ? cparams.n_ctx : (uint32_t) llama_model_n_ctx_train(model), 256);
        resolve_eviction(params, GGML_PAD(n_ctx/std::max(1u, cparams.n_seq_max), 256),
                llama_edgekv_token_bytes(model, cparams.type_k, cparams.type_v));
        if (needs_filters(p.evict)) {
            load_filters(params);
            next.filters         = p.qfilters->vectors.data();
            next.n_filters       = p.qfilters->vectors.size();
            next.filter_layers   = p.qfilters->layers.data();
            next.n_filter_layers = (uint32_t) p.qfilters->layers.size();
        }
        next.policy = p.evict.c_str();
        next.mode   = LLAMA_EDGEKV_MODE_BOUNDED;
        next.budget = p.n_budget;
        next.window = p.n_window;
        next.n_keep = p.n_keep;
    }
    next.select         = p.select.c_str();
    next.select_budget  = p.n_select_budget;
    next.page_size      = p.n_page_size;
    next.n_dense_layers = p.n_dense_layers;
    next.grouped_attn   = p.grouped_attn;

    if (!llama_edgekv_set_next(&next)) {
        refuse((p.evicts() ? "--kv-evict " + p.evict : "--kv-select " + p.select) + ": " + llama_edgekv_last_error());
    }
}

thread_local common_params * fitted = nullptr;

} // namespace

void edgekv_add_args(const std::function<void(common_arg)> & add_opt) {
    add_opt(common_arg(
        {"--kv-evict"}, "POLICY",
        string_format("which tokens stay in the KV cache: one of %s (default: none)", POLICIES),
        [](common_params & params, const std::string & value) {
            params.edgekv.evict = value.empty() ? "none" : value;
        }
    ).set_env("LLAMA_ARG_KV_EVICT"));
    add_opt(common_arg(
        {"--kv-budget"}, "N|xN|SIZE",
        "with --kv-evict: tokens kept per sequence by an eviction: 2048, x8 (its context / 8) or 1.5GiB",
        [](common_params & params, const std::string & value) {
            params.edgekv.budget = value;
        }
    ).set_env("LLAMA_ARG_KV_BUDGET"));
    add_opt(common_arg(
        {"--kv-window"}, "N",
        "with --kv-evict: last tokens, always kept (default: min(256, budget / 4)); the first ones: --keep",
        [](common_params & params, const std::string & value) {
            params.edgekv.window = value;
        }
    ).set_env("LLAMA_ARG_KV_WINDOW"));
    add_opt(common_arg(
        {"--kv-filters"}, "FILE",
        "with --kv-evict: a GGUF with the model's Q-Filters (default: those in the model's file)",
        [](common_params & params, const std::string & value) {
            params.edgekv.filters = value;
        }
    ).set_env("LLAMA_ARG_KV_FILTERS"));
    add_opt(common_arg(
        {"--kv-select"}, "METHOD",
        string_format("which cached tokens a decode step reads: one of %s (default: none)", SELECTIONS),
        [](common_params & params, const std::string & value) {
            params.edgekv.select = value.empty() ? "none" : value;
        }
    ).set_env("LLAMA_ARG_KV_SELECT"));
    add_opt(common_arg(
        {"--kv-select-budget"}, "N|auto",
        "with --kv-select: tokens read per step (default: auto, 768 and a 32nd of the cached ones)",
        [](common_params & params, const std::string & value) {
            params.edgekv.select_budget = value;
        }
    ).set_env("LLAMA_ARG_KV_SELECT_BUDGET"));
    add_opt(common_arg(
        {"--kv-page-size"}, "N",
        string_format("with --kv-select: tokens per page, one of %s (default: 16)", PAGE_SIZES),
        [](common_params & params, const std::string & value) {
            params.edgekv.page_size = value;
        }
    ).set_env("LLAMA_ARG_KV_PAGE_SIZE"));
    add_opt(common_arg(
        {"--kv-dense-layers"}, "N",
        "with --kv-select: first layers that read the whole cache (default: 2)",
        [](common_params & params, const std::string & value) {
            params.edgekv.dense_layers = value;
        }
    ).set_env("LLAMA_ARG_KV_DENSE_LAYERS"));
    add_opt(common_arg(
        {"--kv-grouped-attn"},
        {"--no-kv-grouped-attn"},
        "read the whole cache with our attention kernel too where nothing is selected (default: disabled)",
        [](common_params & params, bool value) {
            params.edgekv.grouped_attn = value;
        }
    ).set_env("LLAMA_ARG_KV_GROUPED_ATTN"));
}

void edgekv_check_args(common_params & params) {
    auto & p = params.edgekv;
    if (params.usage || params.completion) {
        return;
    }

    if (p.evict == "auto") {
        refuse(std::string("--kv-evict auto: edgekv serve decides that; here choose one of ") + POLICIES);
    }
    if (!is_among(p.evict, POLICIES)) {
        refuse("--kv-evict " + p.evict + ": unknown policy, choose one of " + POLICIES);
    }
    if (p.evicts()) {
        if (p.budget.empty()) {
            refuse("--kv-evict " + p.evict + " needs --kv-budget (tokens, x8 or 1.5GiB)");
        }
        if (parse_budget(string_strip(p.budget)).unit == budget::TOKENS && params.n_keep >= 0) {
            resolve_eviction(params, 0, 0); // the others need the model
        } else if (!p.window.empty()) {
            count("--kv-window", p.window, "tokens");
        }
        check_company(params);
        if (!p.filters.empty()) {
            if (!needs_filters(p.evict)) {
                refuse("--kv-filters " + p.filters + ": --kv-evict " + p.evict + " looks at no filters, drop one of them");
            }
            p.qfilters = read_given_filters(p.filters);
        }
    } else {
        for (const auto & [flag, value] : { std::pair("--kv-window",  p.window),
                                            std::pair("--kv-filters", p.filters) }) {
            if (!value.empty()) {
                refuse(std::string(flag) + " is for eviction: add --kv-evict or drop it");
            }
        }
        if (!p.budget.empty()) {
            refuse("--kv-budget says what an eviction keeps, but --kv-evict none evicts nothing: drop one of them");
        }
    }

    if (!is_among(p.select, SELECTIONS)) {
        refuse("--kv-select " + p.select + ": unknown, choose one of " + SELECTIONS);
    }
    if (p.selects()) {
        if (!p.page_size.empty()) {
            if (!is_among(string_strip(p.page_size), PAGE_SIZES)) {
                refuse("--kv-page-size " + p.page_size + ": choose one of " + PAGE_SIZES);
            }
            p.n_page_size = count("--kv-page-size", p.page_size, "tokens");
        }
        const std::string text = string_strip(p.select_budget);
        if (!text.empty() && text != "auto") {
            static const std::regex digits("[0-9]{1,10}");
            if (!std::regex_match(text, digits)) {
                refuse("--kv-select-budget " + text + ": give a number of tokens, or auto");
            }
            p.n_select_budget = count("--kv-select-budget", text, "tokens");
            if (p.n_select_budget < 2*p.n_page_size) {
                refuse("--kv-select-budget " + text + ": must be two pages at least, " +
                       std::to_string(2*p.n_page_size) + " tokens: the first and the newest page are always read");
            }
        }
        if (!p.dense_layers.empty()) {
            p.n_dense_layers = count("--kv-dense-layers", p.dense_layers, "layers");
        }
    } else {
        for (const auto & [flag, value] : { std::pair("--kv-select-budget", p.select_budget),
                                            std::pair("--kv-page-size", p.page_size),
                                            std::pair("--kv-dense-layers", p.dense_layers) }) {
            if (!value.empty()) {
                refuse(std::string(flag) + " is for selection: add --kv-select quest or drop it");
            }
        }
    }

    if (p.reads()) {
        if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED) {
            refuse((p.selects() ? "--kv-select " + p.select : "--kv-grouped-attn") +
                   " needs flash attention: drop -fa off");
        }
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    }
}

bool edgekv_apply(common_params & params, const llama_model * model, const llama_context_params & cparams) {
    try {
        hand_over(params, model, cparams);
    } catch (const std::invalid_argument & e) {
        COM_ERR("failed to initialize the context: %s\n", e.what());
        return false;
    }
    const auto & p = params.edgekv;
    if (p.evicts()) {
        COM_INF("eviction: %s, %u tokens of a sequence stay, the last %u and the first %u always\n", p.evict.c_str(),
                p.n_budget, p.n_window, p.n_keep);
    }
    if (p.selects()) {
        const auto n = p.n_select_budget ? std::to_string(p.n_select_budget) : "768 and a 32nd of the cached";
        COM_INF("selection: %s, a step reads %s tokens in pages of %u, but all in the first %u layers\n",
                p.select.c_str(), n.c_str(), p.n_page_size, p.n_dense_layers);
    }
    return true;
}

edgekv_fitting::edgekv_fitting(common_params & params) {
    fitted = &params;
}

edgekv_fitting::~edgekv_fitting() {
    fitted = nullptr;
}

void edgekv_apply_again(const char * path_model, const llama_model * model, const llama_context_params & cparams) {
    if (!fitted || fitted->model.path != path_model || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        return;
    }
    try {
        hand_over(*fitted, model, cparams);
    } catch (const std::invalid_argument &) {
    }
}
