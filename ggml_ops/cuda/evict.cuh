#pragma once

// Launches of the operators of eviction, and of SUMMARIZE.

#include "launch.cuh"

#include "../gpu/plan-evict.h"

static __global__ void k_score(const ek_score_args a, const uint8_t * keys, const float * vec, float * out) {
    ek_score(a, keys, vec, out, ek_here());
}

static __global__ void k_key_sum(const ek_key_mean_args a, const uint8_t * keys, float * parts) {
    EK_DYNAMIC_SHARED(shared);
    ek_key_sum(a, keys, parts, shared, ek_here());
}

static __global__ void k_key_mean(const ek_key_mean_args a, const float * parts, float * out) {
    EK_DYNAMIC_SHARED(shared);
    ek_key_mean(a, parts, out, shared, ek_here());
}

static __global__ void __launch_bounds__(1024) k_choose(const ek_choose_args a, const float * scores, int32_t * out) {
    EK_DYNAMIC_SHARED(shared);
    ek_choose(a, scores, out, shared, ek_here());
}

template <int SIZE>
static __global__ void k_compact(const ek_compact_args a, uint8_t * rows, const int32_t * chosen) {
    ek_compact<SIZE>(a, rows, chosen, ek_here());
}

static __global__ void k_summarize(const ek_summarize_args a, const uint8_t * keys, const int64_t * cells,
        uint8_t * summaries, uint32_t * counters) {
    ek_summarize(a, keys, cells, summaries, counters, ek_here());
}

static void edgekv_cuda_score(ggml_tensor * op, cudaStream_t stream) {
    const ek_score_plan p(op, ek_block_size(256));
    const float * vec = op->src[1] ? (const float *) op->src[1]->data : nullptr;
    EK_LAUNCH(k_score, dim3(p.grid.x, p.grid.y, p.grid.z), p.grid.block, p.grid.shared, stream,
            p.args, (const uint8_t *) op->src[0]->data, vec, (float *) op->data);
}

static void edgekv_cuda_key_mean(ggml_tensor * op, void * scratch, cudaStream_t stream) {
    const ek_key_mean_plan p(op);
    EK_LAUNCH(k_key_sum, dim3(p.sum.x, p.sum.y, p.sum.z), ek_block_size(p.sum.block), p.sum.shared, stream,
            p.args, (const uint8_t *) op->src[0]->data, (float *) scratch);
    EK_LAUNCH(k_key_mean, dim3(p.mean.x, p.mean.y, p.mean.z), ek_block_size(p.mean.block), p.mean.shared, stream,
            p.args, (const float *) scratch, (float *) op->data);
}

static void edgekv_cuda_choose(ggml_tensor * op, cudaStream_t stream) {
    const ek_choose_plan p(op);
    EK_LAUNCH(k_choose, dim3(p.grid.x, p.grid.y, p.grid.z), ek_block_size(p.grid.block), p.grid.shared, stream,
            p.args, (const float *) op->src[0]->data, (int32_t *) op->data);
}

template <int SIZE>
static void edgekv_launch_compact(const ek_compact_plan & p, ggml_tensor * op, cudaStream_t stream) {
    EK_LAUNCH(k_compact<SIZE>, dim3(p.grid.x, p.grid.y, p.grid.z), ek_block_size(p.grid.block), p.grid.shared, stream,
            p.args, (uint8_t *) op->data, (const int32_t *) op->src[1]->data);
}

static void edgekv_cuda_compact(ggml_tensor * op, cudaStream_t stream) {
    const ek_compact_plan p(op);
    switch (p.piece) {
        case 2:  edgekv_launch_compact< 2>(p, op, stream); break;
        case 4:  edgekv_launch_compact< 4>(p, op, stream); break;
        case 8:  edgekv_launch_compact< 8>(p, op, stream); break;
        default: edgekv_launch_compact<16>(p, op, stream); break;
    }
}

static void edgekv_cuda_summarize(ggml_tensor * op, cudaStream_t stream) {
    const ek_summarize_plan p(op, ek_block_size(128));
    if (p.grid.x == 0) {
        return;
    }
    const ggml_tensor * cells    = op->src[2];
    const ggml_tensor * counters = op->src[GGML_EDGEKV_SRC_COUNTERS];
    EK_LAUNCH(k_summarize, dim3(p.grid.x, p.grid.y, p.grid.z), p.grid.block, p.grid.shared, stream,
            p.args, (const uint8_t *) op->src[1]->data, cells ? (const int64_t *) cells->data : nullptr,
            (uint8_t *) op->data, counters ? (uint32_t *) counters->data : nullptr);
}
