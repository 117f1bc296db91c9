// The floor: a token's chance does not depend on what it says. Its rank is fixed, so that evictions one after the other keep
// a uniform sample of all tokens, and runs can be repeated.

#include "edgekv-policy.h"

// splitmix64's: every bit of the result depends on every bit of x
static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30))*0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27))*0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static float score(uint32_t i_layer, uint32_t i_head_kv, int32_t pos) {
    const uint64_t head = mix(((uint64_t) i_layer << 32 | i_head_kv) + 0x9E3779B97F4A7C15ull);

    return (float) (mix(head + (uint64_t) pos) >> 40); // 24 bits, which F32 holds
}

const llama_edgekv_policy llama_edgekv_policy_random = { "random", llama_edgekv_policy::GIVEN, nullptr, score };
