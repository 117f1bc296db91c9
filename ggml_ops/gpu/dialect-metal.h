#pragma once

// Metal's words for the kernel bodies. tests/gpu gives the same names to a host compiler.

#include <metal_stdlib>

using namespace metal;

#define EK_FN     static inline
#define EK_METHOD inline // of a struct
#define EK_TABLE  static constant const
#define EK_GLOBAL device
#define EK_SHARED threadgroup
#define EK_LOCAL  thread
#define EK_PARAM  constant

#define EK_BARRIER()      threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device)
#define EK_WARP_BARRIER() simdgroup_barrier(mem_flags::mem_threadgroup)

#define EK_UNROLL _Pragma("clang loop unroll(full)")

struct ek_thread {
    uint32_t index;   // in the block
    uint32_t count;   // threads in the block
    uint32_t x, y, z; // the block in the grid
};

template <typename T> EK_FN T ek_shuffle_xor (T x, uint32_t mask)  { return simd_shuffle_xor(x, (ushort) mask); }
// the value of the lane `delta` below; undefined for the first ones
template <typename T> EK_FN T ek_shuffle_up  (T x, uint32_t delta) { return simd_shuffle_up (x, (ushort) delta); }

EK_FN uint32_t ek_bits (float x)    { return as_type<uint32_t>(x); }
EK_FN float    ek_float(uint32_t x) { return as_type<float>(x); }

EK_FN float    ek_half_to_float(uint16_t x) { return (float) as_type<half>(x); }

EK_FN float ek_exp (float x) { return exp(x); }
EK_FN float ek_tanh(float x) { return precise::tanh(x); }
EK_FN float ek_sqrt(float x) { return sqrt(x); }
EK_FN float ek_max (float x, float y) { return fmax(x, y); }
EK_FN float ek_min (float x, float y) { return fmin(x, y); }
EK_FN float ek_fma (float x, float y, float z) { return fma(x, y, z); }

// both give the old value; no order
EK_FN uint32_t ek_atomic_add(threadgroup uint32_t * p, uint32_t x) {
    return atomic_fetch_add_explicit((threadgroup atomic_uint *) p, x, memory_order_relaxed);
}
EK_FN uint32_t ek_atomic_add_global(device uint32_t * p, uint32_t x) {
    return atomic_fetch_add_explicit((device atomic_uint *) p, x, memory_order_relaxed);
}

typedef uint4 ek_uint4; // x, y, z, w
typedef uint2 ek_uint2;

EK_FN ek_uint4 ek_load_16(device const uint8_t * p) { return *(device const uint4 *) p; }    // p is a multiple of 16
EK_FN ek_uint2 ek_load_8 (device const uint8_t * p) { return *(device const uint2 *) p; }    // of 8
EK_FN uint32_t ek_load_4 (device const uint8_t * p) { return *(device const uint32_t *) p; } // of 4
EK_FN uint16_t ek_load_2 (device const uint8_t * p) { return *(device const uint16_t *) p; } // of 2
EK_FN void ek_store_16(device uint8_t * p, ek_uint4 x) { *(device uint4 *) p = x; }
EK_FN void ek_store_8 (device uint8_t * p, ek_uint2 x) { *(device uint2 *) p = x; }
EK_FN void ek_store_4 (device uint8_t * p, uint32_t x) { *(device uint32_t *) p = x; }
EK_FN void ek_store_2 (device uint8_t * p, uint16_t x) { *(device uint16_t *) p = x; }
