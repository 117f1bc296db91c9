// libFuzzer target: the values of the flags, ggml_ops/common/edgekv-params.cpp. The input is text, a value per line. What
// the model would say is given here instead, so that sizes and shares are turned into tokens, too.
// tools/fuzz compiles and runs it.

#include "edgekv-params.h"

#include "common.h"
#include "log.h"
#include "llama-edgekv.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>

static llama_edgekv_params handed_over;

// in the place of libllama's
extern "C" bool llama_edgekv_set_next(const llama_edgekv_params * params) {
    handed_over = *params;
    return true;
}
extern "C" uint64_t llama_edgekv_token_bytes(const llama_model *, ggml_type, ggml_type) { return 23040; }
extern "C" int32_t  llama_model_n_ctx_train(const llama_model *) { return 8192; }

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s failed\n", __FILE__, __LINE__, #x); abort(); } } while (0)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const common_params defaults = [] {
        common_log_pause(common_log_main());
        return common_params();
    }();
    static common_params params = defaults;

    std::istringstream lines(std::string((const char *) data, size));
    const auto next = [&] {
        std::string line;
        std::getline(lines, line);
        return line;
    };
    auto & p = params.edgekv = {};
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_AUTO;

    p.evict         = next();
    p.budget        = next();
    p.window        = next();
    p.select        = next();
    p.select_budget = next();
    p.page_size     = next();
    p.dense_layers  = next();
    params.n_keep   = atoi(next().c_str());

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx     = (uint32_t) atoi(next().c_str());
    cparams.n_seq_max = 1 + (uint32_t) atoi(next().c_str()) % 256;
    try {
        edgekv_check_args(params);
    } catch (const std::invalid_argument &) { // holds the value as it was given
        return 0;
    }
    handed_over = {};
    if (edgekv_apply(params, nullptr, cparams) && p.evicts()) {
        CHECK(handed_over.budget >= 1 && handed_over.budget <= INT32_MAX);
        CHECK((uint64_t) handed_over.window + handed_over.n_keep <= handed_over.budget);
    }
    if (p.selects()) {
        CHECK(p.n_page_size >= 8 && p.n_page_size <= 64 && p.n_select_budget <= INT32_MAX && p.n_dense_layers <= INT32_MAX);
    }
    return 0;
}
