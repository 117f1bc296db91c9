// Kernels of selection. They wait for memory, not for arithmetic: each row of K and V is read once for all query heads of
// its KV head, the next page is fetched while one is computed, and the work is cut into parts of a fixed number of cells,
// so that a model with one or two KV heads still uses all threads and results do not depend on how many there are.

#include "ggml-edgekv-cpu.h"

#include "ggml-edgekv-cpu-common.h"
#include "ggml-edgekv.h"

#include "simd-mappings.h"
#include "vec.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>

namespace {

constexpr int64_t PARTS = 8;  // into which the work of a KV head is cut, of PART_MIN to PART_MAX cells
constexpr int64_t PART_MIN = 64;
constexpr int64_t PART_MAX = 512;
constexpr int64_t AHEAD = 32; // cells that are fetched before their turn
constexpr int64_t PAGES = 8;  // that are scored at once
constexpr int64_t MAX_GROUP = 512; // query heads of a KV head
constexpr float   INF   = std::numeric_limits<float>::infinity();

// --- counters --------------------------------------------------------------------------------------------------------

// NULL without; the kernels' threads add at the same time
std::atomic<int64_t> * counters(const ggml_tensor * dst) {
    static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t), "counters are plain numbers");

    const ggml_tensor * t = dst->src[GGML_EDGEKV_SRC_COUNTERS];
    return t ? (std::atomic<int64_t> *) t->data : nullptr;
}

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// --- elements of rows ------------------------------------------------------------------------------------------------

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE)
#define EDGEKV_SIMD
constexpr int64_t WIDTH = GGML_F32_EPR;
using vec = GGML_F32_VEC;

inline vec load(const float * p) { return GGML_F32_VEC_LOAD(p); }

#if defined(GGML_F32Cx16_LOAD)
inline vec load(const ggml_fp16_t * p) { return GGML_F32Cx16_LOAD((const __m256i *) p); }
#elif defined(GGML_F32Cx8_LOAD) && defined(__F16C__)
inline vec load(const ggml_fp16_t * p) { return GGML_F32Cx8_LOAD(p); }
#elif defined(GGML_F32Cx4_LOAD) && defined(__ARM_NEON)
inline vec load(const ggml_fp16_t * p) { return GGML_F32Cx4_LOAD((const __fp16 *) p); }
#else
inline vec load(const ggml_fp16_t * p) {
    float x[WIDTH];
    for (int64_t i = 0; i < WIDTH; ++i) {
        x[i] = GGML_CPU_FP16_TO_FP32(p[i]);
    }
    return load(x);
}
#endif

