#pragma once

// Launches of page scores, choice of pages, and attention.

#include "launch.cuh"

#include "../gpu/plan-select.h"

template <int LANES, int CHANNELS, int GROUP>
static __global__ void k_page_scores(const ek_page_scores_args a, const uint8_t * q, const uint8_t * summaries, float * out) {
    ek_page_scores<LANES, CHANNELS, GROUP>(a, q, summaries, out, ek_here());
}

static __global__ void __launch_bounds__(1024) k_choose_pages(
        const ek_choose_pages_args a, const float * scores, const uint8_t * mask, uint32_t * ranks, int32_t * out, uint32_t * counters) {
    EK_DYNAMIC_SHARED(shared);
    ek_choose_pages(a, scores, mask, ranks, out, counters, shared, ek_here());
}

template <int TYPE_K, int TYPE_V, bool WIDE, int LANES, int CHANNELS, int GROUP>
static __global__ void __launch_bounds__(32*EK_ATTN_WARPS) k_attn(
        const ek_attn_args a, const uint8_t * q, const uint8_t * keys, const uint8_t * values, const uint8_t * mask,
        const int32_t * pages, float * partials) {
    EK_DYNAMIC_SHARED(shared);
    ek_attn<TYPE_K, TYPE_V, WIDE, LANES, CHANNELS, GROUP>(a, q, keys, values, mask, pages, partials, shared, ek_here());
}

static __global__ void k_attn_combine(const ek_attn_args a, const float * partials, const float * sinks, float * out) {
    EK_DYNAMIC_SHARED(shared);
    ek_attn_combine(a, partials, sinks, out, shared, ek_here());
}

template <typename T>
static T * edgekv_data(const ggml_tensor * t) {
    return t ? (T *) t->data : nullptr;
}

// --- scores of pages -------------------------------------------------------------------------------------------------

template <int LANES, int CHANNELS, int GROUP>
static void edgekv_launch_page_scores(const ek_page_scores_plan & p, ggml_tensor * op, cudaStream_t stream) {
    const auto kernel = k_page_scores<LANES, CHANNELS, GROUP>;
    EK_LAUNCH(kernel, dim3(p.grid.x, p.grid.y, p.grid.z), ek_block_size(p.grid.block), p.grid.shared, stream,
            p.args, edgekv_data<uint8_t>(op->src[0]), edgekv_data<uint8_t>(op->src[1]), edgekv_data<float>(op));
}

template <int LANES, int CHANNELS>
static void edgekv_page_scores_by_group(const ek_page_scores_plan & p, ggml_tensor * op, cudaStream_t stream) {
    switch (p.lanes.group) {
        case 1:  edgekv_launch_page_scores<LANES, CHANNELS, 1>(p, op, stream); break;
        case 2:  edgekv_launch_page_scores<LANES, CHANNELS, 2>(p, op, stream); break;
        default: edgekv_launch_page_scores<LANES, CHANNELS, CHANNELS == 16 ? 2 : 4>(p, op, stream); break;
    }
}

static void edgekv_cuda_page_scores(ggml_tensor * op, cudaStream_t stream) {
    const ek_page_scores_plan p(op);
    switch (p.lanes.lanes*p.lanes.channels) {
        case 64:  edgekv_page_scores_by_group< 8,  8>(p, op, stream); break;
        case 128: edgekv_page_scores_by_group<16,  8>(p, op, stream); break;
        case 256: edgekv_page_scores_by_group<32,  8>(p, op, stream); break;
        default:  edgekv_page_scores_by_group<32, 16>(p, op, stream); break;
    }
}

// --- choice of pages -------------------------------------------------------------------------------------------------

static void edgekv_cuda_choose_pages(ggml_tensor * op, void * scratch, cudaStream_t stream) {
    const ek_choose_pages_plan p(op);
    EK_LAUNCH(k_choose_pages, dim3(p.grid.x, p.grid.y, p.grid.z), ek_block_size(p.grid.block), p.grid.shared, stream,
            p.args, edgekv_data<float>(op->src[0]), edgekv_data<uint8_t>(op->src[1]), (uint32_t *) scratch, edgekv_data<int32_t>(op),
            edgekv_data<uint32_t>(op->src[GGML_EDGEKV_SRC_COUNTERS]));
}

