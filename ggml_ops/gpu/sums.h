#pragma once

// Many sums over the lanes of a warp at once: in each step a lane gives half of its numbers away.

// one step and those after it; a struct, so that it unfolds for sure and the numbers stay in registers
template <int N, int M, int LANES>
struct ek_fold {
    EK_FN void sums(EK_LOCAL float * v, uint32_t lane) {
        enum { HALF = N*M/LANES };
        const bool up = (lane & M) != 0;
        if (HALF == 0) {
            v[0] += ek_shuffle_xor(v[0], M);
        }
        EK_UNROLL
        for (int i = 0; i < HALF; ++i) {
            const float send = up ? v[i] : v[i + HALF];
            const float keep = up ? v[i + HALF] : v[i];
            v[i] = keep + ek_shuffle_xor(send, M);
        }
        ek_fold<N, M/2, LANES>::sums(v, lane);
    }
};

template <int N, int LANES>
struct ek_fold<N, 0, LANES> {
    EK_FN void sums(EK_LOCAL float *, uint32_t) {}
};

// Sums N values over LANES adjacent lanes, both powers of two. Afterwards v[k] of a lane is the sum of value
// ek_sum_index<N, LANES>(lane) + k, k < N/LANES (or one value, in LANES/N lanes each).
template <int N, int LANES>
EK_FN void ek_lanes_sums(EK_LOCAL float * v, uint32_t lane) {
    ek_fold<N, LANES/2, LANES>::sums(v, lane);
}

template <int N, int LANES>
EK_FN uint32_t ek_sum_index(uint32_t lane) {
    return N >= LANES ? (lane % LANES)*(N/LANES) : (lane % LANES)/(N >= LANES ? 1 : LANES/N);
}
