#pragma once

// From an operator of selection to its launches: parameters, grid, shared memory, scratch. Plain arithmetic on the host, the
// same for both backends.

#include "args.h"
#include "plan.h"

#include "ggml.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

// how the lanes of a warp share a row, and for how many query heads at once
struct ek_lanes {
    int lanes, channels, group;
};

inline ek_lanes ek_lanes_for(int64_t head_size, int64_t group, int most) {
    ek_lanes res = { 32, 16, most/2 };
    if (head_size <= 256) {
        res = { head_size <= 64 ? 8 : head_size <= 128 ? 16 : 32, 8, most };
    }
    while (res.group/2 >= group) {
        res.group /= 2;
    }
    return res;
}

inline bool ek_head_fits(int64_t head_size) {
    return head_size % 8 == 0 && head_size <= 512;
}

// --- scores of pages -------------------------------------------------------------------------------------------------

struct ek_page_scores_plan {
    ek_page_scores_args args;
    ek_lanes lanes;
    ek_grid  grid;

    explicit ek_page_scores_plan(const ggml_tensor * op) {
        const ggml_tensor * q = op->src[0];
        const ggml_tensor * s = op->src[1];

        args.nbq1 = q->nb[1]; args.nbq2 = q->nb[2]; args.nbq3 = q->nb[3];
        args.nbs1 = s->nb[1]; args.nbs2 = s->nb[2]; args.nbs3 = s->nb[3];
        args.head_size = (int32_t) q->ne[0];
        args.group     = (int32_t) (q->ne[2]/s->ne[1]);
        args.n_head_kv = (int32_t) s->ne[1];
        args.n_pages   = (int32_t) s->ne[2];
        args.n_tokens  = (int32_t) q->ne[1];

        lanes = ek_lanes_for(q->ne[0], args.group, 4);
        grid  = { (uint32_t) ((args.n_pages + EK_PAGES_TILE - 1)/EK_PAGES_TILE), (uint32_t) args.n_head_kv,
                  (uint32_t) (q->ne[1]*q->ne[3]), 128, 0 };
    }

    static bool supports(const ggml_tensor * op) {
        const ggml_tensor * q = op->src[0];
        const ggml_tensor * s = op->src[1];
        return ek_head_fits(q->ne[0]) && s->ne[2] <= INT32_MAX && s->nb[3] % 16 == 0 && ek_grid_fits(s->ne[1], q->ne[1]*q->ne[3]);
    }
};

// --- choice of pages -------------------------------------------------------------------------------------------------

struct ek_choose_pages_plan {
    ek_choose_pages_args args;
    ek_grid grid;
    size_t  scratch; // of ranks

    explicit ek_choose_pages_plan(const ggml_tensor * op) {
        const ggml_tensor * scores = op->src[0];
        const ggml_tensor * mask   = op->src[1];

        args.nbm1 = mask->nb[1]; args.nbm3 = mask->nb[3];
        args.page_size = op->op_params[0];
        args.n_first   = op->op_params[1];
        args.n_head_kv = (int32_t) op->ne[1];
        args.n_tokens  = (int32_t) op->ne[2];
        args.n_pages   = (int32_t) scores->ne[0];
        args.n_cells   = (int32_t) mask->ne[0];
        args.n_chosen  = (int32_t) op->ne[0];
        args.counted   = op->src[GGML_MAX_SRC - 1] != nullptr;

        const uint32_t some = (uint32_t) (args.n_pages + 127)/128*32; // four pages a thread, up to the largest block
        grid    = { (uint32_t) op->ne[1], (uint32_t) (op->ne[2]*op->ne[3]), 1, std::min(1024u, std::max(64u, some)),
                    EK_CHOOSE_PAGES_SHARED };
        scratch = (size_t) op->ne[1]*op->ne[2]*op->ne[3]*args.n_pages*sizeof(uint32_t);
    }

    static bool supports(const ggml_tensor * op) {
        return op->src[0]->ne[0] <= INT32_MAX && op->src[1]->ne[0] <= INT32_MAX && ek_grid_fits(op->ne[2]*op->ne[3], 1);
    }
};

// --- attention -------------------------------------------------------------------------------------------------------

struct ek_attn_plan {
    static constexpr int64_t BLOCKS = 512; // enough for a large device, and not too many parts to put together

    ek_attn_args args;
    ek_lanes lanes;
    int      types;   // EK_F16 (both, at multiples of 16 bytes), EK_Q8_0, EK_Q4_0 (both), EK_ANY
    ek_grid  grid;
    ek_grid  combine;
    size_t   scratch; // of partial results

