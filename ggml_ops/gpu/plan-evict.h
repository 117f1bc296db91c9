#pragma once

// From an operator of eviction, or SUMMARIZE, to its launches: parameters, grid, shared memory, scratch. Plain
// arithmetic on the host, the same for both backends.

#include "args.h"
#include "plan.h"

#include "ggml.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

// keys whose rows ek_load8_any reads
inline bool ek_keys_fit(const ggml_tensor * keys) {
    const size_t unit = keys->type == GGML_TYPE_F32 ? 4 : 2;
    return ek_type_known(keys->type) && keys->ne[0] % 8 == 0 &&
           keys->ne[2] <= INT32_MAX && ek_grid_fits(keys->ne[1], keys->ne[3]) &&
           keys->nb[1] % unit == 0 && keys->nb[2] % unit == 0 && keys->nb[3] % unit == 0 && keys->view_offs % unit == 0;
}

// blocks of so many threads for n items, each of them a warp's work
inline uint32_t ek_blocks(uint32_t n, uint32_t block) {
    const uint32_t warps = block/32;
    return n/warps + (n % warps != 0);
}

// --- scores ----------------------------------------------------------------------------------------------------------

struct ek_score_plan {
    ek_score_args args;
    ek_grid grid;

    explicit ek_score_plan(const ggml_tensor * op, uint32_t threads = 256) {
        const ggml_tensor * keys = op->src[0];

        args.nb1 = keys->nb[1];
        args.nb2 = keys->nb[2];
        args.type = keys->type;
        args.kind = op->op_params[0];
        args.head_size = (int32_t) keys->ne[0];
        args.n_cells   = (int32_t) keys->ne[2];
        memcpy(&args.scale, op->op_params + 1, sizeof(float));

        grid = { ek_blocks(args.n_cells, threads), (uint32_t) keys->ne[1], 1, threads, 0 };
    }

    static bool supports(const ggml_tensor * op) { return ek_keys_fit(op->src[0]); }
};

// --- mean of the keys ------------------------------------------------------------------------------------------------

struct ek_key_mean_plan {
    ek_key_mean_args args;
    ek_grid sum;
    ek_grid mean;
    size_t  scratch; // of parts; it depends on the result alone, since a client of RPC asks for it by that

    explicit ek_key_mean_plan(const ggml_tensor * op) {
        const ggml_tensor * keys = op->src[0];

        args.nb1 = keys->nb[1];
        args.nb2 = keys->nb[2];
        args.type = keys->type;
        args.head_size = (int32_t) keys->ne[0];
        args.n_head_kv = (int32_t) keys->ne[1];
        args.n_cells   = (int32_t) keys->ne[2];

        const int64_t cells = std::max<int64_t>(64, (keys->ne[2] + EK_MEAN_PARTS - 1)/EK_MEAN_PARTS);
        args.per_part = (int32_t) ((cells + EK_SUM_STRIPES - 1)/EK_SUM_STRIPES*EK_SUM_STRIPES);
        args.n_parts  = (int32_t) ((keys->ne[2] + args.per_part - 1)/args.per_part);

        sum     = { (uint32_t) args.n_parts, (uint32_t) args.n_head_kv, 1, 256, EK_SUM_SHARED };
        mean    = { 1, (uint32_t) args.n_head_kv, 1, 512, EK_MEAN_SHARED };
        scratch = (size_t) op->ne[0]*op->ne[1]*EK_MEAN_PARTS*sizeof(float);
    }

    static bool supports(const ggml_tensor * op) { return ek_keys_fit(op->src[0]); }
};

// --- choice of cells -------------------------------------------------------------------------------------------------

struct ek_choose_plan {
    ek_choose_args args;
    ek_grid grid;

    explicit ek_choose_plan(const ggml_tensor * op) {
        const ggml_tensor * scores = op->src[0];

        args.n_cells  = (int32_t) scores->ne[0];
        args.n_chosen = (int32_t) op->ne[0];
        args.n_keep   = op->op_params[0];
        args.window   = op->op_params[1];
        args.per_head = scores->ne[1] > 1;

        grid = { (uint32_t) op->ne[1], 1, 1, 1024, EK_CHOOSE_SHARED };
    }

    static bool supports(const ggml_tensor * op) { return op->ne[1] <= INT32_MAX; }
};

// --- the row move ----------------------------------------------------------------------------------------------------

struct ek_compact_plan {
    ek_compact_args args;
    int     piece; // bytes
    ek_grid grid;

    explicit ek_compact_plan(const ggml_tensor * op) {
        const size_t size = ggml_type_size(op->type);

        args.nb_head  = op->nb[1];
        args.nb_row   = op->nb[2];
        args.n_chosen = (int32_t) op->src[1]->ne[0];

        if (op->nb[0] == size) {
            const size_t bytes = row_bytes(op);

            piece = 16;
            while (piece > 2 && (bytes | op->nb[1] | op->nb[2] | (uintptr_t) op->data) % piece != 0) {
                piece /= 2;
            }
            args.nb_piece = piece;
            args.n_pieces = (int32_t) (bytes/piece);
            // as much of a row as memory hands out at once, or half of that if it takes that many blocks to be quick
            args.slice = (int32_t) (op->ne[1]*bytes >= 64*128 ? 64 : 32)/piece;
        } else {
            // the cells of a channel lie side by side
            piece = (int) size;
            args.nb_piece = op->nb[0];
            args.n_pieces = (int32_t) op->ne[0];
            args.slice = 1;
        }
        args.slice = std::min(args.slice, EK_COMPACT_SLICE);

        grid = { (uint32_t) ((args.n_pieces + args.slice - 1)/args.slice), (uint32_t) op->ne[1], 1, 512, 0 };
    }

    static bool supports(const ggml_tensor * op) {
        const size_t size = ggml_type_size(op->type);
        if (!ek_grid_fits(op->ne[1], 1) || op->ne[2] > INT32_MAX || row_bytes(op) > INT32_MAX) {
            return false;
        }
        if (op->nb[0] == size) {
            return row_bytes(op) % 2 == 0 && op->nb[1] % 2 == 0 && op->nb[2] % 2 == 0 && op->view_offs % 2 == 0;
        }
        return (size == 2 || size == 4) && op->nb[0] % size == 0 && op->nb[1] % size == 0 && op->view_offs % size == 0;
    }

private:
    static size_t row_bytes(const ggml_tensor * op) {
        return ggml_type_size(op->type)*(op->ne[0]/ggml_blck_size(op->type));
    }
};

// --- summaries -------------------------------------------------------------------------------------------------------

struct ek_summarize_plan {
    ek_summarize_args args;
    ek_grid grid; // x is 0 where nothing is named

    explicit ek_summarize_plan(const ggml_tensor * op, uint32_t threads = 128) {
        const ggml_tensor * keys  = op->src[1];
        const ggml_tensor * cells = op->src[2];

        args.nb1  = keys->nb[1]; args.nb2  = keys->nb[2]; args.nb3  = keys->nb[3];
        args.nbs1 = op->nb[1];   args.nbs2 = op->nb[2];   args.nbs3 = op->nb[3];
        args.type = keys->type;
        args.head_size = (int32_t) keys->ne[0];
        args.n_cells   = (int32_t) keys->ne[2];
        args.n_named   = cells ? (int32_t) cells->ne[0] : 0;
        args.page_size = op->op_params[0];
        args.counted   = op->src[GGML_MAX_SRC - 1] != nullptr;

        const int64_t n = cells ? cells->ne[0] : (keys->ne[2] + args.page_size - 1)/args.page_size;
        const int64_t z = cells ? 1 : keys->ne[3];
        grid = { ek_blocks((uint32_t) n, threads), (uint32_t) keys->ne[1], (uint32_t) z, threads, 0 };
    }

    static bool supports(const ggml_tensor * op) {
        return ek_keys_fit(op->src[1]) && (!op->src[2] || op->src[2]->ne[0] <= INT32_MAX);
    }
};
