#pragma once

// What the threads of a warp or a block find out together.

// the sum over the lanes of a group of N adjacent ones (N a power of two), in all of them
template <int N>
EK_FN float ek_lanes_sum(float x) {
    EK_UNROLL
    for (int m = N/2; m > 0; m /= 2) {
        x += ek_shuffle_xor(x, m);
    }
    return x;
}

// x summed over the threads before this one in its warp, this one's included
EK_FN uint32_t ek_warp_scan(uint32_t x, uint32_t lane) {
    EK_UNROLL
    for (uint32_t d = 1; d < 32; d *= 2) {
        const uint32_t y = ek_shuffle_up(x, d);
        x += lane >= d ? y : 0;
    }
    return x;
}

// The same over the block; `total` is the sum over all. scratch has 33 words. All threads of the block must call it; it
// ends with a barrier, so scratch may be used again at once.
EK_FN uint32_t ek_block_scan(uint32_t x, EK_LOCAL uint32_t & total, EK_SHARED uint32_t * scratch, ek_thread t) {
    const uint32_t lane = t.index % 32;
    const uint32_t warp = t.index / 32;

    x = ek_warp_scan(x, lane);
    if (lane == 31) {
        scratch[warp] = x;
    }
    EK_BARRIER();
    if (warp == 0) {
        const uint32_t y = lane < t.count/32 ? scratch[lane] : 0;
        const uint32_t s = ek_warp_scan(y, lane);
        scratch[lane] = s - y;
        if (lane == 31) {
            scratch[32] = s;
        }
    }
    EK_BARRIER();
    x += scratch[warp];
    total = scratch[32];
    EK_BARRIER();
    return x;
}

// the least `least` and the greatest `greatest` of the warp, in all of its lanes
EK_FN void ek_warp_range(EK_LOCAL uint32_t & least, EK_LOCAL uint32_t & greatest) {
    EK_UNROLL
    for (uint32_t m = 16; m > 0; m /= 2) {
        const uint32_t lo = ek_shuffle_xor(least,    m);
        const uint32_t hi = ek_shuffle_xor(greatest, m);
        least    = lo < least    ? lo : least;
        greatest = hi > greatest ? hi : greatest;
    }
}

// The same over the block. scratch has 64 words. All threads of the block must call it; it ends with a barrier.
EK_FN void ek_block_range(EK_LOCAL uint32_t & least, EK_LOCAL uint32_t & greatest, EK_SHARED uint32_t * scratch,
        ek_thread t) {
    const uint32_t lane = t.index % 32;
    const uint32_t warp = t.index / 32;
    const uint32_t from = lane < t.count/32 ? lane : 0;

    ek_warp_range(least, greatest);
    if (lane == 0) {
        scratch[warp]      = least;
        scratch[32 + warp] = greatest;
    }
    EK_BARRIER();
    least    = scratch[from];
    greatest = scratch[32 + from];
    ek_warp_range(least, greatest);
    EK_BARRIER();
}

// adds n to a number of 64 bits that many blocks and operators may add to: its low word, then the high one
EK_FN void ek_count(EK_GLOBAL uint32_t * words, uint32_t n) {
    const uint32_t low = ek_atomic_add_global(words, n);
    if (low + n < low) {
        ek_atomic_add_global(words + 1, 1);
    }
}
