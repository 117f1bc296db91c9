#pragma once

// What is asked of any operator, whichever plan is its own.

#include "plan-evict.h"
#include "plan-select.h"

// Asked before anything has memory. What it says yes to cannot fail later; an operator in place has no other backend.
inline bool ek_supports(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_EDGEKV_SCORE:        return ek_score_plan       ::supports(op);
        case GGML_OP_EDGEKV_KEY_MEAN:     return ek_key_mean_plan    ::supports(op);
        case GGML_OP_EDGEKV_CHOOSE:       return ek_choose_plan      ::supports(op);
        case GGML_OP_EDGEKV_COMPACT:      return ek_compact_plan     ::supports(op);
        case GGML_OP_EDGEKV_SUMMARIZE:    return ek_summarize_plan   ::supports(op);
        case GGML_OP_EDGEKV_PAGE_SCORES:  return ek_page_scores_plan ::supports(op);
        case GGML_OP_EDGEKV_CHOOSE_PAGES: return ek_choose_pages_plan::supports(op);
        case GGML_OP_EDGEKV_ATTN:         return ek_attn_plan        ::supports(op);
        default:                          return false;
    }
}

// bytes of device memory that the operator needs while it runs
inline size_t ek_scratch(const ggml_tensor * op) {
    switch (op->op) {
        case GGML_OP_EDGEKV_KEY_MEAN:     return ek_key_mean_plan    (op).scratch;
        case GGML_OP_EDGEKV_CHOOSE_PAGES: return ek_choose_pages_plan(op).scratch;
        case GGML_OP_EDGEKV_ATTN:         return ek_attn_plan        (op).scratch;
        default:                          return 0;
    }
}
