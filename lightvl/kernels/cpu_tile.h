/* A tile of a matrix product: a few rows of x with a few of W, whose sums stay in registers. */
#ifndef LIGHTVL_CPU_TILE_H
#define LIGHTVL_CPU_TILE_H

#include "cpu_common.h"

enum {
    LANES = 32,    /* bfloat16 values in a register */
    MAX_X = 8,     /* rows of x in one tile */
    MAX_W = 4,     /* rows of W in one tile */
    MAX_BLOCK = 96 /* rows of W handed out at once: a multiple of 4 and GROUP, as all blocks but the last have */
};

/* Adds to the sums of num_x rows of x and num_w of W: both are constants where this is inlined. */
INLINE void multiply_add(const int num_x, const int num_w, __m512 sums[MAX_X][MAX_W], const __m512i w[MAX_W],
                         const bf16 *x, long k, __mmask32 mask) {
#pragma GCC unroll 8
    for (int i = 0; i < num_x; i++) {
        __m512bh x_lanes = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i * k);
#pragma GCC unroll 4
        for (int j = 0; j < num_w; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)w[j], x_lanes);
    }
}

INLINE void set_zero(const int num_x, const int num_w, __m512 sums[MAX_X][MAX_W]) {
#pragma GCC unroll 8
    for (int i = 0; i < num_x; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < num_w; j++) sums[i][j] = _mm512_setzero_ps();
    }
}

/* y (num_x, num_w), rows MAX_BLOCK apart. */
INLINE void write_sums(const int num_x, const int num_w, __m512 sums[MAX_X][MAX_W], float *y) {
    const int num = num_x * num_w;
#define SUM(f) (f < num ? sums[(f) / num_w][(f) % num_w] : _mm512_setzero_ps())
#pragma GCC unroll 6
    for (int f = 0; f < num; f += 4) {
        __m128 four = sums_of_lanes(SUM(f), SUM(f + 1), SUM(f + 2), SUM(f + 3));
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) {
            if (f + e < num) y[(f + e) / num_w * MAX_BLOCK + (f + e) % num_w] = _mm_cvtss_f32(four);
            four = _mm_shuffle_ps(four, four, 0x39);
        }
    }
#undef SUM
}

#endif
