#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// A checksum, not a signature. Every step is a bijection of the running value, so a change in one word always shows.
// Data may come in pieces if all but the last are multiples of 8 bytes long.
inline uint64_t llama_edgekv_hash(uint64_t h, const void * data, size_t size) {
    const auto * p = (const uint8_t *) data;

    for (; size > 0;) {
        uint64_t word = 0;
        const size_t n = size < sizeof(word) ? size : sizeof(word);
        memcpy(&word, p, n);
        p    += n;
        size -= n;

        h = (h ^ word ^ ((uint64_t) n << 59))*0x9E3779B97F4A7C15ull;
        h ^= h >> 29;
    }
    return h;
}
