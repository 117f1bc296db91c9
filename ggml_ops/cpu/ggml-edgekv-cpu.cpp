#include "ggml-edgekv-cpu.h"

#include "ggml-edgekv-cpu-common.h"
#include "ggml-edgekv.h"

#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

namespace {

const char * row(const ggml_tensor * keys, int64_t h, int64_t t) {
    return (const char *) keys->data + h*keys->nb[1] + t*keys->nb[2];
}

float dot(int64_t n, const float * a, const float * b) {
    float s;
    ggml_vec_dot_f32((int) n, &s, 0, a, 0, b, 0, 1);
    return s;
}

void score(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * keys = dst->src[0];
    const ggml_tensor * vec  = dst->src[1];

    const auto  kind  = (ggml_edgekv_score_kind) ggml_get_op_params_i32(dst, 0);
    const float scale = ggml_get_op_params_f32(dst, 1);

    const int64_t n_embd = keys->ne[0];
    const int64_t n_head = keys->ne[1];
    const int64_t n_cell = keys->ne[2];

    float * key = (float *) ((char *) params->wdata + params->ith*(n_embd*sizeof(float) + EDGEKV_WORK_PAD));
    float * out = (float *) dst->data;

    const edgekv_range r = edgekv_share(n_cell, params);

    // cells outside, heads inside: the order in which the cache lies in memory
    for (int64_t t = r.begin; t < r.end; ++t) {
        for (int64_t h = 0; h < n_head; ++h) {
            edgekv_to_f32(keys->type, row(keys, h, t), key, n_embd);

            float s = 0.0f;
            if (kind == GGML_EDGEKV_SCORE_NORM) {
                s = sqrtf(dot(n_embd, key, key));
            } else {
                s = dot(n_embd, key, (const float *) vec->data + h*n_embd);
                if (kind == GGML_EDGEKV_SCORE_COS) {
                    const float norm = sqrtf(dot(n_embd, key, key));
                    s = norm == 0.0f ? 0.0f : s/norm;
                }
            }
            out[h*n_cell + t] = scale*s;
        }
    }
}

void key_mean(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * keys = dst->src[0];

    const int64_t n_embd = keys->ne[0];
    const int64_t n_cell = keys->ne[2];

    char   * work = (char *) params->wdata + params->ith*(n_embd*(sizeof(float) + sizeof(double)) + EDGEKV_WORK_PAD);
    double * sum  = (double *) work;
    float  * key  = (float *) (sum + n_embd);

    // one thread per head, in order and in double: the result must not depend on the number of threads
    const edgekv_range r = edgekv_share(keys->ne[1], params);

    for (int64_t h = r.begin; h < r.end; ++h) {
        std::fill(sum, sum + n_embd, 0.0);

        for (int64_t t = 0; t < n_cell; ++t) {
            edgekv_to_f32(keys->type, row(keys, h, t), key, n_embd);

            const float norm = sqrtf(dot(n_embd, key, key));
            if (norm > 0.0f) {
                const double inv = 1.0/norm;
                for (int64_t i = 0; i < n_embd; ++i) {
                    sum[i] += inv*key[i];
                }
            }
        }

        float * out = (float *) dst->data + h*n_embd;
        for (int64_t i = 0; i < n_embd; ++i) {
            out[i] = (float) (sum[i]/n_cell);
        }
    }
}

void choose(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * scores = dst->src[0];

    const int64_t n_cell   = scores->ne[0];
    const int64_t n_chosen = dst->ne[0];
    const int64_t n_keep   = ggml_get_op_params_i32(dst, 0);
    const int64_t window   = ggml_get_op_params_i32(dst, 1);

    const int64_t first  = n_keep;          // candidates are the cells [first, last)
    const int64_t last   = n_cell - window;
    const int64_t wanted = n_chosen - n_keep - window;

    uint64_t * keys = (uint64_t *) ((char *) params->wdata + params->ith*(n_cell*sizeof(uint64_t) + EDGEKV_WORK_PAD));

    const edgekv_range r = edgekv_share(dst->ne[1], params);

    for (int64_t h = r.begin; h < r.end; ++h) {
        const float * s   = (const float *) scores->data + (scores->ne[1] == 1 ? 0 : h*n_cell);
        int32_t     * out = (int32_t *) dst->data + h*n_chosen;

        for (int64_t t = 0; t < n_keep; ++t) {
            *out++ = (int32_t) t;
        }

        if (wanted > 0) {
            for (int64_t t = first; t < last; ++t) {
                keys[t - first] = edgekv_rank(s[t], t);
            }
            uint64_t * nth = keys + (wanted - 1);
            std::nth_element(keys, nth, keys + (last - first), std::greater<uint64_t>());

            const uint64_t threshold = *nth; // keys are distinct, so exactly `wanted` of them reach it
            for (int64_t t = first; t < last; ++t) {
                if (edgekv_rank(s[t], t) >= threshold) {
                    *out++ = (int32_t) t;
                }
            }
        }

        for (int64_t t = last; t < n_cell; ++t) {
            *out++ = (int32_t) t;
        }
    }
}

void compact_rows(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * chosen = dst->src[1];

    const size_t  size     = ggml_row_size(dst->type, dst->ne[0]);
    const int64_t n_chosen = chosen->ne[0];

    const edgekv_range r = edgekv_share(dst->ne[1], params);

    // chosen[i] >= i and ascending, so a forward pass never overwrites a row that is still to be read
    for (int64_t h = r.begin; h < r.end; ++h) {
        const int32_t * idx  = (const int32_t *) chosen->data + h*n_chosen;
        char          * base = (char *) dst->data + h*dst->nb[1];

        for (int64_t i = 0; i < n_chosen; ++i) {
            if (idx[i] != i) {
                memcpy(base + i*dst->nb[2], base + idx[i]*dst->nb[2], size);
            }
        }
    }
}

template <typename T>
void compact_strided(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * chosen = dst->src[1];

    const int64_t n_embd   = dst->ne[0];
    const int64_t n_chosen = chosen->ne[0];

    // a channel's values lie side by side over the cells: move one channel at a time
    const edgekv_range r = edgekv_share(n_embd*dst->ne[1], params);

    for (int64_t c = r.begin; c < r.end; ++c) {
        const int64_t h = c/n_embd;
        const int64_t e = c%n_embd;

        const int32_t * idx = (const int32_t *) chosen->data + h*n_chosen;
        T             * row = (T *) ((char *) dst->data + e*dst->nb[0] + h*dst->nb[1]);

        for (int64_t i = 0; i < n_chosen; ++i) {
            row[i] = row[idx[i]];
        }
    }
}

void compact(const ggml_compute_params * params, ggml_tensor * dst) {
    const size_t ts = ggml_type_size(dst->type);

    if (dst->nb[0] == ts) {
        compact_rows(params, dst);
    } else if (ts == sizeof(uint32_t)) {
        compact_strided<uint32_t>(params, dst);
    } else {
        compact_strided<uint16_t>(params, dst);
    }
}

} // namespace

