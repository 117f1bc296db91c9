#pragma once

// Eviction: scores of keys, their mean, the choice of cells, the row move.

// --- sums over a row, by a warp --------------------------------------------------------------------------------------

EK_FN bool ek_is_zero(float x) {
    return (ek_bits(x) & 0x7FFFFFFFu) == 0;
}

// |row|
EK_FN float ek_row_norm(int32_t type, EK_GLOBAL const uint8_t * row, int32_t head_size, uint32_t lane) {
    float sum = 0.0f;
    for (int32_t i = (int32_t) lane*8; i < head_size; i += 256) {
        float x[8];
        ek_load8_any(type, row, i, x);
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            sum = ek_fma(x[j], x[j], sum);
        }
    }
    return ek_sqrt(ek_lanes_sum<32>(sum));
}

// --- scores ----------------------------------------------------------------------------------------------------------

enum { // the values of enum ggml_edgekv_score_kind
    EK_SCORE_DOT  = 0,
    EK_SCORE_NORM = 1,
    EK_SCORE_COS  = 2,
};

EK_FN void ek_score(EK_PARAM ek_score_args & a, EK_GLOBAL const uint8_t * keys, EK_GLOBAL const float * vec,
        EK_GLOBAL float * out, ek_thread t) {
    const uint32_t lane = t.index % 32;
    const uint32_t cell = t.x*(t.count/32) + t.index/32;
    if (cell >= (uint32_t) a.n_cells) {
        return;
    }
    EK_GLOBAL const uint8_t * row = keys + t.y*a.nb1 + cell*a.nb2;

    float dot    = 0.0f;
    float square = 0.0f;
    for (int32_t i = (int32_t) lane*8; i < a.head_size; i += 256) {
        float x[8];
        ek_load8_any(a.type, row, i, x);
        if (a.kind != EK_SCORE_NORM) {
            EK_GLOBAL const float * v = vec + (uint64_t) t.y*a.head_size + i;
            EK_UNROLL
            for (int j = 0; j < 8; ++j) {
                dot = ek_fma(x[j], v[j], dot);
            }
        }
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            square = ek_fma(x[j], x[j], square);
        }
    }
    dot    = ek_lanes_sum<32>(dot);
    square = ek_lanes_sum<32>(square);

    if (lane == 0) {
        const float norm = ek_sqrt(square);
        float s = dot;
        if (a.kind == EK_SCORE_NORM) {
            s = norm;
        } else if (a.kind == EK_SCORE_COS) {
            s = ek_is_zero(norm) ? 0.0f : dot/norm;
        }
        out[(uint64_t) t.y*a.n_cells + cell] = a.scale*s;
    }
}

// --- mean of the keys ------------------------------------------------------------------------------------------------

// Added in stripes, then the stripes in pairs: short sums in float, of a shape that does not depend on the block.
template <int STRIPES>
EK_FN float ek_sum_stripes(EK_SHARED const float * sums, uint32_t stride) {
    float x[STRIPES];
    EK_UNROLL
    for (int s = 0; s < STRIPES; ++s) {
        x[s] = sums[s*stride];
    }
    EK_UNROLL
    for (int n = STRIPES/2; n > 0; n /= 2) {
        EK_UNROLL
        for (int s = 0; s < n; ++s) {
            x[s] += x[s + n];
        }
    }
    return x[0];
}

// sum += weight[r]*row[r], eight channels from i on, of the rows first, first + EK_SUM_STRIPES, ... before n; those
// with a negative weight are left out, since they may hold NaN
template <int TYPE>
EK_FN void ek_add_rows(EK_GLOBAL const uint8_t * rows, uint64_t nb, uint32_t first, uint32_t n, int32_t i,
        EK_SHARED const float * weight, EK_LOCAL float * sum) {
    for (uint32_t r = first; r < n; r += EK_SUM_STRIPES) {
        float x[8];
        ek_load8<TYPE, false>(rows + r*nb, i, x);
        const float w = weight[r];
        EK_UNROLL
        for (int j = 0; j < 8; ++j) {
            sum[j] = w >= 0.0f ? ek_fma(w, x[j], sum[j]) : sum[j];
        }
    }
}

EK_FN void ek_add_rows_any(int32_t type, EK_GLOBAL const uint8_t * rows, uint64_t nb, uint32_t first, uint32_t n,
        int32_t i, EK_SHARED const float * weight, EK_LOCAL float * sum) {
    switch (type) {
        case EK_F32:    ek_add_rows<EK_F32>   (rows, nb, first, n, i, weight, sum); break;
        case EK_F16:    ek_add_rows<EK_F16>   (rows, nb, first, n, i, weight, sum); break;
        case EK_BF16:   ek_add_rows<EK_BF16>  (rows, nb, first, n, i, weight, sum); break;
        case EK_Q8_0:   ek_add_rows<EK_Q8_0>  (rows, nb, first, n, i, weight, sum); break;
        case EK_Q4_0:   ek_add_rows<EK_Q4_0>  (rows, nb, first, n, i, weight, sum); break;
        case EK_Q4_1:   ek_add_rows<EK_Q4_1>  (rows, nb, first, n, i, weight, sum); break;
        case EK_Q5_0:   ek_add_rows<EK_Q5_0>  (rows, nb, first, n, i, weight, sum); break;
        case EK_Q5_1:   ek_add_rows<EK_Q5_1>  (rows, nb, first, n, i, weight, sum); break;
        case EK_IQ4_NL: ek_add_rows<EK_IQ4_NL>(rows, nb, first, n, i, weight, sum); break;
    }
}

