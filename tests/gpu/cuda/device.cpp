// The CUDA backend's operators on the emulated device. The .cu file is compiled as C++, with the headers of this folder
// in place of CUDA's.

#include "../device.h"

#include "ggml-edgekv-cuda.cu"

namespace device {

const gpu::limits limits = { 65535, 48*1024 };

bool   supports(const ggml_tensor * op) { return ggml_edgekv_cuda_supports_op(op); }
size_t scratch (const ggml_tensor * op) { return ggml_edgekv_cuda_scratch(op); }
void   compute (ggml_tensor * op, uint8_t * scratch) { ggml_edgekv_cuda_compute(op, scratch, nullptr); }

} // namespace device