// the sums of four vectors at once
inline void sums(vec a, vec b, vec c, vec d, float * out) {
#if defined(__AVX512F__) || defined(__AVX__)
#if defined(__AVX512F__)
    const auto half = [](__m512 x) {
        return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    };
#else
    const auto half = [](__m256 x) { return x; };
#endif
    const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(half(a), half(b)), _mm256_hadd_ps(half(c), half(d)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#else
    const auto sum = [](vec v) {
        float x[WIDTH];
        GGML_F32_VEC_STORE(x, v);
        float res = 0.0f;
        for (int64_t j = 0; j < WIDTH; ++j) {
            res += x[j];
        }
        return res;
    };
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
#endif
}
#endif

// small arrays of vectors stay in registers only if the loops over them are unrolled
#if defined(__clang__)
#define EDGEKV_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define EDGEKV_UNROLL _Pragma("GCC unroll 16")
#else
#define EDGEKV_UNROLL
#endif

// rows and vectors of a row that are worked on at once, so that there are registers for them
#if defined(__AVX512F__)
constexpr int ROWS[]  = { 0, 4, 4, 4, 4 }; // by the number of query heads
constexpr int COLUMNS = 4;
#else
constexpr int ROWS[]  = { 0, 4, 4, 2, 2 };
constexpr int COLUMNS = 2;
#endif

inline float to_float(float x)       { return x; }
inline float to_float(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }

// Rows that will be needed soon. They are asked for a few at a time while others are computed: a burst of requests would
// make the core wait for its own line buffers.
inline void prefetch(const char * p) {
    __builtin_prefetch(p, 0, 2); // not into the first level: its line buffers are few
    __asm__ volatile("" : : "r"(p)); // gcc drops calls of functions that only prefetch: they seem to do nothing
}

struct ahead {
    const char * rows = nullptr;
    size_t       nb   = 0;
    size_t       size = 0; // of a row
    int64_t      n    = 0;

    void row(int64_t r) const {
        if (r < n) {
            for (size_t i = 0; i < size; i += 64) {
                prefetch(rows + r*nb + i);
            }
        }
    }
    // a part of it
    void lines(int64_t r, size_t begin, size_t length) const {
        if (r < n) {
            for (size_t i = begin; i < begin + length; i += 64) {
                prefetch(rows + r*nb + i);
            }
        }
    }
};

// out[j*stride + r] = <row r, q[j]> for N query heads and R rows: enough sums at once to keep the units busy
template <int N, int R, typename T>
inline void dots(const char * rows, size_t nb, const float * const * q, int64_t n, float * out, int64_t stride) {
    constexpr int M = (N*R + 3)/4*4;

    int64_t i = 0;
    float   res[M];

#ifdef EDGEKV_SIMD
    vec acc[M];
    EDGEKV_UNROLL
    for (int j = 0; j < M; ++j) {
        acc[j] = GGML_F32_VEC_ZERO;
    }
    for (; i + WIDTH <= n; i += WIDTH) {
        vec x[R];
        EDGEKV_UNROLL
        for (int r = 0; r < R; ++r) {
            x[r] = load((const T *) (rows + r*nb) + i);
        }
        EDGEKV_UNROLL
        for (int j = 0; j < N; ++j) {
            const vec y = load(q[j] + i);
            EDGEKV_UNROLL
            for (int r = 0; r < R; ++r) {
                acc[j*R + r] = GGML_F32_VEC_FMA(acc[j*R + r], x[r], y);
            }
        }
    }
    EDGEKV_UNROLL
    for (int j = 0; j < M; j += 4) {
        sums(acc[j], acc[j + 1], acc[j + 2], acc[j + 3], res + j);
    }
#else
    std::fill(res, res + M, 0.0f);
#endif
    for (; i < n; ++i) {
        for (int j = 0; j < N; ++j) {
            for (int r = 0; r < R; ++r) {
                res[j*R + r] += to_float(((const T *) (rows + r*nb))[i])*q[j][i];
            }
        }
    }
    EDGEKV_UNROLL
    for (int j = 0; j < N; ++j) {
        EDGEKV_UNROLL
        for (int r = 0; r < R; ++r) {
            out[j*stride + r] = res[j*R + r];
        }
    }
}

// N query heads against any number of rows
template <int N, typename T>
void dots_some(const char * rows, size_t nb, int64_t n_rows, const float * const * q, int64_t n, float * out, int64_t stride, const ahead & next) {
    constexpr int R = ROWS[N];

    int64_t r = 0;
    for (; r + R <= n_rows; r += R) {
        for (int i = 0; i < R; ++i) {
            next.row(r + i);
        }
        dots<N, R, T>(rows + r*nb, nb, q, n, out + r, stride);
    }
    for (; r < n_rows; ++r) {
        dots<N, 1, T>(rows + r*nb, nb, q, n, out + r, stride);
    }
}

// all query heads of a group
template <typename T>
void dots_all(const char * rows, size_t nb, int64_t n_rows, const float * const * q, int64_t n_q, int64_t n, float * out, int64_t stride, const ahead & next) {
    int64_t j = 0;
    for (; j + 4 <= n_q; j += 4) {
        dots_some<4, T>(rows, nb, n_rows, q + j, n, out + j*stride, stride, j == 0 ? next : ahead());
    }
    switch (n_q - j) {
        case 3: dots_some<3, T>(rows, nb, n_rows, q + j, n, out + j*stride, stride, j == 0 ? next : ahead()); break;
        case 2: dots_some<2, T>(rows, nb, n_rows, q + j, n, out + j*stride, stride, j == 0 ? next : ahead()); break;
        case 1: dots_some<1, T>(rows, nb, n_rows, q + j, n, out + j*stride, stride, j == 0 ? next : ahead()); break;
        default: break;
    }
}

// acc[j] += sum over the rows of weight[j*stride + r]*row[r] for N query heads
template <int N, typename T>
void add_rows(const char * rows, size_t nb, int64_t n_rows, const float * weight, int64_t stride, float * acc, int64_t n, const ahead & next) {
    int64_t i = 0;
#ifdef EDGEKV_SIMD
    const auto columns = [&](auto width) {
        constexpr int C = decltype(width)::value; // vectors of a row at once

        for (; i + C*WIDTH <= n; i += C*WIDTH) {
            vec a[N][C];
            EDGEKV_UNROLL
            for (int j = 0; j < N; ++j) {
                EDGEKV_UNROLL
                for (int c = 0; c < C; ++c) {
                    a[j][c] = load(acc + j*n + i + c*WIDTH);
                }
            }
            for (int64_t r = 0; r < n_rows; ++r) {
                const T * row = (const T *) (rows + r*nb) + i;
                vec x[C];
                EDGEKV_UNROLL
                for (int c = 0; c < C; ++c) {
                    x[c] = load(row + c*WIDTH);
                }
                next.lines(r, i*sizeof(T), C*WIDTH*sizeof(T));
                EDGEKV_UNROLL
                for (int j = 0; j < N; ++j) {
                    const vec w = GGML_F32_VEC_SET1(weight[j*stride + r]);
                    EDGEKV_UNROLL
                    for (int c = 0; c < C; ++c) {
                        a[j][c] = GGML_F32_VEC_FMA(a[j][c], x[c], w);
                    }
                }
            }
            EDGEKV_UNROLL
            for (int j = 0; j < N; ++j) {
                EDGEKV_UNROLL
                for (int c = 0; c < C; ++c) {
                    GGML_F32_VEC_STORE(acc + j*n + i + c*WIDTH, a[j][c]);
                }
            }
        }
    };
    columns(std::integral_constant<int, COLUMNS>());
    columns(std::integral_constant<int, 1>());
#else
    GGML_UNUSED(next);
#endif
    for (; i < n; ++i) {
        for (int64_t r = 0; r < n_rows; ++r) {
            const float x = to_float(((const T *) (rows + r*nb))[i]);
            for (int j = 0; j < N; ++j) {
                acc[j*n + i] += weight[j*stride + r]*x;
            }
        }
    }
}

template <typename T>
void add_rows_all(const char * rows, size_t nb, int64_t n_rows, const float * weight, int64_t stride, float * acc, int64_t n, int64_t n_q, ahead next) {
    int64_t j = 0;
    for (; j + 4 <= n_q; j += 4) {
        add_rows<4, T>(rows, nb, n_rows, weight + j*stride, stride, acc + j*n, n, next);
        next.n = 0;
    }
    switch (n_q - j) {
        case 3: add_rows<3, T>(rows, nb, n_rows, weight + j*stride, stride, acc + j*n, n, next); break;
        case 2: add_rows<2, T>(rows, nb, n_rows, weight + j*stride, stride, acc + j*n, n, next); break;
        case 1: add_rows<1, T>(rows, nb, n_rows, weight + j*stride, stride, acc + j*n, n, next); break;
        default: break;
    }
}

// --- summaries -------------------------------------------------------------------------------------------------------

// the least f16 that is not below x
ggml_fp16_t round_up(float x) {
    uint16_t u = GGML_CPU_FP32_TO_FP16(x);
    if (GGML_CPU_FP16_TO_FP32(u) < x) {
        u = u == 0x8000 ? 1 : (u & 0x8000) ? u - 1 : u + 1;
    }
    return u;
}

ggml_fp16_t round_down(float x) {
    return round_up(-x) ^ 0x8000;
}

void summarize(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * keys  = dst->src[1];
    const ggml_tensor * cells = dst->src[2];

    const int64_t page_size = ggml_get_op_params_i32(dst, 0);
    const int64_t n         = keys->ne[0];
    const int64_t n_cells   = keys->ne[2];
    const int64_t n_pages   = (n_cells + page_size - 1)/page_size; // with keys; the summaries may have room for more

    float * lo  = (float *) ((char *) params->wdata + params->ith*(3*n*sizeof(float) + EDGEKV_WORK_PAD));
    float * hi  = lo + n;
    float * key = hi + n;

    // a head of a page belongs to one thread, however often the page is named
    const auto page = [&](int64_t s, int64_t p) {
        const int64_t last = std::min(n_cells, (p + 1)*page_size);

        for (int64_t h = 0; h < keys->ne[1]; ++h) {
            if (((s*n_pages + p)*keys->ne[1] + h) % params->nth != params->ith) {
                continue;
            }
            std::fill(lo, lo + n,  INF);
            std::fill(hi, hi + n, -INF);

            for (int64_t c = p*page_size; c < last; ++c) {
                edgekv_to_f32(keys->type, (const char *) keys->data + h*keys->nb[1] + c*keys->nb[2] + s*keys->nb[3], key, n);
                for (int64_t i = 0; i < n; ++i) {
                    lo[i] = key[i] >= lo[i] ? lo[i] : key[i]; // a NaN gets in ...
                    hi[i] = key[i] <= hi[i] ? hi[i] : key[i];
                    lo[i] = lo[i] == lo[i] ? lo[i] : -INF;    // ... and becomes the bound that says nothing
                    hi[i] = hi[i] == hi[i] ? hi[i] :  INF;
                }
            }

            auto * out = (ggml_fp16_t *) ((char *) dst->data + h*dst->nb[1] + p*dst->nb[2] + s*dst->nb[3]);
            for (int64_t i = 0; i < n; ++i) {
                out[i]     = round_up(hi[i]);
                out[n + i] = round_down(lo[i]);
            }
        }
    };

    if (cells) {
        int64_t before = -1;
        for (int64_t i = 0; i < cells->ne[0]; ++i) {
            const int64_t c = ((const int64_t *) cells->data)[i];
            const int64_t s = c/n_cells;
            const int64_t p = (c%n_cells)/page_size;
            const int64_t id = s*n_pages + p;
            if (id != before) {
                page(s, p);
            }
            before = id;
        }
    } else {
        for (int64_t id = 0; id < n_pages*keys->ne[3]; ++id) {
            page(id/n_pages, id%n_pages);
        }
    }
}

// --- scores of pages -------------------------------------------------------------------------------------------------

void page_scores(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q         = dst->src[0];
    const ggml_tensor * summaries = dst->src[1];

    const int64_t n         = q->ne[0];
    const int64_t n_tokens  = q->ne[1];
    const int64_t n_head    = q->ne[2];
    const int64_t n_stream  = q->ne[3];
    const int64_t n_head_kv = summaries->ne[1];
    const int64_t n_pages   = summaries->ne[2];
    const int64_t group     = n_head/n_head_kv;

    // <[q+, q-], [max, min]> is the bound: no comparison in the loop
    float * split  = (float *) ((char *) params->wdata + params->ith*((n_head*2*n + group*PAGES)*sizeof(float) + EDGEKV_WORK_PAD));
    float * scores = split + n_head*2*n;

    const float * heads[MAX_GROUP];

    const edgekv_range r = edgekv_share(n_pages, params);

    for (int64_t s = 0; s < n_stream; ++s) {
        for (int64_t t = 0; t < n_tokens; ++t) {
            for (int64_t h = 0; h < n_head; ++h) {
                const float * src = (const float *) ((const char *) q->data + t*q->nb[1] + h*q->nb[2] + s*q->nb[3]);
                float * out = split + h*2*n;
                for (int64_t i = 0; i < n; ++i) {
                    out[i]     = std::max(src[i], 0.0f);
                    out[n + i] = std::min(src[i], 0.0f);
                }
            }

            // a few pages at once, all their heads: the order in which they lie in memory
            for (int64_t p = r.begin; p < r.end; p += PAGES) {
                const int64_t n_rows = std::min(PAGES, r.end - p);

                for (int64_t h = 0; h < n_head_kv; ++h) {
                    const char * x = (const char *) summaries->data + h*summaries->nb[1] + p*summaries->nb[2] + s*summaries->nb[3];
                    for (int64_t j = 0; j < group; ++j) {
                        heads[j] = split + (h*group + j)*2*n;
                    }
                    ahead next = { x + summaries->nb[1], summaries->nb[2], 2*n*sizeof(ggml_fp16_t), n_rows };
                    if (h + 1 == n_head_kv) {
                        next.rows = (const char *) summaries->data + (p + n_rows)*summaries->nb[2] + s*summaries->nb[3];
                        next.n    = std::min(PAGES, r.end - (p + n_rows));
                    }
                    dots_all<ggml_fp16_t>(x, summaries->nb[2], n_rows, heads, group, 2*n, scores, PAGES, next);

                    float * out = (float *) dst->data + p + n_pages*(h + n_head_kv*(t + n_tokens*s));
                    for (int64_t i = 0; i < n_rows; ++i) {
                        float best = -INF;
                        for (int64_t j = 0; j < group; ++j) {
                            const float x = scores[j*PAGES + i];
                            best = x <= best ? best : x == x ? x : INF; // an infinite bound times 0: nothing is known
                        }
                        out[i] = best;
                    }
                }
            }
        }
    }
}

// --- choice of pages -------------------------------------------------------------------------------------------------

bool visible(const ggml_fp16_t * mask, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        if (mask[i] != 0xFC00) { // -inf
            return true;
        }
    }
    return false;
}