EK_FN void ek_key_sum(EK_PARAM ek_key_mean_args & a, EK_GLOBAL const uint8_t * keys, EK_GLOBAL float * parts,
        EK_SHARED uint8_t * shared, ek_thread t) {
    EK_SHARED float * inverse = (EK_SHARED float *) shared; // of the norms; negative: counts as a zero vector
    EK_SHARED float * sums    = inverse + EK_SUM_CELLS;     // [EK_SUM_CHANNELS, EK_SUM_STRIPES]

    const uint32_t begin = t.x*(uint32_t) a.per_part;
    const uint32_t left  = (uint32_t) a.n_cells - begin;
    const uint32_t end   = begin + (left < (uint32_t) a.per_part ? left : (uint32_t) a.per_part);

    keys += t.y*a.nb1;

    for (uint32_t first = 0; first < (uint32_t) a.head_size; first += EK_SUM_CHANNELS) {
        const uint32_t after    = (uint32_t) a.head_size - first;
        const uint32_t channels = after < EK_SUM_CHANNELS ? after : EK_SUM_CHANNELS;
        const uint32_t groups   = channels/8;

        for (uint32_t c0 = begin; c0 < end; c0 += EK_SUM_CELLS) {
            const uint32_t n = end - c0 < EK_SUM_CELLS ? end - c0 : EK_SUM_CELLS;
            EK_GLOBAL const uint8_t * rows = keys + c0*a.nb2;

            for (uint32_t c = t.index/32; c < n; c += t.count/32) {
                const float norm = ek_row_norm(a.type, rows + c*a.nb2, a.head_size, t.index % 32);
                if (t.index % 32 == 0) {
                    inverse[c] = ek_is_zero(norm) || ek_is_nan(norm) ? -1.0f : 1.0f/norm;
                }
            }
            EK_BARRIER();
            for (uint32_t item = t.index; item < groups*EK_SUM_STRIPES; item += t.count) {
                const uint32_t channel = item % groups * 8;
                const uint32_t stripe  = item / groups;

                float sum[8] = { 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f };
                ek_add_rows_any(a.type, rows, a.nb2, stripe, n, (int32_t) (first + channel), inverse, sum);

                EK_SHARED float * into = sums + stripe*EK_SUM_CHANNELS + channel;
                EK_UNROLL
                for (int j = 0; j < 8; ++j) {
                    into[j] = c0 == begin ? sum[j] : into[j] + sum[j];
                }
            }
            EK_BARRIER();
        }
        EK_GLOBAL float * out = parts + ((uint64_t) t.x*a.n_head_kv + t.y)*a.head_size + first;
        for (uint32_t i = t.index; i < channels; i += t.count) {
            out[i] = ek_sum_stripes<EK_SUM_STRIPES>(sums + i, EK_SUM_CHANNELS);
        }
        EK_BARRIER();
    }
}

EK_FN void ek_key_mean(EK_PARAM ek_key_mean_args & a, EK_GLOBAL const float * parts, EK_GLOBAL float * out,
        EK_SHARED uint8_t * shared, ek_thread t) {
    EK_SHARED float * sums = (EK_SHARED float *) shared; // [EK_MEAN_CHANNELS, EK_MEAN_STRIPES]

    const uint64_t stride = (uint64_t) a.n_head_kv*a.head_size;

    for (uint32_t first = 0; first < (uint32_t) a.head_size; first += EK_MEAN_CHANNELS) {
        const uint32_t after    = (uint32_t) a.head_size - first;
        const uint32_t channels = after < EK_MEAN_CHANNELS ? after : EK_MEAN_CHANNELS;
        const uint64_t offset   = (uint64_t) t.y*a.head_size + first;

        for (uint32_t item = t.index; item < channels*EK_MEAN_STRIPES; item += t.count) {
            const uint32_t i      = item % channels;
            const uint32_t stripe = item / channels;

            float sum = 0.0f;
            for (uint32_t p = stripe; p < (uint32_t) a.n_parts; p += EK_MEAN_STRIPES) {
                sum += parts[p*stride + offset + i];
            }
            sums[stripe*EK_MEAN_CHANNELS + i] = sum;
        }
        EK_BARRIER();
        for (uint32_t i = t.index; i < channels; i += t.count) {
            out[offset + i] = ek_sum_stripes<EK_MEAN_STRIPES>(sums + i, EK_MEAN_CHANNELS)/(float) a.n_cells;
        }
        EK_BARRIER();
    }
}

