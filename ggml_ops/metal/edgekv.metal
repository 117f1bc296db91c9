// Entry points: each calls the body of its name in ../gpu. A pipeline has the name of its function. Parameters come in
// this order: the numbers (buffer 0), the buffers from 1 on as ../gpu/args.h lists them, the threadgroup's memory if
// the body wants any, the place in the grid. A threadgroup is a row of threads, a multiple of 32.

#include <metal_stdlib>

// fast math may take NaN and infinity not to exist; compilers too old for this pragma ignore it
#pragma METAL fp math_mode(safe)

#include "../gpu/dialect-metal.h"

#include "../gpu/args.h"
#include "../gpu/rows.h"
#include "../gpu/block.h"
#include "../gpu/sums.h"
#include "../gpu/pick.h"
#include "../gpu/evict.h"
#include "../gpu/summarize.h"
#include "../gpu/pages.h"
#include "../gpu/attn.h"

#define EK_PLACE \
        uint3   at    [[threadgroup_position_in_grid]], \
        ushort  index [[thread_index_in_threadgroup]], \
        ushort3 count [[threads_per_threadgroup]]

#define EK_HERE ek_thread { index, count.x, at.x, at.y, at.z }

// --- eviction --------------------------------------------------------------------------------------------------------

kernel void kernel_edgekv_score(
        constant ek_score_args & a    [[buffer(0)]],
        device const uint8_t   * keys [[buffer(1)]],
        device const float     * vec  [[buffer(2)]],
        device float           * out  [[buffer(3)]],
        EK_PLACE) {
    ek_score(a, keys, vec, out, EK_HERE);
}

kernel void kernel_edgekv_key_sum(
        constant ek_key_mean_args & a      [[buffer(0)]],
        device const uint8_t      * keys   [[buffer(1)]],
        device float              * parts  [[buffer(2)]],
        threadgroup uint8_t       * shared [[threadgroup(0)]],
        EK_PLACE) {
    ek_key_sum(a, keys, parts, shared, EK_HERE);
}

kernel void kernel_edgekv_key_mean(
        constant ek_key_mean_args & a      [[buffer(0)]],
        device const float        * parts  [[buffer(1)]],
        device float              * out    [[buffer(2)]],
        threadgroup uint8_t       * shared [[threadgroup(0)]],
        EK_PLACE) {
    ek_key_mean(a, parts, out, shared, EK_HERE);
}

kernel void kernel_edgekv_choose(
        constant ek_choose_args & a      [[buffer(0)]],
        device const float      * scores [[buffer(1)]],
        device int32_t          * out    [[buffer(2)]],
        threadgroup uint8_t     * shared [[threadgroup(0)]],
        EK_PLACE) {
    ek_choose(a, scores, out, shared, EK_HERE);
}

#define EK_COMPACT(SIZE) \
kernel void kernel_edgekv_compact_##SIZE( \
        constant ek_compact_args & a      [[buffer(0)]], \
        device uint8_t           * rows   [[buffer(1)]], \
        device const int32_t     * chosen [[buffer(2)]], \
        EK_PLACE) { \
    ek_compact<SIZE>(a, rows, chosen, EK_HERE); \
}

EK_COMPACT(2)
EK_COMPACT(4)
EK_COMPACT(8)
EK_COMPACT(16)

// --- selection -------------------------------------------------------------------------------------------------------

kernel void kernel_edgekv_summarize(
        constant ek_summarize_args & a         [[buffer(0)]],
        device const uint8_t       * keys      [[buffer(1)]],
        device const int64_t       * cells     [[buffer(2)]],
        device uint8_t             * summaries [[buffer(3)]],
        device uint32_t            * counters  [[buffer(4)]],
        EK_PLACE) {
    ek_summarize(a, keys, cells, summaries, counters, EK_HERE);
}

// LANES lanes of CHANNELS channels for a row, GROUP query heads at once: whatever ../gpu/plan-select.h may ask for
#define EK_PAGE_SCORES(LANES, CHANNELS, GROUP) \
kernel void kernel_edgekv_page_scores_##LANES##_##CHANNELS##_##GROUP( \
        constant ek_page_scores_args & a         [[buffer(0)]], \
        device const uint8_t         * q         [[buffer(1)]], \
        device const uint8_t         * summaries [[buffer(2)]], \
        device float                 * out       [[buffer(3)]], \
        EK_PLACE) { \
    ek_page_scores<LANES, CHANNELS, GROUP>(a, q, summaries, out, EK_HERE); \
}

