// How unlike a token's key and value are to those of the others, and how large its value is. What a token adds to the output
// is its value times the attention: tokens whose keys and values are like those of others are stood in for by them, and
// small values add little. It needs neither filters nor queries.

#include "parts.h"

const llama_edgekv_policy llama_edgekv_policy_kvdiff = { "kvdiff", 0, llama_edgekv_kvdiff, nullptr };