// --- choice of cells -------------------------------------------------------------------------------------------------

EK_FN void ek_choose(EK_PARAM ek_choose_args & a, EK_GLOBAL const float * scores, EK_GLOBAL int32_t * out,
        EK_SHARED uint8_t * shared, ek_thread t) {
    EK_SHARED uint32_t * words = (EK_SHARED uint32_t *) shared;

    const int32_t last = a.n_cells - a.window; // candidates are the cells [n_keep, last)

    scores += a.per_head ? (uint64_t) t.x*a.n_cells : 0;
    out    += (uint64_t) t.x*a.n_chosen;

    for (int32_t i = (int32_t) t.index; i < a.n_keep; i += (int32_t) t.count) {
        out[i] = i;
    }
    for (int32_t i = (int32_t) t.index; i < a.window; i += (int32_t) t.count) {
        out[a.n_chosen - a.window + i] = last + i;
    }

    ek_score_ranks ranks;
    ranks.scores = scores + a.n_keep;
    const uint32_t n      = (uint32_t) (last - a.n_keep);
    const uint32_t wanted = (uint32_t) (a.n_chosen - a.n_keep - a.window);
    if (wanted > 0) {
        const ek_cut cut = ek_pick(ranks, n, wanted, words, t);
        ek_pick_write(ranks, n, cut, a.n_keep, out + a.n_keep, words, t);
    }
}

// --- the row move ----------------------------------------------------------------------------------------------------

template <int SIZE> struct ek_piece;
template <> struct ek_piece<2>  { typedef uint16_t type; };
template <> struct ek_piece<4>  { typedef uint32_t type; };
template <> struct ek_piece<8>  { typedef ek_uint2 type; };
template <> struct ek_piece<16> { typedef ek_uint4 type; };

EK_FN void ek_load_piece(EK_GLOBAL const uint8_t * p, EK_LOCAL uint16_t & x) { x = ek_load_2(p);  }
EK_FN void ek_load_piece(EK_GLOBAL const uint8_t * p, EK_LOCAL uint32_t & x) { x = ek_load_4(p);  }
EK_FN void ek_load_piece(EK_GLOBAL const uint8_t * p, EK_LOCAL ek_uint2 & x) { x = ek_load_8(p);  }
EK_FN void ek_load_piece(EK_GLOBAL const uint8_t * p, EK_LOCAL ek_uint4 & x) { x = ek_load_16(p); }

EK_FN void ek_store_piece(EK_GLOBAL uint8_t * p, uint16_t x) { ek_store_2(p, x);  }
EK_FN void ek_store_piece(EK_GLOBAL uint8_t * p, uint32_t x) { ek_store_4(p, x);  }
EK_FN void ek_store_piece(EK_GLOBAL uint8_t * p, ek_uint2 x) { ek_store_8(p, x);  }
EK_FN void ek_store_piece(EK_GLOBAL uint8_t * p, ek_uint4 x) { ek_store_16(p, x); }

// Tile by tile: all of a tile is loaded before any of it is stored. chosen[i] >= i and ascending, so a tile's sources
// lie at or behind its first row, and what is stored in one tile is never read in a later one: one barrier is enough.
template <int SIZE>
EK_FN void ek_compact(EK_PARAM ek_compact_args & a, EK_GLOBAL uint8_t * rows, EK_GLOBAL const int32_t * chosen,
        ek_thread t) {
    const uint32_t EACH = SIZE < 8 ? 8 : 4; // pieces of a thread in a tile

    const uint32_t first  = t.x*(uint32_t) a.slice;
    const uint32_t left   = (uint32_t) a.n_pieces - first;
    const uint32_t pieces = left < (uint32_t) a.slice ? left : (uint32_t) a.slice;
    const uint32_t n_rows = (uint32_t) a.n_chosen;
    const uint32_t tile   = EACH*t.count/pieces; // rows

    rows   += t.y*a.nb_head + first*a.nb_piece;
    chosen += (uint64_t) t.y*a.n_chosen;

    for (uint32_t begin = 0; begin < n_rows; begin += tile) {
        const uint32_t items = (n_rows - begin < tile ? n_rows - begin : tile)*pieces;

        typename ek_piece<SIZE>::type x[EACH];
        uint32_t moved = 0;
        EK_UNROLL
        for (uint32_t j = 0; j < EACH; ++j) {
            const uint32_t item = t.index + j*t.count;
            if (item < items) {
                const uint32_t row  = begin + item/pieces;
                const uint32_t from = (uint32_t) chosen[row];
                if (from != row) {
                    ek_load_piece(rows + from*a.nb_row + item%pieces*a.nb_piece, x[j]);
                    moved |= 1u << j;
                }
            }
        }
        EK_BARRIER();
        EK_UNROLL
        for (uint32_t j = 0; j < EACH; ++j) {
            if ((moved >> j) & 1) {
                const uint32_t item = t.index + j*t.count;
                ek_store_piece(rows + (begin + item/pieces)*a.nb_row + item%pieces*a.nb_piece, x[j]);
            }
        }
    }
}