void ggml_compute_forward_edgekv(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (dst->op) {
        case GGML_OP_EDGEKV_SCORE:    score   (params, dst); break;
        case GGML_OP_EDGEKV_KEY_MEAN: key_mean(params, dst); break;
        case GGML_OP_EDGEKV_CHOOSE:   choose  (params, dst); break;
        case GGML_OP_EDGEKV_COMPACT:  compact (params, dst); break;
        default:                      ggml_compute_forward_edgekv_select(params, dst);
    }
}

size_t ggml_edgekv_cpu_work_size(const ggml_tensor * dst, int n_tasks) {
    const ggml_tensor * src = dst->src[0];

    switch (dst->op) {
        case GGML_OP_EDGEKV_SCORE:    return n_tasks*(src->ne[0]*sizeof(float) + EDGEKV_WORK_PAD);
        case GGML_OP_EDGEKV_KEY_MEAN: return n_tasks*(src->ne[0]*(sizeof(float) + sizeof(double)) + EDGEKV_WORK_PAD);
        case GGML_OP_EDGEKV_CHOOSE:   return n_tasks*(src->ne[0]*sizeof(uint64_t) + EDGEKV_WORK_PAD);
        case GGML_OP_EDGEKV_COMPACT:  return 0;
        default:                      return ggml_edgekv_cpu_select_work_size(dst, n_tasks);
    }
}

bool ggml_edgekv_cpu_supports_op(const ggml_tensor * op) {
    const ggml_type type = op->src[0]->type;

    switch (op->op) {
        case GGML_OP_EDGEKV_SCORE:
        case GGML_OP_EDGEKV_KEY_MEAN:
            return edgekv_converts(type);
        case GGML_OP_EDGEKV_COMPACT:
            // strided rows are moved as 16- or 32-bit words
            return op->nb[0] == ggml_type_size(type) || ggml_type_size(type) == 2 || ggml_type_size(type) == 4;
        case GGML_OP_EDGEKV_CHOOSE:
            return true;
        default:
            return ggml_edgekv_cpu_select_supports_op(op);
    }
}
