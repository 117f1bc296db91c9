#include "ggml-edgekv-cuda.h"

#include "evict.cuh"
#include "select.cuh"

#include "../gpu/plan-ops.h"

bool ggml_edgekv_cuda_supports_op(const ggml_tensor * op) {
    return ek_supports(op);
}

size_t ggml_edgekv_cuda_scratch(const ggml_tensor * op) {
    return ek_scratch(op);
}

void ggml_edgekv_cuda_compute(ggml_tensor * op, void * scratch, cudaStream_t stream) {
    switch (op->op) {
        case GGML_OP_EDGEKV_SCORE:        edgekv_cuda_score       (op, stream);          break;
        case GGML_OP_EDGEKV_KEY_MEAN:     edgekv_cuda_key_mean    (op, scratch, stream); break;
        case GGML_OP_EDGEKV_CHOOSE:       edgekv_cuda_choose      (op, stream);          break;
        case GGML_OP_EDGEKV_COMPACT:      edgekv_cuda_compact     (op, stream);          break;
        case GGML_OP_EDGEKV_SUMMARIZE:    edgekv_cuda_summarize   (op, stream);          break;
        case GGML_OP_EDGEKV_PAGE_SCORES:  edgekv_cuda_page_scores (op, stream);          break;
        case GGML_OP_EDGEKV_CHOOSE_PAGES: edgekv_cuda_choose_pages(op, scratch, stream); break;
        case GGML_OP_EDGEKV_ATTN:         edgekv_cuda_attn        (op, scratch, stream); break;
        default:                          GGML_ABORT("not an operator of edgekv: %s", ggml_op_name(op->op));
    }
}
