#pragma once

// The threads of a GPU's grid on one CPU core. A thread of a block is a fiber that runs until it waits for others; who
// runs next is drawn from a seed. README.md says what that finds.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

namespace gpu {

struct dim {
    uint32_t x, y, z;
};

// What the device refuses.
struct limits {
    uint32_t grid_yz;
    size_t   shared; // bytes
};

// What a kernel's thread may ask.
struct place {
    uint32_t thread;  // in the block
    uint32_t threads; // of the block
    dim      block;
    dim      blocks;
};

extern const place * here;

// the block's memory
uint8_t * shared();

// all threads of the block
void barrier();

// all lanes of the warp
void warp_barrier();

constexpr uint32_t NOWHERE = 32;

// the bits that lane `from` of the warp gave; all ones from NOWHERE
uint64_t exchange(uint64_t bits, uint32_t from);

template <typename T>
T shuffle(T x, uint32_t from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    uint64_t bits = 0;
    memcpy(&bits, &x, sizeof(T));
    bits = exchange(bits, from);
    memcpy(&x, &bits, sizeof(T));
    return x;
}

// Begins a run: forgets the last error. Seed 0 runs blocks, warps and lanes forward, 1 backward, others shuffled.
void begin(const limits & limits, uint64_t seed, uint32_t most_threads);

// a multiple of 32: n, or as many threads as the run allows
uint32_t block_size(uint32_t n);

// Runs the kernel once per thread. After an error nothing is run any more.
void launch(dim blocks, uint32_t threads, size_t shared_bytes, const std::function<void()> & kernel);

// Ends the run: of a kernel's thread never returns.
void fail(const std::string & what);

// empty without one
const std::string & error();

// which of n things that may happen in any order is next
uint32_t draw(uint32_t n);

// which of the errors that tests/kernels.py planted into the kernels shows; 0: none
extern int planted;

} // namespace gpu