// The rank of the last one among the `wanted` highest, and how many equal to it are wanted too. Ranks of one step lie
// close together: counted in bins between the least and the greatest, only those in one bin have to be sorted.
std::pair<uint32_t, int64_t> last_wanted(const uint32_t * rank, int64_t n, int64_t wanted, uint32_t * scratch) {
    constexpr int BITS = 10;

    const auto [lo, hi] = std::minmax_element(rank, rank + n);
    const uint32_t least = *lo;
    int shift = 0;
    while ((*hi - least) >> shift >> BITS) {
        ++shift;
    }

    int32_t bins[1 << BITS] = {};
    for (int64_t i = 0; i < n; ++i) {
        ++bins[(rank[i] - least) >> shift];
    }
    uint32_t bin = (1 << BITS) - 1;
    while (bins[bin] < wanted) {
        wanted -= bins[bin--];
    }

    uint32_t * end = std::copy_if(rank, rank + n, scratch, [&](uint32_t x) { return (x - least) >> shift == bin; });
    std::nth_element(scratch, scratch + (wanted - 1), end, std::greater<uint32_t>());
    const uint32_t last = scratch[wanted - 1];

    return { last, std::count(scratch, scratch + wanted, last) };
}

void choose_pages(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * scores = dst->src[0];
    const ggml_tensor * mask   = dst->src[1];

    const int64_t page_size = ggml_get_op_params_i32(dst, 0);
    const int64_t n_first   = ggml_get_op_params_i32(dst, 1);
    const int64_t n_chosen  = dst->ne[0];
    const int64_t n_head_kv = dst->ne[1];
    const int64_t n_tokens  = dst->ne[2];
    const int64_t n_pages   = scores->ne[0];
    const int64_t n_cells   = mask->ne[0];

    int32_t  * seen    = (int32_t *) ((char *) params->wdata + params->ith*(n_pages*3*sizeof(int32_t) + EDGEKV_WORK_PAD));
    uint32_t * rank    = (uint32_t *) (seen + n_pages);
    uint32_t * scratch = rank + n_pages;

    // consecutive heads of one token share what is visible
    const edgekv_range r = edgekv_share(n_head_kv*n_tokens*dst->ne[3], params);
    int64_t n_seen = 0;

    int64_t chosen_sum = 0;
    int64_t seen_sum   = 0;

    for (int64_t item = r.begin; item < r.end; ++item) {
        const int64_t ts = item/n_head_kv; // token + n_tokens*stream

        if (item == r.begin || item % n_head_kv == 0) {
            const auto * m = (const ggml_fp16_t *) ((const char *) mask->data + (ts%n_tokens)*mask->nb[1] + (ts/n_tokens)*mask->nb[3]);
            n_seen = 0;
            for (int64_t p = 0; p < n_pages && p*page_size < n_cells; ++p) {
                if (visible(m + p*page_size, std::min(page_size, n_cells - p*page_size))) {
                    seen[n_seen++] = (int32_t) p;
                }
            }
        }

        const float * score = (const float *) scores->data + item*n_pages;
        int32_t     * out   = (int32_t *) dst->data + item*n_chosen;

        chosen_sum += std::min(n_seen, n_chosen);
        seen_sum   += n_seen;

        if (n_seen <= n_chosen) {
            std::copy(seen, seen + n_seen, out);
            std::fill(out + n_seen, out + n_chosen, -1);
            continue;
        }

        out = std::copy(seen, seen + n_first, out);

        // of those between, all that rank above the one that ranks last among the wanted, and the latest of its equals
        const int64_t wanted = n_chosen - n_first - 1;
        if (wanted > 0) {
            const int32_t * between = seen + n_first;
            const int64_t   n       = n_seen - n_first - 1;
            for (int64_t i = 0; i < n; ++i) {
                rank[i] = edgekv_rank(score[between[i]]);
            }
            const auto [last, n_last] = last_wanted(rank, n, wanted, scratch);

            int64_t to_skip = std::count(rank, rank + n, last) - n_last;
            for (int64_t i = 0; i < n; ++i) {
                if (rank[i] > last || (rank[i] == last && to_skip-- <= 0)) {
                    *out++ = between[i];
                }
            }
        }
        *out = seen[n_seen - 1];
    }

    if (auto * c = counters(dst)) {
        c[2] += chosen_sum;
        c[3] += seen_sum;
    }
}

