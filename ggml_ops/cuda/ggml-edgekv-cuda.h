#pragma once

// The operators of edgekv on CUDA devices, for ggml's CUDA backend. Contracts: ggml-edgekv.h; kernels: ../gpu.

#include "ggml.h"

#include <cstddef>

#if defined(GGML_USE_HIP) || defined(GGML_USE_MUSA)

// these compile the same backend for other devices, and have none of our kernels
inline bool   ggml_edgekv_cuda_supports_op(const ggml_tensor *)        { return false; }
inline size_t ggml_edgekv_cuda_scratch(const ggml_tensor *)            { return 0; }
inline void   ggml_edgekv_cuda_compute(ggml_tensor *, void *, void *)  {}

#else

#include <cuda_runtime.h>

// Asked before anything has memory. What it says yes to cannot fail later; an operator in place has no other backend.
bool ggml_edgekv_cuda_supports_op(const ggml_tensor * op);

// bytes of device memory that the operator needs while it runs, at a multiple of 16
size_t ggml_edgekv_cuda_scratch(const ggml_tensor * op);

// Launches kernels and nothing else: no allocation, no copy, no waiting. op is one of ours, not empty, and supported.
void ggml_edgekv_cuda_compute(ggml_tensor * op, void * scratch, cudaStream_t stream);

#endif
