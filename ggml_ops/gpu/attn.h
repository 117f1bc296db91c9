#pragma once

// Attention over pages, for the few tokens of a decode step. The listed cells of a KV head are cut into parts, a block each
// (flash decoding): a group of lanes reads a row of K or V, eight channels a lane, once for all query heads of the KV head
// (up to 8; groups with more take another block). Then the parts of each query head are put together.
//
// A score that a mask hides is EK_HIDDEN: Metal's compiler may assume that there is no infinity.

#define EK_HIDDEN (-3.0e38f)

// Eight channels of a row whose type is known to the compiler, or not.
template <int TYPE, bool WIDE>
EK_FN void ek_load8_of(int32_t type, EK_GLOBAL const uint8_t * row, int32_t i, EK_LOCAL float * x) {
    if (TYPE == EK_ANY) {
        ek_load8_any(type, row, i, x);
    } else {
        ek_load8<TYPE, WIDE>(row, i, x);
    }
}

// LANES lanes of CHANNELS channels each hold a row; GROUP is a power of two, 8 at most
template <int TYPE_K, int TYPE_V, bool WIDE, int LANES, int CHANNELS, int GROUP>
EK_FN void ek_attn(
        EK_PARAM  ek_attn_args & a,
        EK_GLOBAL const uint8_t * q,
        EK_GLOBAL const uint8_t * keys,
        EK_GLOBAL const uint8_t * values,
        EK_GLOBAL const uint8_t * mask,
        EK_GLOBAL const int32_t * pages,
        EK_GLOBAL float         * partials,
        EK_SHARED uint8_t       * shared,
        ek_thread                 t) {
    enum {
        TILE   = EK_ATTN_TILE,
        CHUNKS = CHANNELS/8,                        // a lane's channels, in eights that lie LANES eights apart
        ROWS   = 32/LANES,                          // rows that a warp works on at once
        AHEAD  = TYPE_K == EK_ANY ? 1 : 4,          // rows that a group of lanes loads at once
        SUMS   = AHEAD*GROUP,
        OWN    = SUMS >= LANES ? SUMS/LANES : 1,    // sums that end in one lane
        WIDTH  = LANES*CHANNELS,
        AT_ONCE = EK_ATTN_RED/WIDTH < GROUP ? EK_ATTN_RED/WIDTH : GROUP, // heads of the last sum over warps
    };

    EK_SHARED float   * weight = (EK_SHARED float *) shared;        // [TILE][GROUP], scores first
    EK_SHARED float   * bias   = weight + TILE*GROUP;               // [TILE]
    EK_SHARED int32_t * cells  = (EK_SHARED int32_t *) bias + TILE; // [TILE], -1: none
    EK_SHARED float   * top    = (EK_SHARED float *) cells + TILE;  // [GROUP]
    EK_SHARED float   * total  = top + GROUP;                       // [GROUP]
    EK_SHARED float   * fade   = total + GROUP;                     // [GROUP]
    EK_SHARED float   * red    = fade + GROUP;                      // [warps][AT_ONCE][WIDTH]

    const uint32_t lane   = t.index % 32;
    const uint32_t warp   = t.index / 32;
    const uint32_t n_warp = t.count / 32;
    const uint32_t sub    = lane % LANES;                 // in its group of lanes
    const uint32_t first  = warp*ROWS + lane/LANES;       // this group of lanes
    const uint32_t step   = n_warp*ROWS;                  // how many there are

    const uint32_t unit  = t.y;
    const uint32_t h     = unit % a.n_head_kv;
    const uint32_t token = unit / a.n_head_kv % a.n_tokens;
    const uint32_t s     = unit / a.n_head_kv / a.n_tokens;
    const int32_t  head0 = (int32_t) t.z*GROUP;           // of the KV head's query heads
    const int32_t  n_q   = a.group - head0 < GROUP ? a.group - head0 : GROUP;

    keys   += h*a.nbk1 + s*a.nbk3;
    values += h*a.nbv1 + s*a.nbv3;
    mask   += token*a.nbm1 + s*a.nbm3;
    q      += token*a.nbq1 + (h*a.group + head0)*a.nbq2 + s*a.nbq3;

    // the first channel of each chunk; lanes beyond a row read its beginning, and their part counts for nothing
    int32_t at_k[CHUNKS];
    int32_t at_v[CHUNKS];
    float   query[GROUP*CHANNELS];
    EK_UNROLL
    for (int c = 0; c < CHUNKS; ++c) {
        const int32_t i = (int32_t) (c*LANES + sub)*8;
        at_k[c] = i < a.head_size   ? i : 0;
        at_v[c] = i < a.head_size_v ? i : 0;
        EK_UNROLL
        for (int j = 0; j < GROUP; ++j) {
            EK_GLOBAL const float * x = (EK_GLOBAL const float *) (q + (j < n_q ? j : 0)*a.nbq2) + at_k[c];
            EK_UNROLL
            for (int e = 0; e < 8; ++e) {
                query[j*CHANNELS + c*8 + e] = i < a.head_size ? x[e] : 0.0f;
            }
        }
    }

    float acc[GROUP*CHANNELS];
    EK_UNROLL
    for (int i = 0; i < GROUP*CHANNELS; ++i) {
        acc[i] = 0.0f;
    }
    if (t.index < GROUP) {
        top  [t.index] = EK_HIDDEN;
        total[t.index] = 0.0f;
    }

    const int32_t n_listed_cells = a.n_listed*a.page_size;
    const int32_t begin = (int32_t) t.x*a.per_part;
    const int32_t end   = n_listed_cells - begin < a.per_part ? n_listed_cells : begin + a.per_part;

    for (int32_t tile = begin; tile < end; tile += TILE) {
        // which cells, and what the mask adds
        for (int32_t c = t.index; c < TILE; c += t.count) {
            int32_t cell = -1;
            if (tile + c < end) {
                const int32_t p = (tile + c)/a.page_size;
                const int32_t page = a.all_pages ? p : pages[(uint64_t) unit*a.n_listed + p];
                if (page >= 0) {
                    cell = page*a.page_size + (tile + c)%a.page_size;
                    cell = cell < a.n_cells ? cell : -1;
                }
            }
            const uint16_t m = cell < 0 ? 0xFC00 : ek_load_2(mask + 2*(uint64_t) cell);
            bias [c] = m == 0xFC00 ? EK_HIDDEN : ek_half_to_float(m);
            cells[c] = m == 0xFC00 ? -1 : cell;
        }
        EK_BARRIER();

        // scores
        for (uint32_t c0 = first; c0 < TILE; c0 += step*AHEAD) {
            float sums[SUMS];
            EK_UNROLL
            for (int i = 0; i < SUMS; ++i) {
                sums[i] = 0.0f;
            }
            EK_UNROLL
            for (int u = 0; u < AHEAD; ++u) {
                const uint32_t c = c0 + u*step;
                const int32_t cell = c < TILE && cells[c] > 0 ? cells[c] : 0; // a hidden cell's score is not used
                EK_GLOBAL const uint8_t * row = keys + cell*a.nbk2;
                EK_UNROLL
                for (int k = 0; k < CHUNKS; ++k) {
                    float x[8];
                    ek_load8_of<TYPE_K, WIDE>(a.type_k, row, at_k[k], x);
                    EK_UNROLL
                    for (int j = 0; j < GROUP; ++j) {
                        EK_UNROLL
                        for (int e = 0; e < 8; ++e) {
                            sums[u*GROUP + j] = ek_fma(query[j*CHANNELS + k*8 + e], x[e], sums[u*GROUP + j]);
                        }
                    }
                }
            }
            ek_lanes_sums<SUMS, LANES>(sums, lane);
            EK_UNROLL
            for (int k = 0; k < OWN; ++k) {
                const uint32_t i = ek_sum_index<SUMS, LANES>(lane) + k;
                const uint32_t c = c0 + i/GROUP*step;
                if (c < TILE) {
                    float x = a.scale*sums[k];
                    if (a.softcap != 0.0f) {
                        x = a.softcap*ek_tanh(x/a.softcap);
                    }
                    x = cells[c] < 0 ? EK_HIDDEN : x + bias[c];
                    weight[c*GROUP + i%GROUP] = x < EK_HIDDEN ? EK_HIDDEN : x;
                }
            }
        }
        EK_BARRIER();

        // weights: a warp per query head
        for (uint32_t j = warp; j < GROUP; j += n_warp) {
            float most = EK_HIDDEN;
            for (uint32_t c = lane; c < TILE; c += 32) {
                most = ek_max(most, weight[c*GROUP + j]);
            }
            EK_UNROLL
            for (int m = 16; m > 0; m /= 2) {
                most = ek_max(most, ek_shuffle_xor(most, m));
            }
            const float before = top[j];
            const float now    = ek_max(before, most);

            float sum = 0.0f;
            for (uint32_t c = lane; c < TILE; c += 32) {
                const float x = weight[c*GROUP + j];
                const float w = x == EK_HIDDEN ? 0.0f : ek_exp(x - now);
                weight[c*GROUP + j] = w;
                sum += w;
            }
            sum = ek_lanes_sum<32>(sum);
            EK_WARP_BARRIER(); // all lanes have read top[j]
            if (lane == 0) {
                const float f = before == EK_HIDDEN ? 0.0f : ek_exp(before - now);
                fade [j] = f;
                total[j] = total[j]*f + sum;
                top  [j] = now;
            }
        }
        EK_BARRIER();

        // the weighted sum of the values
        EK_UNROLL
        for (int j = 0; j < GROUP; ++j) {
            const float f = fade[j];
            EK_UNROLL
            for (int i = 0; i < CHANNELS; ++i) {
                acc[j*CHANNELS + i] *= f;
            }
        }
        for (uint32_t c0 = first; c0 < TILE; c0 += step*AHEAD) {
            EK_UNROLL
            for (int u = 0; u < AHEAD; ++u) {
                const uint32_t c = c0 + u*step;
                const bool     in = c < TILE && cells[c] >= 0; // the same for the group of lanes
                if (!in) {
                    continue; // a hidden row may hold anything, NaN among it
                }
                EK_GLOBAL const uint8_t * row = values + cells[c]*a.nbv2;
                EK_UNROLL
                for (int k = 0; k < CHUNKS; ++k) {
                    float x[8];
                    ek_load8_of<TYPE_V, WIDE>(a.type_v, row, at_v[k], x);
                    EK_UNROLL
                    for (int j = 0; j < GROUP; ++j) {
                        const float w = weight[c*GROUP + j];
                        EK_UNROLL
                        for (int e = 0; e < 8; ++e) {
                            acc[j*CHANNELS + k*8 + e] = ek_fma(w, x[e], acc[j*CHANNELS + k*8 + e]);
                        }
                    }
                }
            }
        }
        EK_BARRIER();
    }
    EK_BARRIER(); // a part without cells has not met one

    // the groups of lanes of a warp, then the warps
    EK_UNROLL
    for (int m = LANES; m < 32; m *= 2) {
        EK_UNROLL
        for (int i = 0; i < GROUP*CHANNELS; ++i) {
            acc[i] += ek_shuffle_xor(acc[i], m);
        }
    }
    const uint64_t n_head = (uint64_t) a.group*a.n_head_kv;
    const uint64_t head   = (uint64_t) (token + (uint64_t) a.n_tokens*s)*n_head + h*a.group + head0;

    EK_UNROLL
    for (int j0 = 0; j0 < GROUP; j0 += AT_ONCE) {
        if (lane < LANES) {
            EK_UNROLL
            for (int j = 0; j < AT_ONCE; ++j) {
                EK_UNROLL
                for (int k = 0; k < CHUNKS; ++k) {
                    EK_UNROLL
                    for (int e = 0; e < 8; ++e) {
                        red[(warp*AT_ONCE + j)*WIDTH + (k*LANES + lane)*8 + e] = acc[(j0 + j)*CHANNELS + k*8 + e];
                    }
                }
            }
        }
        EK_BARRIER();
        for (int32_t j = j0; j < j0 + AT_ONCE && j < n_q; ++j) {
            EK_GLOBAL float * out = partials + ((head + j)*a.n_parts + t.x)*(a.head_size_v + 2);
            for (int32_t i = t.index; i < a.head_size_v; i += t.count) {
                float sum = 0.0f;
                for (uint32_t w = 0; w < n_warp; ++w) {
                    sum += red[(w*AT_ONCE + (j - j0))*WIDTH + i];
                }
                out[2 + i] = sum;
            }
            if (t.index == 0) {
                out[0] = top  [j];
                out[1] = total[j];
            }
        }
        EK_BARRIER();
    }
}

