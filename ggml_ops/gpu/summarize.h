#pragma once

// Summaries of pages: the maximum and minimum of each channel of their keys, rounded outward to f16. All by integers
// that order like the numbers, since compilers may assume that no number is infinite.

enum : uint32_t { EK_INF = 0x7F800000u };

// orders like the number, with -0 below 0; the same function leads back to the bits
EK_FN int32_t ek_ordered(uint32_t bits) {
    return (int32_t) (bits & 0x80000000u ? bits ^ 0x7FFFFFFFu : bits);
}

// The least f16 that is not below the number of these bits, which is not NaN.
EK_FN uint16_t ek_round_up(uint32_t bits) {
    const bool     negative = (bits & 0x80000000u) != 0;
    const uint32_t m        = bits & 0x7FFFFFFFu;

    // the magnitude towards zero, and what that leaves
    uint32_t bits16;
    bool     more;
    if (m >= EK_INF) {
        bits16 = 0x7C00;
        more = false;
    } else if (m >= 0x47800000u) { // 2^16
        bits16 = 0x7BFF;
        more = true;
    } else if (m >= 0x38800000u) { // 2^-14, the least normal one
        bits16 = (m - 0x38000000u) >> 13;
        more = (m & 0x1FFF) != 0;
    } else if (m >= 0x33800000u) { // 2^-24, the least of all
        const uint32_t shift    = 126 - (m >> 23);
        const uint32_t mantissa = (m & 0x7FFFFFu) | 0x800000u;
        bits16 = mantissa >> shift;
        more = (mantissa & ((1u << shift) - 1)) != 0;
    } else {
        bits16 = 0;
        more = m != 0;
    }
    return (uint16_t) (negative ? bits16 | 0x8000 : more ? bits16 + 1 : bits16);
}

EK_FN uint16_t ek_round_down(uint32_t bits) {
    return ek_round_up(bits ^ 0x80000000u) ^ 0x8000;
}

// Eight channels from i on of the rows first, first + step, ... before n: lo and hi go down and up, NaN moves both.
template <int TYPE>
EK_FN void ek_widen(EK_GLOBAL const uint8_t * rows, uint64_t nb, uint32_t first, uint32_t step, uint32_t n, int32_t i,
        EK_LOCAL int32_t * lo, EK_LOCAL int32_t * hi) {
    for (uint32_t r = first; r < n; r += 4*step) {
        float x[4][8];
        EK_UNROLL
        for (uint32_t k = 0; k < 4; ++k) {
            const uint32_t row = r + k*step;
            ek_load8<TYPE, false>(rows + (row < n ? row : n - 1)*nb, i, x[k]); // a row twice does no harm
        }
        EK_UNROLL
        for (uint32_t k = 0; k < 4; ++k) {
            EK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const bool    nan = ek_is_nan(x[k][j]);
                const int32_t y   = ek_ordered(ek_bits(x[k][j]));
                const int32_t low  = nan ? ~(int32_t) EK_INF : y;
                const int32_t high = nan ?  (int32_t) EK_INF : y;
                lo[j] = low  < lo[j] ? low  : lo[j];
                hi[j] = high > hi[j] ? high : hi[j];
            }
        }
    }
}

EK_FN void ek_widen_any(int32_t type, EK_GLOBAL const uint8_t * rows, uint64_t nb, uint32_t first, uint32_t step,
        uint32_t n, int32_t i, EK_LOCAL int32_t * lo, EK_LOCAL int32_t * hi) {
    switch (type) {
        case EK_F32:    ek_widen<EK_F32>   (rows, nb, first, step, n, i, lo, hi); break;
        case EK_F16:    ek_widen<EK_F16>   (rows, nb, first, step, n, i, lo, hi); break;
        case EK_BF16:   ek_widen<EK_BF16>  (rows, nb, first, step, n, i, lo, hi); break;
        case EK_Q8_0:   ek_widen<EK_Q8_0>  (rows, nb, first, step, n, i, lo, hi); break;
        case EK_Q4_0:   ek_widen<EK_Q4_0>  (rows, nb, first, step, n, i, lo, hi); break;
        case EK_Q4_1:   ek_widen<EK_Q4_1>  (rows, nb, first, step, n, i, lo, hi); break;
        case EK_Q5_0:   ek_widen<EK_Q5_0>  (rows, nb, first, step, n, i, lo, hi); break;
        case EK_Q5_1:   ek_widen<EK_Q5_1>  (rows, nb, first, step, n, i, lo, hi); break;
        case EK_IQ4_NL: ek_widen<EK_IQ4_NL>(rows, nb, first, step, n, i, lo, hi); break;
    }
}

