#pragma once

// CUDA's words for the kernel bodies. tests/gpu gives the same names to a host compiler.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define EK_FN     static __device__ __forceinline__
#define EK_METHOD __device__ __forceinline__ // of a struct
#define EK_TABLE  static __device__ const
#define EK_GLOBAL         // memory of the device
#define EK_SHARED         // memory of a block
#define EK_LOCAL          // memory of a thread
#define EK_PARAM  const   // a kernel's parameters

#define EK_BARRIER()      __syncthreads() // also orders the block's accesses to the device's memory
#define EK_WARP_BARRIER() __syncwarp()

#define EK_UNROLL _Pragma("unroll")

struct ek_thread {
    uint32_t index;   // in the block
    uint32_t count;   // threads in the block
    uint32_t x, y, z; // the block in the grid
};

EK_FN ek_thread ek_here() {
    return { threadIdx.x, blockDim.x, blockIdx.x, blockIdx.y, blockIdx.z };
}

template <typename T> EK_FN T ek_shuffle_xor (T x, uint32_t mask)  { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
// the value of the lane `delta` below; undefined for the first ones
template <typename T> EK_FN T ek_shuffle_up  (T x, uint32_t delta) { return __shfl_up_sync (0xFFFFFFFFu, x, delta); }

EK_FN uint32_t ek_bits (float x)    { return __float_as_uint(x); }
EK_FN float    ek_float(uint32_t x) { return __uint_as_float(x); }

EK_FN float    ek_half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }

EK_FN float ek_exp (float x) { return expf(x); }
EK_FN float ek_tanh(float x) { return tanhf(x); }
EK_FN float ek_sqrt(float x) { return sqrtf(x); }
EK_FN float ek_max (float x, float y) { return fmaxf(x, y); }
EK_FN float ek_min (float x, float y) { return fminf(x, y); }
EK_FN float ek_fma (float x, float y, float z) { return fmaf(x, y, z); }

// both give the old value; no order
EK_FN uint32_t ek_atomic_add       (uint32_t * p, uint32_t x) { return atomicAdd(p, x); } // of a block
EK_FN uint32_t ek_atomic_add_global(uint32_t * p, uint32_t x) { return atomicAdd(p, x); } // of the device

typedef uint4 ek_uint4; // x, y, z, w
typedef uint2 ek_uint2;

EK_FN ek_uint4 ek_load_16(const uint8_t * p) { return *(const uint4 *) p; }      // p is a multiple of 16
EK_FN ek_uint2 ek_load_8 (const uint8_t * p) { return *(const uint2 *) p; }      // of 8
EK_FN uint32_t ek_load_4 (const uint8_t * p) { return *(const uint32_t *) p; }   // of 4
EK_FN uint16_t ek_load_2 (const uint8_t * p) { return *(const uint16_t *) p; }   // of 2
EK_FN void ek_store_16(uint8_t * p, ek_uint4 x) { *(uint4 *) p = x; }
EK_FN void ek_store_8 (uint8_t * p, ek_uint2 x) { *(uint2 *) p = x; }
EK_FN void ek_store_4 (uint8_t * p, uint32_t x) { *(uint32_t *) p = x; }
EK_FN void ek_store_2 (uint8_t * p, uint16_t x) { *(uint16_t *) p = x; }
