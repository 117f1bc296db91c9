#pragma once

// What the kernels use of CUDA's header of that name.

#include "../half.h"

struct __half {
    uint16_t bits;
};

inline __half   __ushort_as_half(uint16_t x) { return { x }; }
inline uint16_t __half_as_ushort(__half x)   { return x.bits; }
inline float    __half2float(__half x)       { return gpu::half_to_float(x.bits); }
inline __half   __float2half_rn(float x)     { return { gpu::float_to_half(x) }; }