// --- attention -------------------------------------------------------------------------------------------------------

template <int TYPE_K, int TYPE_V, bool WIDE, int LANES, int CHANNELS, int GROUP>
static void edgekv_launch_attn(const ek_attn_plan & p, ggml_tensor * op, float * partials, cudaStream_t stream) {
    const auto kernel = k_attn<TYPE_K, TYPE_V, WIDE, LANES, CHANNELS, GROUP>;
    EK_LAUNCH(kernel, dim3(p.grid.x, p.grid.y, p.grid.z), ek_block_size(p.grid.block), p.grid.shared, stream,
            p.args, edgekv_data<uint8_t>(op->src[0]), edgekv_data<uint8_t>(op->src[1]), edgekv_data<uint8_t>(op->src[2]),
            edgekv_data<uint8_t>(op->src[3]), edgekv_data<int32_t>(op->src[4]), partials);
}

template <int TYPE_K, int TYPE_V, bool WIDE, int LANES, int CHANNELS>
static void edgekv_attn_by_group(const ek_attn_plan & p, ggml_tensor * op, float * partials, cudaStream_t stream) {
    constexpr int  MOST = CHANNELS == 16 ? 4 : 8;
    constexpr bool ANY  = TYPE_K == EK_ANY;
    switch (p.lanes.group) {
        case 1:  edgekv_launch_attn<TYPE_K, TYPE_V, WIDE, LANES, CHANNELS, 1>(p, op, partials, stream); break;
        case 2:  edgekv_launch_attn<TYPE_K, TYPE_V, WIDE, LANES, CHANNELS, ANY ? MOST : 2>(p, op, partials, stream); break;
        case 4:  edgekv_launch_attn<TYPE_K, TYPE_V, WIDE, LANES, CHANNELS, ANY ? MOST : 4>(p, op, partials, stream); break;
        default: edgekv_launch_attn<TYPE_K, TYPE_V, WIDE, LANES, CHANNELS, MOST>(p, op, partials, stream); break;
    }
}

template <int TYPE_K, int TYPE_V, bool WIDE>
static void edgekv_attn_by_size(const ek_attn_plan & p, ggml_tensor * op, float * partials, cudaStream_t stream) {
    switch (p.lanes.lanes*p.lanes.channels) {
        case 64:  edgekv_attn_by_group<TYPE_K, TYPE_V, WIDE,  8,  8>(p, op, partials, stream); break;
        case 128: edgekv_attn_by_group<TYPE_K, TYPE_V, WIDE, 16,  8>(p, op, partials, stream); break;
        case 256: edgekv_attn_by_group<TYPE_K, TYPE_V, WIDE, 32,  8>(p, op, partials, stream); break;
        default:  edgekv_attn_by_group<TYPE_K, TYPE_V, WIDE, 32, 16>(p, op, partials, stream); break;
    }
}

static void edgekv_cuda_attn(ggml_tensor * op, void * scratch, cudaStream_t stream) {
    const ek_attn_plan p(op);
    float * partials = (float *) scratch;

    switch (p.types) {
        case EK_F16:  edgekv_attn_by_size<EK_F16,  EK_F16,  true >(p, op, partials, stream); break;
        case EK_Q8_0: edgekv_attn_by_size<EK_Q8_0, EK_Q8_0, false>(p, op, partials, stream); break;
        case EK_Q4_0: edgekv_attn_by_size<EK_Q4_0, EK_Q4_0, false>(p, op, partials, stream); break;
        default:      edgekv_attn_by_size<EK_ANY,  EK_ANY,  false>(p, op, partials, stream); break;
    }
    EK_LAUNCH(k_attn_combine, dim3(p.combine.x, p.combine.y, p.combine.z), ek_block_size(p.combine.block), p.combine.shared, stream,
            p.args, partials, edgekv_data<float>(op->src[5]), edgekv_data<float>(op));
}