// --- attention -------------------------------------------------------------------------------------------------------

struct attention {
    const ggml_tensor * q;
    const ggml_tensor * k;
    const ggml_tensor * v;
    const ggml_tensor * mask;
    const ggml_tensor * pages;
    const ggml_tensor * sinks;
    const ggml_tensor * dst;

    int64_t page_size;
    float   scale;
    float   softcap;

    int64_t n_k, n_v;
    int64_t n_cells, n_tokens, n_head, n_head_kv, n_stream, group;
    int64_t n_listed;  // pages per token and KV head
    int64_t per_part;  // of them in a part
    int64_t ahead;     // of them to be fetched before their turn
    int64_t n_parts;

    explicit attention(const ggml_tensor * t) :
        q(t->src[0]), k(t->src[1]), v(t->src[2]), mask(t->src[3]), pages(t->src[4]), sinks(t->src[5]), dst(t),
        page_size(pages ? ggml_get_op_params_i32(t, 0) : 16),
        scale(ggml_get_op_params_f32(t, 1)), softcap(ggml_get_op_params_f32(t, 2)),
        n_k(k->ne[0]), n_v(v->ne[0]), n_cells(k->ne[2]), n_tokens(q->ne[1]), n_head(q->ne[2]), n_head_kv(k->ne[1]),
        n_stream(q->ne[3]), group(n_head/n_head_kv) {
        n_listed = pages ? pages->ne[0] : (n_cells + page_size - 1)/page_size;
        per_part = std::max<int64_t>(1, std::clamp(n_listed*page_size/PARTS, PART_MIN, PART_MAX)/page_size);
        ahead    = std::max<int64_t>(1, AHEAD/page_size);
        n_parts  = (n_listed + per_part - 1)/per_part;
    }

