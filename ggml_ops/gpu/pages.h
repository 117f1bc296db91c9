#pragma once

// Which pages a decode step reads: their scores and the choice (Quest, arXiv 2406.10774, section 3.3).

// LANES lanes of CHANNELS channels each hold a row of summaries, read once for GROUP query heads (a power of two). Groups with
// more read it again, from a cache: two numbers per channel and query head are in registers.
template <int LANES, int CHANNELS, int GROUP>
EK_FN void ek_page_scores(
        EK_PARAM  ek_page_scores_args & a,
        EK_GLOBAL const uint8_t * q,
        EK_GLOBAL const uint8_t * summaries,
        EK_GLOBAL float         * out,
        ek_thread                 t) {
    enum {
        CHUNKS = CHANNELS/8,
        ROWS   = 32/LANES,                             // that a warp works on at once
        AHEAD  = GROUP*4 <= LANES ? 4 : LANES/GROUP,   // that a group of lanes loads at once
        SUMS   = AHEAD*GROUP,                          // no more than lanes
        COPIES = LANES/SUMS,                           // lanes that end with the same sum
    };

    const uint32_t lane  = t.index % 32;
    const uint32_t sub   = lane % LANES;
    const uint32_t step  = t.count/32*ROWS;

    const uint32_t h     = t.y;
    const uint32_t token = t.z % a.n_tokens;
    const uint32_t s     = t.z / a.n_tokens;

    q         += token*a.nbq1 + h*a.group*a.nbq2 + s*a.nbq3;
    summaries += h*a.nbs1 + s*a.nbs3;
    out       += ((uint64_t) t.z*a.n_head_kv + h)*a.n_pages;

    const int32_t begin = (int32_t) t.x*EK_PAGES_TILE;

    for (int32_t head0 = 0; head0 < a.group; head0 += GROUP) {
        const int32_t n_q = a.group - head0 < GROUP ? a.group - head0 : GROUP;

        // <[q+, q-], [max, min]> is the bound: no comparison in the loop
        int32_t at[CHUNKS];
        float   high[GROUP*CHANNELS];
        float   low [GROUP*CHANNELS];
        EK_UNROLL
        for (int c = 0; c < CHUNKS; ++c) {
            const int32_t i  = (int32_t) (c*LANES + sub)*8;
            const bool    in = i < a.head_size;
            at[c] = in ? i : 0;
            EK_UNROLL
            for (int j = 0; j < GROUP; ++j) {
                EK_GLOBAL const float * x = (EK_GLOBAL const float *) (q + (head0 + (j < n_q ? j : 0))*a.nbq2) + at[c];
                EK_UNROLL
                for (int e = 0; e < 8; ++e) {
                    const float y = in ? x[e] : 0.0f;
                    high[j*CHANNELS + c*8 + e] = ek_max(y, 0.0f);
                    low [j*CHANNELS + c*8 + e] = ek_min(y, 0.0f);
                }
            }
        }

        // every lane of a warp goes round as often: they sum together
        for (uint32_t p0 = t.index/32*ROWS; p0 < EK_PAGES_TILE; p0 += step*AHEAD) {
            float sums[SUMS];
            EK_UNROLL
            for (int i = 0; i < SUMS; ++i) {
                sums[i] = 0.0f;
            }
            EK_UNROLL
            for (int u = 0; u < AHEAD; ++u) {
                const int32_t p = begin + (int32_t) (p0 + lane/LANES + u*step);
                EK_GLOBAL const uint8_t * row = summaries + (p < a.n_pages ? p : 0)*a.nbs2;
                EK_UNROLL
                for (int c = 0; c < CHUNKS; ++c) {
                    float hi[8];
                    float lo[8];
                    ek_load8<EK_F16, true>(row, at[c], hi);
                    ek_load8<EK_F16, true>(row + 2*a.head_size, at[c], lo);
                    // beyond the row it is the first channels again, and 0 times their infinity would be NaN
                    const bool in = (int32_t) (c*LANES + sub)*8 < a.head_size;
                    EK_UNROLL
                    for (int e = 0; e < 8; ++e) {
                        hi[e] = in ? hi[e] : 0.0f;
                        lo[e] = in ? lo[e] : 0.0f;
                    }
                    EK_UNROLL
                    for (int j = 0; j < GROUP; ++j) {
                        EK_UNROLL
                        for (int e = 0; e < 8; ++e) {
                            const int i = j*CHANNELS + c*8 + e;
                            sums[u*GROUP + j] = ek_fma(high[i], hi[e], ek_fma(low[i], lo[e], sums[u*GROUP + j]));
                        }
                    }
                }
            }
            ek_lanes_sums<SUMS, LANES>(sums, lane);

            // the greatest of the query heads; NaN is infinity times 0: nothing is known
            const uint32_t i = ek_sum_index<SUMS, LANES>(lane);
            float best = ek_is_nan(sums[0]) ? ek_float(0x7F800000u) : sums[0];
            best = (int32_t) (i % GROUP) < n_q ? best : ek_float(0xFF800000u);
            EK_UNROLL
            for (int m = COPIES; m < COPIES*GROUP; m *= 2) {
                best = ek_max(best, ek_shuffle_xor(best, m));
            }
            const int32_t in_tile = (int32_t) (p0 + lane/LANES + i/GROUP*step);
            const int32_t p = begin + in_tile;
            if (sub % (COPIES*GROUP) == 0 && in_tile < EK_PAGES_TILE && p < a.n_pages) {
                out[p] = head0 == 0 ? best : ek_max(best, out[p]); // the same lane wrote it
            }
        }
    }
}

