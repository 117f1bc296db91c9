#pragma once

// IEEE half precision for the host compiler.

#include <cstdint>
#include <cstring>

namespace gpu {

inline float half_to_float(uint16_t h) {
    static const float * const table = [] {
        static float all[1 << 16];
        for (uint32_t u = 0; u < (1 << 16); ++u) {
            const uint32_t sign = (u & 0x8000) << 16, exponent = (u >> 10) & 31, fraction = u & 0x3FF;
            uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
            if (exponent == 31) {
                bits = sign | 0x7F800000 | fraction << 13;
            } else if (exponent == 0) { // fraction * 2^-24, exact in f32
                const float x = (float) fraction*(1.0f/(1 << 24));
                memcpy(&bits, &x, sizeof(bits));
                bits |= sign;
            }
            memcpy(&all[u], &bits, sizeof(bits));
        }
        return all;
    }();
    return table[h];
}

// to nearest, ties to even
inline uint16_t float_to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    const uint16_t sign = (u >> 16) & 0x8000;
    u &= 0x7FFFFFFF;

    if (u > 0x7F800000) {
        return 0x7FFF; // CUDA's only NaN
    }
    if (u >= 0x477FF000) { // 65520, from which on the nearest is infinity
        return sign | 0x7C00;
    }
    if (u < 0x38800000) { // below 2^-14: a multiple of 2^-24
        const uint32_t shift = 126 - (u >> 23);
        if (shift > 24) {
            return sign;
        }
        const uint32_t fraction = (u & 0x7FFFFF) | 0x800000;
        const uint32_t kept = fraction >> shift, rest = fraction & ((1u << shift) - 1), half = 1u << (shift - 1);
        return sign | (kept + (rest > half || (rest == half && (kept & 1))));
    }
    return sign | ((u - (112u << 23) + 0xFFF + ((u >> 13) & 1)) >> 13);
}

} // namespace gpu