    int64_t n_units() const { return n_head_kv*n_tokens*n_stream; }

    // a part's result: per query head the greatest score, the sum of the exponentials, and the weighted rows
    int64_t partial() const { return group*(n_v + 2); }

    // scores of a part, the mask of a page, and its rows where they must be converted
    int64_t scratch() const { return group*per_part*page_size + page_size*(1 + std::max(n_k, n_v)); }

    size_t work_size(int n_tasks) const {
        return n_units()*n_parts*partial()*sizeof(float) + n_tasks*(scratch()*sizeof(float) + EDGEKV_WORK_PAD) + EDGEKV_WORK_PAD;
    }
};

// rows of a page as T, converted if they are something else
template <typename T>
const char * as(const ggml_tensor * x, const char * rows, int64_t n_rows, float * scratch, size_t & nb) {
    nb = x->nb[2];
    if (sizeof(T) == sizeof(float) && x->type != GGML_TYPE_F32) {
        for (int64_t r = 0; r < n_rows; ++r) {
            edgekv_to_f32(x->type, rows + r*nb, scratch + r*x->ne[0], x->ne[0]);
        }
        nb = x->ne[0]*sizeof(float);
        return (const char *) scratch;
    }
    return rows;
}

// a part of the cells of one KV head, token and stream: a unit
struct piece {
    const attention & a;

