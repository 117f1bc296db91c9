#include "edgekv-policy.h"

#include <cstring>

const llama_edgekv_policy * llama_edgekv_policy_find(const char * name) {
    static const llama_edgekv_policy * const all[] = {
        &llama_edgekv_policy_qfilters,
        &llama_edgekv_policy_streaming,
        &llama_edgekv_policy_knorm,
        &llama_edgekv_policy_keydiff,
    };

    for (const auto * policy : all) {
        if (strcmp(policy->name, name) == 0) {
            return policy;
        }
    }
    return nullptr;
}
