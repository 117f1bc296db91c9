#include "edgekv-attach.h"

#include "edgekv-evict.h"
#include "edgekv-select.h"
#include "edgekv-settings.h"

#include "llama-cparams.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <stdexcept>
#include <string>

llama_edgekv_caches llama_edgekv_find_caches(llama_memory_i * memory) {
    llama_edgekv_caches res;

    if (auto * kv = dynamic_cast<llama_kv_cache *>(memory)) {
        res.attn = kv;
    } else if (auto * pair = dynamic_cast<llama_kv_cache_iswa *>(memory)) {
        res.attn = pair->get_base();
        res.swa  = pair->get_swa();
    } else if (auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        res.attn = hybrid->get_mem_attn();
        res.recr = hybrid->get_mem_recr();
    }
    return res;
}

// what eviction and selection ask for alike
static void check_memory(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory, const std::string & what) {
    const auto & hparams = model.hparams;

    const auto refuse = [&](const char * why) {
        throw std::runtime_error(what + " is not possible: " + why);
    };

    if (!memory) {
        refuse("the model has no KV cache");
    }
    const auto caches = llama_edgekv_find_caches(memory);
    if (!caches.attn) {
        refuse("the model's memory is none of: a plain KV cache, a sliding-window pair, a hybrid without sliding windows");
    }
    if (caches.attn->get_layer_ids().empty()) {
        refuse("the model has no layer with full attention");
    }
    if (caches.attn->get_size() != llama_edgekv_kv_size(cparams) || cparams.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT) {
        refuse("contexts for draft heads are not supported");
    }
    if (hparams.is_mla()) {
        refuse("multi-head latent attention is not supported");
    }
    if (hparams.use_alibi || hparams.f_max_alibi_bias > 0.0f || hparams.n_rel_attn_bkts > 0) {
        refuse("ALiBi and relative position buckets read positions from the cells");
    }
    if (!cparams.causal_attn) {
        refuse("attention is not causal");
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        refuse("split mode 'tensor' is not supported");
    }
}

static void check_evict(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory) {
    check_memory(model, cparams, memory, "eviction");

    const auto & hparams = model.hparams;
    const auto   caches  = llama_edgekv_find_caches(memory);

    const auto refuse = [](const char * why) {
        throw std::runtime_error(std::string("eviction is not possible: ") + why);
    };

    if (!caches.swa && hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        refuse("sliding windows read positions from the cells");
    }
    if (caches.swa && hparams.swa_type != LLAMA_SWA_TYPE_STANDARD && hparams.swa_type != LLAMA_SWA_TYPE_CHUNKED) {
        refuse("the model's kind of sliding window is not supported");
    }
    if (hparams.n_pos_per_embd() > 1) {
        refuse("M-RoPE reads positions from the cells");
    }
    if (hparams.ple_n_heads > 0) {
        refuse("n-gram embeddings read tokens from the cells");
    }
    if (cparams.kv_unified) {
        refuse("sequences need streams of their own (kv_unified = false)");
    }
}

static void check_select(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory) {
    check_memory(model, cparams, memory, "selection");

    // "auto" may find out later that it is off, and the mask has another type then
    if (!cparams.flash_attn || cparams.auto_fa) {
        throw std::runtime_error("selection is not possible: it needs flash attention, turn it on");
    }
}

void llama_edgekv_check(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory) {
    const auto & cfg = cparams.edgekv;

    if (cfg && cfg->policy) {
        check_evict(model, cparams, memory);
    }
    if (cfg && cfg->reads()) {
        check_select(model, cparams, memory);
    }
}

uint32_t llama_edgekv_graph_nodes(const llama_model & model, const llama_cparams & cparams) {
    const auto & cfg = cparams.edgekv;
    if (!cfg || !cfg->select_per_query_head) {
        return 0;
    }
    // views, scores, choice, attention, their counters and two concatenations for each query head of a group
    uint32_t res = 0;
    for (uint32_t il = 0; il < model.hparams.n_layer_all; ++il) {
        if (const uint32_t n_head_kv = model.hparams.n_head_kv(il)) {
            res += 16*model.hparams.n_head(il)/n_head_kv;
        }
    }
    return res;
}

void llama_edgekv_attach(
        llama_memory_i * memory,
        const llama_model & model,
        const llama_cparams & cparams,
        const std::vector<ggml_backend_t> & backends,
        const std::vector<ggml_backend_buffer_type_t> & bufts) {
    const auto & cfg    = cparams.edgekv;
    const auto   caches = llama_edgekv_find_caches(memory);

    if (cfg && cfg->policy) {
        caches.attn->set_evict(std::make_shared<llama_edgekv_evictor>(caches, model, cparams, backends, bufts));
    }
    if (cfg && cfg->reads()) {
        caches.attn->set_select(std::make_shared<llama_edgekv_selector>(*caches.attn, cparams, backends, bufts));
    }
}