    int64_t h, t, s;

    const int32_t * list; // of pages; NULL: all
    int64_t first, last;

    piece(const attention & a, int64_t unit, int64_t part) :
        a(a), h(unit%a.n_head_kv), t(unit/a.n_head_kv%a.n_tokens), s(unit/a.n_head_kv/a.n_tokens),
        list(a.pages ? (const int32_t *) a.pages->data + unit*a.n_listed : nullptr),
        first(part*a.per_part), last(std::min(a.n_listed, first + a.per_part)) {}

    int64_t page (int64_t i) const { return list ? list[i] : i; }
    int64_t count(int64_t p) const { return std::min(a.page_size, a.n_cells - p*a.page_size); }

    const char * rows(const ggml_tensor * x, int64_t p) const {
        return (const char *) x->data + h*x->nb[1] + p*a.page_size*x->nb[2] + s*x->nb[3];
    }

    // how many pages of K, then of V, are read
    int64_t n_reads() const { return 2*(last - first); }

    ahead read(int64_t i) const {
        const ggml_tensor * x = i < last - first ? a.k : a.v;
        const int64_t       p = page(first + i%(last - first));
        if (p < 0) {
            return {};
        }
        return { rows(x, p), (size_t) x->nb[2], ggml_row_size(x->type, x->ne[0]), count(p) };
    }
};