EK_FN void ek_attn_combine(
        EK_PARAM  ek_attn_args & a,
        EK_GLOBAL const float * partials,
        EK_GLOBAL const float * sinks,
        EK_GLOBAL float       * out,
        EK_SHARED uint8_t     * shared,
        ek_thread               t) {
    EK_SHARED float * weight = (EK_SHARED float *) shared; // [n_parts]

    const uint64_t n_head = (uint64_t) a.group*a.n_head_kv;
    const uint64_t head   = t.y*n_head + t.x;
    const uint64_t size   = a.head_size_v + 2;
    const float    sink   = a.has_sinks ? ek_max(sinks[t.x], EK_HIDDEN) : EK_HIDDEN;

    partials += head*a.n_parts*size;
    out      += head*a.head_size_v;

    float top = sink;
    for (int32_t p = t.index % 32; p < a.n_parts; p += 32) {
        top = ek_max(top, partials[p*size]);
    }
    EK_UNROLL
    for (int m = 16; m > 0; m /= 2) {
        top = ek_max(top, ek_shuffle_xor(top, m));
    }
    for (int32_t p = t.index; p < a.n_parts; p += t.count) {
        const float x = partials[p*size];
        weight[p] = x == EK_HIDDEN ? 0.0f : ek_exp(x - top);
    }
    EK_BARRIER();

    float total = sink == EK_HIDDEN ? 0.0f : ek_exp(sink - top);
    for (int32_t p = 0; p < a.n_parts; ++p) {
        total = ek_fma(weight[p], partials[p*size + 1], total);
    }
    const float scale = total == 0.0f ? 0.0f : 1.0f/total;
    for (int32_t i = t.index; i < a.head_size_v; i += t.count) {
        float sum = 0.0f;
        for (int32_t p = 0; p < a.n_parts; ++p) {
            sum = ek_fma(weight[p], partials[p*size + 2 + i], sum);
        }
        out[i] = scale*sum;
    }
}
