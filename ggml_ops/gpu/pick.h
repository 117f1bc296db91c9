#pragma once

// The highest of many ranks, in the order of their indices: for the choice of cells and for that of pages.
//
//   ranks   any type with uint32_t operator()(uint32_t i) const, called several times per item:
//           0 (EK_NEVER): item i is not picked; 0xFFFFFFFF (EK_ALWAYS): it is, and is not one of the wanted;
//           else (ek_rank) the higher the better
//   n       items, below 2^31
//   wanted  of those that compete; all of them if there are no more. Ties go to the later item
//   words   EK_PICK_WORDS words of shared memory, for both functions
//
// All threads of the block call both with the same arguments and get the same result:
//
//   const ek_cut cut = ek_pick(ranks, n, wanted, words, t);
//   const uint32_t n_written = ek_pick_write(ranks, n, cut, first, out, words, t); // out[..] = first + i, ascending
//
// Whatever `ranks` reads must be there for the whole block before the first call (a barrier, if the block wrote it).

enum : uint32_t {
    EK_NEVER  = 0,
    EK_ALWAYS = 0xFFFFFFFFu,
};

// Orders like the score; -0 equals 0, NaN is below everything (but above EK_NEVER).
EK_FN uint32_t ek_rank(float score) {
    uint32_t u = ek_bits(score);
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) {
        return 1;
    }
    if ((u & 0x7FFFFFFFu) == 0) {
        u = 0;
    }
    return ((u & 0x80000000u) ? ~u : (u | 0x80000000u)) + 1;
}

// ranks of scores
struct ek_score_ranks {
    EK_GLOBAL const float * scores;

    EK_METHOD uint32_t operator()(uint32_t i) const { return ek_rank(scores[i]); }
};

// ranks that were found before
struct ek_stored_ranks {
    EK_GLOBAL const uint32_t * ranks;

    EK_METHOD uint32_t operator()(uint32_t i) const { return ranks[i]; }
};

// What is picked: all that rank above `rank`, and those that rank like it but for the first `skip` of them.
// To pick all but the EK_NEVER ones: { EK_NEVER + 1, 0 }.
struct ek_cut {
    uint32_t rank;
    uint32_t skip;
};

// Ranks of one step lie close together: they are counted in bins between the least and the greatest, then again in the
// bin where the last wanted one is, until a bin is one rank or all of it is wanted.
template <typename RANKS>
EK_FN ek_cut ek_pick(RANKS ranks, uint32_t n, uint32_t wanted, EK_SHARED uint32_t * words, ek_thread t) {
    EK_SHARED uint32_t * bins    = words;
    EK_SHARED uint32_t * scratch = bins + EK_PICK_BINS;
    EK_SHARED uint32_t * found   = scratch + 64;

    ek_cut cut;
    cut.rank = EK_ALWAYS;
    cut.skip = 0;
    if (wanted == 0) {
        return cut;
    }

    uint32_t least    = EK_ALWAYS;
    uint32_t greatest = EK_NEVER;
    for (uint32_t i = t.index; i < n; i += t.count) {
        const uint32_t r = ranks(i);
        if (r != EK_NEVER && r != EK_ALWAYS) {
            least    = r < least    ? r : least;
            greatest = r > greatest ? r : greatest;
        }
    }
    ek_block_range(least, greatest, scratch, t);
    if (least > greatest) { // none
        return cut;
    }

    uint32_t shift = 0;
    while ((greatest - least) >> shift >= EK_PICK_BINS) {
        ++shift;
    }

    const uint32_t each = (EK_PICK_BINS + t.count - 1)/t.count; // bins of a thread; the first has the highest

    while (true) {
        for (uint32_t b = t.index; b < EK_PICK_BINS; b += t.count) {
            bins[b] = 0;
        }
        EK_BARRIER();
        for (uint32_t i = t.index; i < n; i += t.count) {
            const uint32_t r = ranks(i);
            if (r >= least && r <= greatest) {
                ek_atomic_add(bins + ((r - least) >> shift), 1);
            }
        }
        EK_BARRIER();

        uint32_t sum = 0;
        for (uint32_t k = t.index*each; k < (t.index + 1)*each && k < EK_PICK_BINS; ++k) {
            sum += bins[EK_PICK_BINS - 1 - k];
        }
        uint32_t total;
        uint32_t above = ek_block_scan(sum, total, scratch, t) - sum;

        if (total <= wanted) {
            cut.rank = least;
            return cut;
        }
        if (above < wanted && above + sum >= wanted) {
            uint32_t b = EK_PICK_BINS - 1 - t.index*each;
            while (above + bins[b] < wanted) {
                above += bins[b--];
            }
            found[0] = b;
            found[1] = bins[b];
            found[2] = wanted - above;
        }
        EK_BARRIER();

        const uint32_t size = found[1];
        const uint32_t last = (1u << shift) - 1; // of the bin, from its first

        wanted = found[2];
        least += found[0] << shift;
        greatest = greatest - least > last ? least + last : greatest;

        if (size == wanted || shift == 0) {
            cut.rank = least;
            cut.skip = size - wanted;
            return cut;
        }
        shift = shift > EK_PICK_BITS ? shift - EK_PICK_BITS : 0;
    }
}

// out[0], out[1], ... = first + i for the picked items i; the result is how many there are
template <typename RANKS>
EK_FN uint32_t ek_pick_write(RANKS ranks, uint32_t n, ek_cut cut, int32_t first, EK_GLOBAL int32_t * out,
        EK_SHARED uint32_t * words, ek_thread t) {
    EK_SHARED uint32_t * scratch = words + EK_PICK_BINS;

    uint32_t above = 0; // that rank above the cut, and like it, so far
    uint32_t equal = 0;

    for (uint32_t begin = 0; begin < n; begin += EK_PICK_EACH*t.count) {
        const uint32_t i = begin + EK_PICK_EACH*t.index;

        uint32_t rank[EK_PICK_EACH];
        uint32_t own = 0; // both numbers in one: a tile has fewer than 2^16 items
        EK_UNROLL
        for (uint32_t j = 0; j < EK_PICK_EACH; ++j) {
            rank[j] = i + j < n ? ranks(i + j) : EK_NEVER;
            own += rank[j] > cut.rank ? 1u : rank[j] == cut.rank ? 1u << 16 : 0u;
        }
        uint32_t total;
        const uint32_t before = ek_block_scan(own, total, scratch, t) - own;

        uint32_t a = above + (before & 0xFFFF);
        uint32_t e = equal + (before >> 16);
        EK_UNROLL
        for (uint32_t j = 0; j < EK_PICK_EACH; ++j) {
            if (rank[j] > cut.rank) {
                out[a + (e > cut.skip ? e - cut.skip : 0)] = first + (int32_t) (i + j);
                ++a;
            } else if (rank[j] == cut.rank) {
                if (e >= cut.skip) {
                    out[a + e - cut.skip] = first + (int32_t) (i + j);
                }
                ++e;
            }
        }
        above += total & 0xFFFF;
        equal += total >> 16;
    }
    return above + (equal > cut.skip ? equal - cut.skip : 0);
}