// `then` is what this thread does next
template <typename K, typename V>
void attend(const piece & c, const piece * then, float * partial, float * scratch) {
    const attention & a = c.a;

    const auto * mask  = (const ggml_fp16_t *) ((const char *) a.mask->data + c.t*a.mask->nb[1] + c.s*a.mask->nb[3]);
    const int64_t width = a.per_part*a.page_size;

    float * scores = scratch;
    float * bias   = scores + a.group*width;
    float * rows   = bias + a.page_size;

    const auto soon = [&](int64_t i) {
        i += a.ahead;
        if (i < c.n_reads()) {
            return c.read(i);
        }
        i -= c.n_reads();
        return then && i < then->n_reads() ? then->read(i) : ahead();
    };

    const float * heads[MAX_GROUP];
    for (int64_t j = 0; j < a.group; ++j) {
        heads[j] = (const float *) ((const char *) a.q->data + c.t*a.q->nb[1] + (c.h*a.group + j)*a.q->nb[2] + c.s*a.q->nb[3]);
    }

    // scores of all cells
    int64_t n = 0;
    for (int64_t i = c.first; i < c.last && c.page(i) >= 0; ++i) {
        const int64_t p      = c.page(i);
        const int64_t n_rows = c.count(p);

        size_t nb;
        const char * x = as<K>(a.k, c.rows(a.k, p), n_rows, rows, nb);
        dots_all<K>(x, nb, n_rows, heads, a.group, a.n_k, scores + n, width, soon(i - c.first));

        ggml_cpu_fp16_to_fp32(mask + p*a.page_size, bias, n_rows);
        for (int64_t j = 0; j < a.group; ++j) {
            float * y = scores + j*width + n;
            if (a.softcap != 0.0f) {
                for (int64_t r = 0; r < n_rows; ++r) {
                    y[r] = a.softcap*tanhf(a.scale*y[r]/a.softcap) + bias[r];
                }
            } else {
                for (int64_t r = 0; r < n_rows; ++r) {
                    y[r] = a.scale*y[r] + bias[r];
                }
            }
        }
        n += n_rows;
    }

    // weights
    float * acc = partial + 2*a.group;
    std::fill(acc, acc + a.group*a.n_v, 0.0f);
    bool any = false;
    for (int64_t j = 0; j < a.group; ++j) {
        float * y = scores + j*width;
        float top = -INF;
        ggml_vec_max_f32((int) n, &top, y);
        partial[2*j]     = top;
        partial[2*j + 1] = top == -INF ? 0.0f : (float) ggml_vec_soft_max_f32((int) n, y, y, top);
        if (top == -INF) {
            std::fill(y, y + n, 0.0f);
        }
        any = any || top != -INF;
    }
    if (!any) {
        return;
    }

    // the weighted sum of the values
    n = 0;
    for (int64_t i = c.first; i < c.last && c.page(i) >= 0; ++i) {
        const int64_t p      = c.page(i);
        const int64_t n_rows = c.count(p);

        size_t nb;
        const char * x = as<V>(a.v, c.rows(a.v, p), n_rows, rows, nb);
        add_rows_all<V>(x, nb, n_rows, scores + n, width, acc, a.n_v, a.group, soon(c.last - c.first + i - c.first));
        n += n_rows;
    }
}

// the parts of a unit, in their order
void combine(const attention & a, int64_t unit, const float * partials) {
    const piece c(a, unit, 0);

    for (int64_t j = 0; j < a.group; ++j) {
        const int64_t head = c.h*a.group + j;
        const float   sink = a.sinks ? ((const float *) a.sinks->data)[head] : -INF;

        float top = sink;
        for (int64_t part = 0; part < a.n_parts; ++part) {
            top = std::max(top, partials[part*a.partial() + 2*j]);
        }

        float * out = (float *) ((char *) a.dst->data + head*a.dst->nb[1] + c.t*a.dst->nb[2] + c.s*a.dst->nb[3]);
        std::fill(out, out + a.n_v, 0.0f);
        if (top == -INF) {
            continue;
        }

        float total = a.sinks ? expf(sink - top) : 0.0f;
        for (int64_t part = 0; part < a.n_parts; ++part) {
            const float * x = partials + part*a.partial();
            const float   w = x[2*j] == -INF ? 0.0f : expf(x[2*j] - top);
            if (w != 0.0f) {
                total += w*x[2*j + 1];
                ggml_vec_mad_f32((int) a.n_v, out, x + 2*a.group + j*a.n_v, w);
            }
        }
        ggml_vec_scale_f32((int) a.n_v, out, total == 0.0f ? 0.0f : 1.0f/total);
    }
}