EK_FN bool ek_page_visible(EK_GLOBAL const uint8_t * mask, int32_t first, int32_t last) {
    for (int32_t c = first; c < last; ++c) {
        if (ek_load_2(mask + 2*(uint64_t) c) != 0xFC00) { // -inf
            return true;
        }
    }
    return false;
}

EK_FN void ek_choose_pages(
        EK_PARAM  ek_choose_pages_args & a,
        EK_GLOBAL const float   * scores,
        EK_GLOBAL const uint8_t * mask,
        EK_GLOBAL uint32_t      * ranks,
        EK_GLOBAL int32_t       * out,
        EK_GLOBAL uint32_t      * counters,
        EK_SHARED uint8_t       * shared,
        ek_thread                 t) {
    enum { EACH = 4 }; // adjacent pages of a thread

    EK_SHARED uint32_t * words = (EK_SHARED uint32_t *) shared;

    const uint64_t unit = t.x + (uint64_t) a.n_head_kv*t.y;
    scores += unit*a.n_pages;
    ranks  += unit*a.n_pages;
    out    += unit*a.n_chosen;
    mask   += t.y%a.n_tokens*a.nbm1 + t.y/a.n_tokens*a.nbm3;

    // the visible pages, counted in their order: the first ones and the last one are always read
    uint32_t n_seen = 0;
    uint32_t last   = 0; // of this thread's: its number, from 1 on
    int32_t  last_p = 0;
    for (int32_t begin = 0; begin < a.n_pages; begin += EACH*t.count) {
        const int32_t p0 = begin + EACH*t.index;
        bool     visible[EACH];
        uint32_t own = 0;
        EK_UNROLL
        for (int j = 0; j < EACH; ++j) {
            const int64_t first = (int64_t) (p0 + j)*a.page_size;
            visible[j] = p0 + j < a.n_pages && first < a.n_cells &&
                         ek_page_visible(mask, first, first + a.page_size < a.n_cells ? first + a.page_size : a.n_cells);
            own += visible[j] ? 1 : 0;
        }
        uint32_t total;
        uint32_t number = n_seen + ek_block_scan(own, total, words, t) - own;
        n_seen += total;
        EK_UNROLL
        for (int j = 0; j < EACH; ++j) {
            if (p0 + j >= a.n_pages) {
                continue;
            }
            uint32_t rank = EK_NEVER;
            if (visible[j]) {
                last   = ++number;
                last_p = p0 + j;
                rank   = (int32_t) number <= a.n_first ? (uint32_t) EK_ALWAYS : ek_rank(scores[p0 + j]);
            }
            ranks[p0 + j] = rank;
        }
    }
    if (last > 0 && last == n_seen) {
        ranks[last_p] = EK_ALWAYS;
    }
    EK_BARRIER();

    ek_stored_ranks stored;
    stored.ranks = ranks;

    ek_cut cut;
    cut.rank = EK_NEVER; // all that are visible
    cut.skip = 0xFFFFFFFFu;
    if ((int32_t) n_seen > a.n_chosen) {
        cut = ek_pick(stored, a.n_pages, a.n_chosen - a.n_first - 1, words, t);
    }
    const uint32_t n = ek_pick_write(stored, a.n_pages, cut, 0, out, words, t);
    for (int32_t i = n + t.index; i < a.n_chosen; i += t.count) {
        out[i] = -1;
    }

    if (a.counted && t.index == 0) {
        ek_count(counters + 4, n);
        ek_count(counters + 6, n_seen);
        if (unit == 0) {
            ek_count(counters + 2, 1);
        }
    }
}
