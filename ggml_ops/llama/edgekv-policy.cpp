#include "edgekv-policy.h"

#include <cstring>

const llama_edgekv_policy * llama_edgekv_policy_find(const char * name) {
    static const llama_edgekv_policy * const all[] = {
        &llama_edgekv_policy_qfilters,
        &llama_edgekv_policy_streaming,
        &llama_edgekv_policy_knorm,
        &llama_edgekv_policy_keydiff,
        &llama_edgekv_policy_kvdiff,
        &llama_edgekv_policy_kvdiff_qfilters_recency,
        &llama_edgekv_policy_qfilters_keydiff,
        &llama_edgekv_policy_snapkv,
        &llama_edgekv_policy_random,
        &llama_edgekv_policy_given,
    };

    for (const auto * policy : all) {
        if (strcmp(policy->name, name) == 0) {
            return policy;
        }
    }
    return nullptr;
}