void attn(const ggml_compute_params * params, ggml_tensor * dst) {
    const attention a(dst);

    const int64_t n_items = a.n_units()*a.n_parts;

    float * partials = (float *) params->wdata;
    float * scratch  = (float *) ((char *) (partials + n_items*a.partial()) + EDGEKV_WORK_PAD + params->ith*(a.scratch()*sizeof(float) + EDGEKV_WORK_PAD));

    const bool k16 = a.k->type == GGML_TYPE_F16;
    const bool v16 = a.v->type == GGML_TYPE_F16;
    const auto run = k16 ? (v16 ? attend<ggml_fp16_t, ggml_fp16_t> : attend<ggml_fp16_t, float>)
                         : (v16 ? attend<float,       ggml_fp16_t> : attend<float,       float>);

    // the heads of a part lie side by side in memory: parts outside, units inside
    const edgekv_range r = edgekv_share(n_items, params);
    for (int64_t item = r.begin; item < r.end; ++item) {
        const int64_t unit = item%a.n_units();
        const int64_t part = item/a.n_units();

        const piece c(a, unit, part);
        const piece then(a, (item + 1)%a.n_units(), (item + 1)/a.n_units());
        run(c, item + 1 < r.end ? &then : nullptr, partials + (unit*a.n_parts + part)*a.partial(), scratch);
    }

    ggml_barrier(params->threadpool);

    const edgekv_range u = edgekv_share(a.n_units(), params);
    for (int64_t unit = u.begin; unit < u.end; ++unit) {
        combine(a, unit, partials + unit*a.n_parts*a.partial());
    }
}

} // namespace

void ggml_compute_forward_edgekv_select(const ggml_compute_params * params, ggml_tensor * dst) {
    auto * const count = params->ith == 0 ? counters(dst) : nullptr;
    const int64_t start = count ? now_ns() : 0;

    switch (dst->op) {
        case GGML_OP_EDGEKV_SUMMARIZE:    summarize   (params, dst); break;
        case GGML_OP_EDGEKV_PAGE_SCORES:  page_scores (params, dst); break;
        case GGML_OP_EDGEKV_CHOOSE_PAGES: choose_pages(params, dst); break;
        case GGML_OP_EDGEKV_ATTN:         attn        (params, dst); break;
        default:                          GGML_ABORT("not an operator of selection: %s", ggml_op_name(dst->op));
    }

    if (count) {
        count[0] += now_ns() - start;
        count[1] += 1;
    }
}

size_t ggml_edgekv_cpu_select_work_size(const ggml_tensor * dst, int n_tasks) {
    switch (dst->op) {
        case GGML_OP_EDGEKV_SUMMARIZE:
            return n_tasks*(3*dst->src[1]->ne[0]*sizeof(float) + EDGEKV_WORK_PAD);
        case GGML_OP_EDGEKV_PAGE_SCORES: {
            const ggml_tensor * q = dst->src[0];
            const int64_t group = q->ne[2]/dst->src[1]->ne[1];
            return n_tasks*((q->ne[2]*2*q->ne[0] + group*PAGES)*sizeof(float) + EDGEKV_WORK_PAD);
        }
        case GGML_OP_EDGEKV_CHOOSE_PAGES:
            return n_tasks*(dst->src[0]->ne[0]*3*sizeof(int32_t) + EDGEKV_WORK_PAD);
        case GGML_OP_EDGEKV_ATTN:
            return attention(dst).work_size(n_tasks);
        default:
            return 0;
    }
}

bool ggml_edgekv_cpu_select_supports_op(const ggml_tensor * op) {
    const ggml_tensor * const * src = op->src;

    switch (op->op) {
        case GGML_OP_EDGEKV_SUMMARIZE:
            return edgekv_converts(src[1]->type);
        case GGML_OP_EDGEKV_PAGE_SCORES:
            return src[0]->ne[2]/src[1]->ne[1] <= MAX_GROUP;
        case GGML_OP_EDGEKV_ATTN:
            return edgekv_converts(src[1]->type) && edgekv_converts(src[2]->type) && src[0]->ne[2]/src[1]->ne[1] <= MAX_GROUP;
        default:
            return true;
    }
}