EK_FN void ek_summarize(EK_PARAM ek_summarize_args & a, EK_GLOBAL const uint8_t * keys, EK_GLOBAL const int64_t * cells,
        EK_GLOBAL uint8_t * summaries, EK_GLOBAL uint32_t * counters, ek_thread t) {
    if (a.counted && t.index == 0 && t.x == 0 && t.y == 0 && t.z == 0) {
        ek_count(counters + 2, 1);
    }

    const uint32_t lane = t.index % 32;
    const uint32_t item = t.x*(t.count/32) + t.index/32;

    uint64_t stream = t.z;
    uint32_t page   = item;
    if (a.n_named > 0) {
        if (item >= (uint32_t) a.n_named) {
            return;
        }
        const uint64_t cell = (uint64_t) cells[item];
        stream = cell / (uint32_t) a.n_cells;
        page   = (uint32_t) (cell % (uint32_t) a.n_cells) / (uint32_t) a.page_size;
        if (item > 0) {
            const uint64_t before = (uint64_t) cells[item - 1];
            if (before / (uint32_t) a.n_cells == stream &&
                (uint32_t) (before % (uint32_t) a.n_cells) / (uint32_t) a.page_size == page) {
                return; // whoever has the cell before does it; a page that is named later again is written alike
            }
        }
    } else if (page >= ((uint32_t) a.n_cells + (uint32_t) a.page_size - 1)/(uint32_t) a.page_size) {
        return;
    }

    const uint32_t first = page*(uint32_t) a.page_size;
    const uint32_t left  = (uint32_t) a.n_cells - first;
    const uint32_t n     = left < (uint32_t) a.page_size ? left : (uint32_t) a.page_size;

    EK_GLOBAL const uint8_t * rows = keys + t.y*a.nb1 + first*a.nb2 + stream*a.nb3;
    EK_GLOBAL uint8_t       * out  = summaries + t.y*a.nbs1 + page*a.nbs2 + stream*a.nbs3;

    // as many lanes for a row as there are groups of eight channels, the others for the next rows
    uint32_t width = 1;
    while (width < 32 && width*8 < (uint32_t) a.head_size) {
        width *= 2;
    }

    for (uint32_t begin = 0; begin < (uint32_t) a.head_size; begin += 8*width) {
        const uint32_t i = begin + lane % width * 8;

        int32_t lo[8];
        int32_t hi[8];
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            lo[j] =  (int32_t) EK_INF;
            hi[j] = ~(int32_t) EK_INF;
        }
        if (i < (uint32_t) a.head_size) {
            ek_widen_any(a.type, rows, a.nb2, lane/width, 32/width, n, (int32_t) i, lo, hi);
        }
        for (uint32_t m = width; m < 32; m *= 2) {
            EK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const int32_t low  = ek_shuffle_xor(lo[j], m);
                const int32_t high = ek_shuffle_xor(hi[j], m);
                lo[j] = low  < lo[j] ? low  : lo[j];
                hi[j] = high > hi[j] ? high : hi[j];
            }
        }
        if (lane < width && i < (uint32_t) a.head_size) {
            EK_UNROLL
            for (int j = 0; j < 8; ++j) {
                ek_store_2(out + 2*(i + j), ek_round_up((uint32_t) ek_ordered((uint32_t) hi[j])));
                ek_store_2(out + 2*(a.head_size + i + j), ek_round_down((uint32_t) ek_ordered((uint32_t) lo[j])));
            }
        }
    }
}
