#pragma once

// CPU kernels of the operators in ggml-edgekv.h: plain loops over what a KV cache stores, one call per thread.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void ggml_compute_forward_edgekv(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// scratch bytes of a node when it runs on n_tasks threads
size_t ggml_edgekv_cpu_work_size(const struct ggml_tensor * dst, int n_tasks);

bool ggml_edgekv_cpu_supports_op(const struct ggml_tensor * op);

// The operators of selection are in a file of their own; the functions above call these.
void   ggml_compute_forward_edgekv_select(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_edgekv_cpu_select_work_size(const struct ggml_tensor * dst, int n_tasks);
bool   ggml_edgekv_cpu_select_supports_op(const struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif
