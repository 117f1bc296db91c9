#include "ggml-edgekv-metal.h"

#include "ggml-edgekv.h"

#include "../gpu/args.h"
#include "../gpu/plan-ops.h"

#include <algorithm>
#include <cstdio>

namespace {

using buffer_of = ggml_metal_buffer_id (*)(const ggml_tensor *);

// behind the result, at a multiple of 16 bytes
size_t scratch_offset(const ggml_tensor * op) {
    return GGML_PAD(ggml_nbytes(op), 16);
}

// One kernel: its pipeline, then its parameters in their order, then the launch.
class launcher {
public:
    launcher(ggml_metal_library_t lib, ggml_metal_encoder_t enc, buffer_of buffer, const char * name) :
            enc(enc), buffer(buffer) {
        pipeline = ggml_metal_library_get_pipeline(lib, name);
        if (!pipeline.pipeline) {
            pipeline = ggml_metal_library_compile_pipeline(lib, name, name, nullptr);
        }
        ggml_metal_encoder_set_pipeline(enc, pipeline); // aborts if there is none
    }

    // how many threads a block can have, n at most
    uint32_t threads(uint32_t n) const {
        return std::min(n, (uint32_t) ggml_metal_pipeline_max_theads_per_threadgroup(pipeline)/32*32);
    }

    template <typename T>
    launcher & args(T & args) {
        ggml_metal_encoder_set_bytes(enc, &args, sizeof(args), 0);
        return *this;
    }

    // A tensor, or what stands in for one that is not there: a buffer must be bound, the kernel does not touch it.
    launcher & tensor(const ggml_tensor * t, const ggml_tensor * substitute = nullptr) {
        ggml_metal_encoder_set_buffer(enc, buffer(t ? t : substitute), ++n_buffers);
        return *this;
    }

    launcher & scratch(const ggml_tensor * op) {
        ggml_metal_buffer_id id = buffer(op);
        id.offs += scratch_offset(op);
        ggml_metal_encoder_set_buffer(enc, id, ++n_buffers);
        return *this;
    }

    void launch(const ek_grid & grid) {
        if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
            return;
        }
        if (grid.shared > 0) {
            ggml_metal_encoder_set_threadgroup_memory_size(enc, grid.shared, 0);
        }
        ggml_metal_encoder_dispatch_threadgroups(enc, grid.x, grid.y, grid.z, threads(grid.block), 1, 1);
    }

private:
    ggml_metal_encoder_t enc;
    buffer_of            buffer;
    int                  n_buffers = 0;

    ggml_metal_pipeline_with_params pipeline;
};

const char * type_name(int types) {
    switch (types) {
        case EK_F16:  return "f16";
        case EK_Q8_0: return "q8_0";
        case EK_Q4_0: return "q4_0";
        default:      return "any";
    }
}

} // namespace

bool ggml_edgekv_metal_supports_op(const ggml_tensor * op) {
    return ek_supports(op);
}

size_t ggml_edgekv_metal_scratch(const ggml_tensor * op) {
    const size_t size = ek_scratch(op);
    return size == 0 ? 0 : scratch_offset(op) - ggml_nbytes(op) + size;
}

void ggml_edgekv_metal_encode(
        ggml_metal_library_t lib, ggml_metal_encoder_t enc, const ggml_tensor * op, buffer_of buffer) {
    const ggml_tensor * const * src      = op->src;
    const ggml_tensor         * counters = op->src[GGML_EDGEKV_SRC_COUNTERS];

    const auto with = [&](const char * name) { return launcher(lib, enc, buffer, name); };
    char name[64];

    switch (op->op) {
        case GGML_OP_EDGEKV_SCORE:
            {
                launcher k = with("kernel_edgekv_score");
                ek_score_plan p(op, k.threads(256));
                k.args(p.args).tensor(src[0]).tensor(src[1], op).tensor(op).launch(p.grid);
            } break;
        case GGML_OP_EDGEKV_KEY_MEAN:
            {
                ek_key_mean_plan p(op);
                with("kernel_edgekv_key_sum").args(p.args).tensor(src[0]).scratch(op).launch(p.sum);
                ggml_metal_encoder_memory_barrier(enc);
                with("kernel_edgekv_key_mean").args(p.args).scratch(op).tensor(op).launch(p.mean);
            } break;
        case GGML_OP_EDGEKV_CHOOSE:
            {
                ek_choose_plan p(op);
                with("kernel_edgekv_choose").args(p.args).tensor(src[0]).tensor(op).launch(p.grid);
            } break;
        case GGML_OP_EDGEKV_COMPACT:
            {
                ek_compact_plan p(op);
                snprintf(name, sizeof(name), "kernel_edgekv_compact_%d", p.piece);
                with(name).args(p.args).tensor(op).tensor(src[1]).launch(p.grid);
            } break;
        case GGML_OP_EDGEKV_SUMMARIZE:
            {
                launcher k = with("kernel_edgekv_summarize");
                ek_summarize_plan p(op, k.threads(128));
                if (p.grid.x == 0) {
                    break; // no cells are named, and what is empty may have no buffer
                }
                k.args(p.args).tensor(src[1]).tensor(src[2], op).tensor(op).tensor(counters, op).launch(p.grid);
            } break;
        case GGML_OP_EDGEKV_PAGE_SCORES:
            {
                ek_page_scores_plan p(op);
                snprintf(name, sizeof(name), "kernel_edgekv_page_scores_%d_%d_%d",
                        p.lanes.lanes, p.lanes.channels, p.lanes.group);
                with(name).args(p.args).tensor(src[0]).tensor(src[1]).tensor(op).launch(p.grid);
            } break;
        case GGML_OP_EDGEKV_CHOOSE_PAGES:
            {
                ek_choose_pages_plan p(op);
                with("kernel_edgekv_choose_pages").args(p.args).tensor(src[0]).tensor(src[1]).scratch(op).tensor(op)
                    .tensor(counters, op).launch(p.grid);
            } break;
        case GGML_OP_EDGEKV_ATTN:
            {
                ek_attn_plan p(op);
                snprintf(name, sizeof(name), "kernel_edgekv_attn_%s_%d_%d_%d", type_name(p.types),
                        p.lanes.lanes, p.lanes.channels, p.lanes.group);
                with(name).args(p.args).tensor(src[0]).tensor(src[1]).tensor(src[2]).tensor(src[3]).tensor(src[4], op)
                    .scratch(op).launch(p.grid);
                ggml_metal_encoder_memory_barrier(enc);
                with("kernel_edgekv_attn_combine").args(p.args).scratch(op).tensor(src[5], op).tensor(op)
                    .launch(p.combine);
            } break;
        default:
            GGML_ABORT("not an operator of edgekv: %s", ggml_op_name(op->op));
    }
}
