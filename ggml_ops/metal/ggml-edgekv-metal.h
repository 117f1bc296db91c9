#pragma once

// The operators of ggml-edgekv.h on Metal. Scratch lies behind an operator's result, which is allocated larger for it.

#include "ggml.h"

#include "ggml-metal-device.h"

#ifdef __cplusplus
extern "C" {
#endif

// on a GPU whose SIMD groups have 32 threads
bool ggml_edgekv_metal_supports_op(const struct ggml_tensor * op);

// bytes that a result's memory has beyond ggml_nbytes
size_t ggml_edgekv_metal_scratch(const struct ggml_tensor * op);

// Puts the operator's kernels into the encoder; `buffer` says where a tensor's memory is. The caller orders operators
// by their sources and results; kernels of one operator are ordered here, also in a concurrent encoder. Operators that
// add to the same counters need no order.
void ggml_edgekv_metal_encode(
        ggml_metal_library_t       lib,
        ggml_metal_encoder_t       enc,
        const struct ggml_tensor * op,
        struct ggml_metal_buffer_id (*buffer)(const struct ggml_tensor * tensor));

#ifdef __cplusplus
}
#endif
