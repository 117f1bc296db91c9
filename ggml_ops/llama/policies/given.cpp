// Scores of the caller's own, for one eviction: llama_edgekv_evict_as().

#include "edgekv-policy.h"

const llama_edgekv_policy llama_edgekv_policy_given = { "given", llama_edgekv_policy::GIVEN, nullptr, nullptr };
