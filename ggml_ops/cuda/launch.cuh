#pragma once

// How kernels are launched, and all of their bodies. tests/gpu has an EK_LAUNCH for a host compiler.

#include "../gpu/dialect-cuda.h"

#include "../gpu/args.h"
#include "../gpu/rows.h"
#include "../gpu/block.h"
#include "../gpu/sums.h"
#include "../gpu/pick.h"
#include "../gpu/evict.h"
#include "../gpu/summarize.h"
#include "../gpu/pages.h"
#include "../gpu/attn.h"

#include "ggml.h"
#include "ggml-edgekv.h"

#ifdef __CUDACC__

// the block's memory, in a kernel
#define EK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]

#define EK_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)

// threads of a block for which n are planned
static inline uint32_t ek_block_size(uint32_t n) { return n; }

#endif