    explicit ek_attn_plan(const ggml_tensor * op) {
        const ggml_tensor * q     = op->src[0];
        const ggml_tensor * k     = op->src[1];
        const ggml_tensor * v     = op->src[2];
        const ggml_tensor * mask  = op->src[3];
        const ggml_tensor * pages = op->src[4];

        args.nbq1 = q->nb[1]; args.nbq2 = q->nb[2]; args.nbq3 = q->nb[3];
        args.nbk1 = k->nb[1]; args.nbk2 = k->nb[2]; args.nbk3 = k->nb[3];
        args.nbv1 = v->nb[1]; args.nbv2 = v->nb[2]; args.nbv3 = v->nb[3];
        args.nbm1 = mask->nb[1]; args.nbm3 = mask->nb[3];
        args.type_k = k->type;
        args.type_v = v->type;
        args.head_size   = (int32_t) k->ne[0];
        args.head_size_v = (int32_t) v->ne[0];
        args.group       = (int32_t) (q->ne[2]/k->ne[1]);
        args.n_head_kv   = (int32_t) k->ne[1];
        args.n_tokens    = (int32_t) q->ne[1];
        args.n_cells     = (int32_t) k->ne[2];
        args.all_pages   = pages == nullptr;
        args.page_size   = pages ? op->op_params[0] : EK_ATTN_TILE;
        args.n_listed    = (int32_t) (pages ? pages->ne[0] : (k->ne[2] + EK_ATTN_TILE - 1)/EK_ATTN_TILE);
        args.has_sinks   = op->src[5] != nullptr;
        memcpy(&args.scale,   op->op_params + 1, sizeof(float));
        memcpy(&args.softcap, op->op_params + 2, sizeof(float));

        const int64_t units = k->ne[1]*q->ne[1]*q->ne[3];
        const int64_t cells = (int64_t) args.n_listed*args.page_size;
        const int64_t parts = std::clamp<int64_t>(BLOCKS/units, 1, BLOCKS);
        args.per_part = (int32_t) (((cells + parts - 1)/parts + EK_ATTN_TILE - 1)/EK_ATTN_TILE*EK_ATTN_TILE);
        args.n_parts  = (int32_t) ((cells + args.per_part - 1)/args.per_part);

        lanes = ek_lanes_for(std::max(k->ne[0], v->ne[0]), args.group, 8);
        types = k->type != v->type ? EK_ANY : k->type == GGML_TYPE_F16 && ek_aligned(k, 16) && ek_aligned(v, 16) ? EK_F16 :
                k->type == GGML_TYPE_Q8_0 ? EK_Q8_0 : k->type == GGML_TYPE_Q4_0 ? EK_Q4_0 : EK_ANY;
        if (types == EK_ANY && lanes.group > 1) {
            lanes.group = lanes.channels == 16 ? 4 : 8; // fewer instances of what is seldom used
        }

        const int width   = lanes.lanes*lanes.channels;
        const int at_once = std::min(lanes.group, EK_ATTN_RED/width);
        const int floats  = EK_ATTN_TILE*(lanes.group + 2) + 3*lanes.group + EK_ATTN_WARPS*at_once*width;

        grid    = { (uint32_t) args.n_parts, (uint32_t) units, (uint32_t) ((args.group + lanes.group - 1)/lanes.group),
                    32*EK_ATTN_WARPS, (uint32_t) (floats*4 + 15)/16*16 };
        combine = { (uint32_t) q->ne[2], (uint32_t) (q->ne[1]*q->ne[3]), 1, (uint32_t) std::min<int64_t>(256, (v->ne[0] + 31)/32*32),
                    (uint32_t) (args.n_parts*4 + 15)/16*16 };
        scratch = (size_t) q->ne[2]*q->ne[1]*q->ne[3]*parts*(v->ne[0] + 2)*sizeof(float); // whatever the number of cells
    }

    static bool supports(const ggml_tensor * op) {
        const ggml_tensor * q     = op->src[0];
        const ggml_tensor * k     = op->src[1];
        const ggml_tensor * v     = op->src[2];
        const ggml_tensor * pages = op->src[4];
        const int64_t page_size = pages ? op->op_params[0] : EK_ATTN_TILE;
        return ek_head_fits(k->ne[0]) && ek_head_fits(v->ne[0]) && ek_type_known(k->type) && ek_type_known(v->type) &&
               ek_grid_fits(k->ne[1]*q->ne[1]*q->ne[3], q->ne[2]) && k->ne[2] <= INT32_MAX - EK_ATTN_TILE &&
               (!pages || pages->ne[0] <= (INT32_MAX - EK_ATTN_TILE)/page_size);
    }
};