#define EK_PAGE_SCORES_OF_SIZE(LANES) \
    EK_PAGE_SCORES(LANES, 8, 1) \
    EK_PAGE_SCORES(LANES, 8, 2) \
    EK_PAGE_SCORES(LANES, 8, 4)

EK_PAGE_SCORES_OF_SIZE(8)
EK_PAGE_SCORES_OF_SIZE(16)
EK_PAGE_SCORES_OF_SIZE(32)
EK_PAGE_SCORES(32, 16, 1)
EK_PAGE_SCORES(32, 16, 2)

kernel void kernel_edgekv_choose_pages(
        constant ek_choose_pages_args & a        [[buffer(0)]],
        device const float            * scores   [[buffer(1)]],
        device const uint8_t          * mask     [[buffer(2)]],
        device uint32_t               * ranks    [[buffer(3)]],
        device int32_t                * out      [[buffer(4)]],
        device uint32_t               * counters [[buffer(5)]],
        threadgroup uint8_t           * shared   [[threadgroup(0)]],
        EK_PLACE) {
    ek_choose_pages(a, scores, mask, ranks, out, counters, shared, EK_HERE);
}

#define EK_ATTN(NAME, TYPE, WIDE, LANES, CHANNELS, GROUP) \
kernel void kernel_edgekv_attn_##NAME##_##LANES##_##CHANNELS##_##GROUP( \
        constant ek_attn_args & a        [[buffer(0)]], \
        device const uint8_t  * q        [[buffer(1)]], \
        device const uint8_t  * keys     [[buffer(2)]], \
        device const uint8_t  * values   [[buffer(3)]], \
        device const uint8_t  * mask     [[buffer(4)]], \
        device const int32_t  * pages    [[buffer(5)]], \
        device float          * partials [[buffer(6)]], \
        threadgroup uint8_t   * shared   [[threadgroup(0)]], \
        EK_PLACE) { \
    ek_attn<TYPE, TYPE, WIDE, LANES, CHANNELS, GROUP>(a, q, keys, values, mask, pages, partials, shared, EK_HERE); \
}

#define EK_ATTN_OF_SIZE(NAME, TYPE, WIDE, LANES) \
    EK_ATTN(NAME, TYPE, WIDE, LANES, 8, 1) \
    EK_ATTN(NAME, TYPE, WIDE, LANES, 8, 2) \
    EK_ATTN(NAME, TYPE, WIDE, LANES, 8, 4) \
    EK_ATTN(NAME, TYPE, WIDE, LANES, 8, 8)

#define EK_ATTN_OF_TYPE(NAME, TYPE, WIDE) \
    EK_ATTN_OF_SIZE(NAME, TYPE, WIDE, 8) \
    EK_ATTN_OF_SIZE(NAME, TYPE, WIDE, 16) \
    EK_ATTN_OF_SIZE(NAME, TYPE, WIDE, 32) \
    EK_ATTN(NAME, TYPE, WIDE, 32, 16, 1) \
    EK_ATTN(NAME, TYPE, WIDE, 32, 16, 2) \
    EK_ATTN(NAME, TYPE, WIDE, 32, 16, 4)

EK_ATTN_OF_TYPE(f16,  EK_F16,  true)
EK_ATTN_OF_TYPE(q8_0, EK_Q8_0, false)
EK_ATTN_OF_TYPE(q4_0, EK_Q4_0, false)

// other types, and K and V of different ones: few instances of what is seldom used
EK_ATTN(any, EK_ANY, false,  8,  8, 1)
EK_ATTN(any, EK_ANY, false,  8,  8, 8)
EK_ATTN(any, EK_ANY, false, 16,  8, 1)
EK_ATTN(any, EK_ANY, false, 16,  8, 8)
EK_ATTN(any, EK_ANY, false, 32,  8, 1)
EK_ATTN(any, EK_ANY, false, 32,  8, 8)
EK_ATTN(any, EK_ANY, false, 32, 16, 1)
EK_ATTN(any, EK_ANY, false, 32, 16, 4)

kernel void kernel_edgekv_attn_combine(
        constant ek_attn_args & a        [[buffer(0)]],
        device const float    * partials [[buffer(1)]],
        device const float    * sinks    [[buffer(2)]],
        device float          * out      [[buffer(3)]],
        threadgroup uint8_t   * shared   [[threadgroup(0)]],
        EK_PLACE) {
    ek_attn_combine(a, partials, sinks, out, shared, EK_HERE);
}
