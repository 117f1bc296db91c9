#pragma once

// Rows of a cache, of any of its types, eight numbers at a time.

EK_TABLE int8_t ek_iq4_nl_values[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };

EK_FN bool ek_is_nan(float x) {
    return (ek_bits(x) & 0x7FFFFFFFu) > 0x7F800000u;
}

// eight adjacent bytes at a multiple of two
EK_FN void ek_load_bytes(EK_GLOBAL const uint8_t * p, EK_LOCAL uint32_t * x) {
    EK_UNROLL
    for (int j = 0; j < 4; ++j) {
        const uint32_t two = ek_load_2(p + 2*j);
        x[2*j]     = two & 0xFF;
        x[2*j + 1] = two >> 8;
    }
}

// Elements [i, i + 8) of a row, i a multiple of 8. Rows are multiples of two bytes; those that are F16 and WIDE are at
// multiples of 16, those that are F32 at multiples of 4.
template <int TYPE, bool WIDE>
EK_FN void ek_load8(EK_GLOBAL const uint8_t * row, int32_t i, EK_LOCAL float * x) {
    if (TYPE == EK_F32) {
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            x[j] = ek_float(ek_load_4(row + 4*(i + j)));
        }
    } else if (TYPE == EK_F16 && WIDE) {
        const ek_uint4 w = ek_load_16(row + 2*i);
        const uint32_t v[4] = { w.x, w.y, w.z, w.w };
        EK_UNROLL
        for (int j = 0; j < 4; ++j) {
            x[2*j]     = ek_half_to_float((uint16_t) (v[j] & 0xFFFF));
            x[2*j + 1] = ek_half_to_float((uint16_t) (v[j] >> 16));
        }
    } else if (TYPE == EK_F16) {
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            x[j] = ek_half_to_float(ek_load_2(row + 2*(i + j)));
        }
    } else if (TYPE == EK_BF16) {
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            x[j] = ek_float((uint32_t) ek_load_2(row + 2*(i + j)) << 16);
        }
    } else if (TYPE == EK_Q8_0) {
        EK_GLOBAL const uint8_t * block = row + (i/32)*34;
        const float d = ek_half_to_float(ek_load_2(block));
        uint32_t b[8];
        ek_load_bytes(block + 2 + i%32, b);
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            x[j] = d*(float) (int8_t) b[j];
        }
    } else {
        // 32 numbers of four bits: the first half in the low ones; then a fifth bit, an offset, a table
        const bool five   = TYPE == EK_Q5_0 || TYPE == EK_Q5_1;
        const bool offset = TYPE == EK_Q4_1 || TYPE == EK_Q5_1;
        const int  head   = 2 + (offset ? 2 : 0) + (five ? 4 : 0);

        EK_GLOBAL const uint8_t * block = row + (i/32)*(head + 16);
        const float d = ek_half_to_float(ek_load_2(block));
        const float m = offset ? ek_half_to_float(ek_load_2(block + 2)) : 0.0f;

        uint32_t high = 0;
        if (five) {
            EK_GLOBAL const uint8_t * bits = block + head - 4;
            high = (ek_load_2(bits) | ((uint32_t) ek_load_2(bits + 2) << 16)) >> (i%32);
        }
        uint32_t b[8];
        ek_load_bytes(block + head + i%16, b);
        const uint32_t shift = i%32 < 16 ? 0 : 4;
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            uint32_t n = (b[j] >> shift) & 15;
            if (five) {
                n |= ((high >> j) & 1) << 4;
            }
            if (TYPE == EK_IQ4_NL) {
                x[j] = d*(float) ek_iq4_nl_values[n];
            } else if (offset) {
                x[j] = d*(float) n + m;
            } else {
                x[j] = d*(float) ((int32_t) n - (five ? 16 : 8));
            }
        }
    }
}

// the same where the type is known only when the kernel runs
EK_FN void ek_load8_any(int32_t type, EK_GLOBAL const uint8_t * row, int32_t i, EK_LOCAL float * x) {
    switch (type) {
        case EK_F32:    ek_load8<EK_F32,    false>(row, i, x); break;
        case EK_F16:    ek_load8<EK_F16,    false>(row, i, x); break;
        case EK_BF16:   ek_load8<EK_BF16,   false>(row, i, x); break;
        case EK_Q8_0:   ek_load8<EK_Q8_0,   false>(row, i, x); break;
        case EK_Q4_0:   ek_load8<EK_Q4_0,   false>(row, i, x); break;
        case EK_Q4_1:   ek_load8<EK_Q4_1,   false>(row, i, x); break;
        case EK_Q5_0:   ek_load8<EK_Q5_0,   false>(row, i, x); break;
        case EK_Q5_1:   ek_load8<EK_Q5_1,   false>(row, i, x); break;
        case EK_IQ4_NL: ek_load8<EK_IQ4_NL, false>(row, i, x); break;
    }
}
