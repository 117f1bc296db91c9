#pragma once

// What the plans of both halves share.

#include "ggml.h"

#include <cstddef>
#include <cstdint>

struct ek_grid {
    uint32_t x, y, z;
    uint32_t block;  // threads
    uint32_t shared; // bytes, a multiple of 16
};

inline bool ek_grid_fits(int64_t y, int64_t z) {
    return y <= 65535 && z <= 65535;
}

inline bool ek_aligned(const ggml_tensor * t, size_t n) {
    return (uintptr_t) t->data % n == 0 && t->nb[1] % n == 0 && t->nb[2] % n == 0 && t->nb[3] % n == 0;
}

// rows that kernels can read
inline bool ek_type_known(ggml_type type) {
    switch (type) {
        case GGML_TYPE_F32:
        case GGML_TYPE_F16:
        case GGML_TYPE_BF16:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_0:
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q5_0:
        case GGML_TYPE_Q5_1:
        case GGML_TYPE_IQ4_NL:
            return true;
        default:
            return false;
    }
}
