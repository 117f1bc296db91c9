#pragma once

// What a backend gives to run its operators on the emulated device: cuda/device.cpp, metal/device.cpp.

#include "block.h"

#include "ggml.h"

namespace device {

extern const gpu::limits limits;

bool   supports(const ggml_tensor * op);
size_t scratch (const ggml_tensor * op); // bytes; asked before there is any memory
void   compute (ggml_tensor * op, uint8_t * scratch); // behind the result's bytes, a multiple of 16

} // namespace device
