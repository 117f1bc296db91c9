#pragma once

// What the CPU kernels share.

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

// one cache line between the scratch of two threads
constexpr size_t EDGEKV_WORK_PAD = 64;

struct edgekv_range {
    int64_t begin;
    int64_t end;
};

// this thread's part of n items
inline edgekv_range edgekv_share(int64_t n, const ggml_compute_params * params) {
    const int64_t per = (n + params->nth - 1)/params->nth;
    return { std::min(n, per*params->ith), std::min(n, per*(params->ith + 1)) };
}

inline bool edgekv_converts(ggml_type type) {
    return type == GGML_TYPE_F32 || ggml_get_type_traits(type)->to_float != nullptr;
}

// n elements of a row, whatever its type
inline void edgekv_to_f32(ggml_type type, const void * src, float * out, int64_t n) {
    switch (type) {
        case GGML_TYPE_F32:  memcpy(out, src, n*sizeof(float));                        break;
        case GGML_TYPE_F16:  ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) src, out, n); break;
        case GGML_TYPE_BF16: ggml_cpu_bf16_to_fp32((const ggml_bf16_t *) src, out, n); break;
        default:             ggml_get_type_traits(type)->to_float(src, out, n);        break;
    }
}

// An unsigned number that orders like a score: -0 equals 0, NaN below everything.
inline uint32_t edgekv_rank(float score) {
    uint32_t u = 0;
    if (score == score) {
        score += 0.0f;
        memcpy(&u, &score, sizeof(u));
        u = (u & 0x80000000u) ? ~u : (u | 0x80000000u);
    }
    return u;
}

// The same for (score, index): a tie goes to the later one.
inline uint64_t edgekv_rank(float score, int64_t index) {
    return ((uint64_t) edgekv_rank(score) << 32) | (uint32_t) index;
}
