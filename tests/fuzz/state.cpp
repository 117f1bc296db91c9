// libFuzzer target: states of evicted contexts, ggml_ops/llama/edgekv-state.cpp around what llama.cpp's caches read
// themselves. edgekv-state.cpp is instrumented and stands in for the one in libllama. An accepted state has to carry a
// decode that evicts.
//
// The input is one byte and a state. The byte says which context reads it, as one sequence or whole, and whether the
// checksums are made right first, as whoever forges a state would.
//
// EDGEKV_FUZZ_MODELS: folder of the tiny models. EDGEKV_LIB_PATH: that of the libraries. EDGEKV_FUZZ_SEEDS: write states that are whole there, and end.
// tools/fuzz compiles and runs it.

#include "edgekv-hash.h"
#include "edgekv-state.h"

#include "llama-edgekv.h"
#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <unistd.h>
#include <vector>

#define CHECK(x) do { if (!(x)) { fprintf(stderr, "%s:%d: %s failed (%s)\n", __FILE__, __LINE__, #x, llama_edgekv_last_error()); abort(); } } while (0)

namespace {

constexpr uint8_t CONTEXT = 7, WHOLE = 8, CHECKSUMS = 16, LENGTH = 32;
constexpr uint32_t BUDGET = 12;

using bytes = std::vector<uint8_t>;

struct reader {
    llama_context * ctx;
    bytes           states[2]; // of one sequence, and whole
};
std::vector<reader> & contexts = *new std::vector<reader>; // reachable to the end, so that nobody calls them leaked

llama_context * open(llama_model * model, uint32_t n_seq_max) {
    llama_edgekv_params params = {};
    params.struct_size = sizeof(params);
    params.policy      = "knorm";
    params.mode        = LLAMA_EDGEKV_MODE_BOUNDED;
    params.budget      = BUDGET;
    params.window      = 4;
    params.n_keep      = 2;
    CHECK(llama_edgekv_set_next(&params));

    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx           = 256*n_seq_max;
    cparams.n_batch         = 4;
    cparams.n_ubatch        = 4;
    cparams.n_seq_max       = n_seq_max;
    cparams.n_threads       = 1;
    cparams.n_threads_batch = 1;
    cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    auto * res = llama_init_from_model(model, cparams);
    CHECK(res);
    return res;
}

// tokens behind what there is of a sequence
void decode(llama_context * ctx, int n, llama_seq_id seq_id) {
    llama_batch batch = llama_batch_init(1, 0, 1);
    batch.n_tokens = 1;
    for (int i = 0; i < n; ++i) {
        batch.token[0]     = i % 8;
        batch.pos[0]       = llama_memory_seq_pos_max(llama_get_memory(ctx), seq_id) + 1;
        batch.n_seq_id[0]  = 1;
        batch.seq_id[0][0] = seq_id;
        batch.logits[0]    = true;
        if (llama_decode(ctx, batch) != 0) {
            break; // the context is full: an error, no abort
        }
    }
    llama_batch_free(batch);
}

bytes save(llama_context * ctx, bool whole) {
    bytes res(whole ? llama_state_get_size(ctx) : llama_state_seq_get_size(ctx, 0));
    CHECK((whole ? llama_state_get_data(ctx, res.data(), res.size()) : llama_state_seq_get_data(ctx, res.data(), res.size(), 0)) == res.size());
    return res;
}

bool load(llama_context * ctx, const bytes & state, bool whole) {
    return (whole ? llama_state_set_data(ctx, state.data(), state.size()) : llama_state_seq_set_data(ctx, state.data(), state.size(), 0)) != 0;
}

// right checksums, and if asked for a payload as long as what is there
void forge(bytes & state, bool length) {
    const uint8_t magic[4] = { 'E', 'd', 'K', 'v' };
    const size_t at = std::search(state.begin(), state.end(), magic, magic + 4) - state.begin();
    const auto word = [&](size_t i) { uint64_t x; memcpy(&x, &state[i], 8); return x; };
    const auto put  = [&](size_t i, uint64_t x) { memcpy(&state[i], &x, 8); };

    if (at + 24 > state.size() || word(at + 8) > state.size() - at - 24) {
        return;
    }
    const size_t head = at + 16, end = head + word(at + 8);
    const uint8_t policy[5] = { 'k', 'n', 'o', 'r', 'm' };
    const size_t n_payload = std::search(state.begin() + head, state.begin() + end, policy, policy + 5) - state.begin() + 5 + 12;
    if (n_payload + 8 <= end && end + 16 <= state.size()) {
        if (length) {
            put(n_payload, state.size() - end - 16);
        }
        if (word(n_payload) <= state.size() - end - 16) {
            put(end + 8 + word(n_payload), llama_edgekv_hash(0, &state[end + 8], word(n_payload)));
        }
    }
    put(end, llama_edgekv_hash(0, &state[head], end - head));
}

} // namespace

extern "C" int LLVMFuzzerInitialize(int *, char ***) {
    const char * models = getenv("EDGEKV_FUZZ_MODELS");
    if (!models || !getenv("EDGEKV_LIB_PATH")) {
        fprintf(stderr, "EDGEKV_FUZZ_MODELS and EDGEKV_LIB_PATH name no folders\n");
        exit(1);
    }
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    ggml_backend_load_all_from_path(getenv("EDGEKV_LIB_PATH"));
    for (const char * name : { "llama", "gemma3", "lfm2" }) {
        llama_model_params mparams = llama_model_default_params();
        mparams.n_gpu_layers = 0;
        auto * model = llama_model_load_from_file((std::string(models) + "/" + name + ".gguf").c_str(), mparams);
        CHECK(model);
        for (const uint32_t n_seq_max : { 1, 2 }) {
            contexts.push_back({ open(model, n_seq_max), {} });
        }
    }
    const char * seeds = getenv("EDGEKV_FUZZ_SEEDS");
    int number = 0;
    for (size_t i = 0; i < contexts.size(); ++i) {
        auto & to = contexts[i];
        for (const int n : { 3, 40 }) { // before and after evictions
            decode(to.ctx, n, 0);
            for (const bool whole : { false, true }) {
                to.states[whole] = save(to.ctx, whole);
                for (const int flags : { 0, CHECKSUMS | LENGTH }) {
                    if (seeds) {
                        std::ofstream out(std::string(seeds) + "/" + std::to_string(number++), std::ios::binary);
                        out.put((char) (i | (whole ? WHOLE : 0) | flags));
                        out.write((const char *) to.states[whole].data(), (std::streamsize) to.states[whole].size());
                    }
                }
            }
        }
        llama_memory_clear(llama_get_memory(to.ctx), true);
    }
    if (seeds) {
        _exit(0);
    }
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size == 0) {
        return 0;
    }
    const auto & to  = contexts[(data[0] & CONTEXT) % contexts.size()];
    auto *     ctx   = to.ctx;
    const bool whole = data[0] & WHOLE;

    bytes state(data + 1, data + size);
    if (data[0] & CHECKSUMS) {
        forge(state, data[0] & LENGTH);
    }
    if (load(ctx, state, whole)) {
        const bytes again = save(ctx, whole); // what was accepted can be saved
        decode(ctx, 6, 0);
        CHECK(load(ctx, again, whole));
    } else {
        CHECK(load(ctx, to.states[false], false)); // and what was refused is in nobody's way
        decode(ctx, 1, 0);
    }
    llama_memory_clear(llama_get_memory(ctx), true);
    return 0;
}
