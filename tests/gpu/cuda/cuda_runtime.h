#pragma once

// CUDA's words, as far as the kernels and their launchers use them, for a host compiler.

#include "../block.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

typedef void * cudaStream_t;

struct dim3 {
    uint32_t x, y, z;
    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4  { int32_t  x, y, z, w; };
struct alignas(8)  uint2 { uint32_t x, y; };

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return { x, y, z, w }; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return { x, y }; }

#define threadIdx (gpu::dim{ gpu::here->thread, 0, 0 })
#define blockDim  (gpu::dim{ gpu::here->threads, 1, 1 })
#define blockIdx  (gpu::here->block)
#define gridDim   (gpu::here->blocks)

inline void __syncthreads() { gpu::barrier(); }

namespace gpu {

inline void all_lanes(uint32_t mask) {
    if (mask != 0xFFFFFFFFu) {
        fail("a warp operation of some lanes only");
    }
}

} // namespace gpu

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu) {
    gpu::all_lanes(mask);
    gpu::warp_barrier();
}

template <typename T> T __shfl_sync(uint32_t mask, T x, uint32_t lane) {
    gpu::all_lanes(mask);
    return gpu::shuffle(x, lane);
}

template <typename T> T __shfl_xor_sync(uint32_t mask, T x, uint32_t bits) {
    gpu::all_lanes(mask);
    return gpu::shuffle(x, gpu::here->thread%32 ^ bits);
}

// CUDA gives the lane's own value where there is no lane below, Metal nothing that is defined: so does this
template <typename T> T __shfl_up_sync(uint32_t mask, T x, uint32_t delta) {
    gpu::all_lanes(mask);
    const uint32_t lane = gpu::here->thread%32;
    return gpu::shuffle(x, lane >= delta ? lane - delta : gpu::NOWHERE);
}

inline uint32_t __float_as_uint(float x)    { uint32_t y; memcpy(&y, &x, 4); return y; }
inline float    __uint_as_float(uint32_t x) { float    y; memcpy(&y, &x, 4); return y; }

// threads change only where they wait
template <typename T> T atomicAdd(T * p, T x) {
    const T old = *p;
    *p = old + x;
    return old;
}

#define EK_DYNAMIC_SHARED(name) uint8_t * const name = gpu::shared()

#define EK_LAUNCH(kernel, grid, block, bytes, stream, ...) \
    do { \
        const dim3 blocks_ = grid; \
        (void) (stream); \
        gpu::launch({ blocks_.x, blocks_.y, blocks_.z }, block, bytes, [&] { kernel(__VA_ARGS__); }); \
    } while (0)

inline uint32_t ek_block_size(uint32_t n) { return gpu::block_size(n); }
