/* y = x W^T + b in bfloat16 for few rows of x, at the speed at which memory delivers W.

   Decoding multiplies one to a hundred rows with every weight of the model: each weight is read from memory once and
   used a few times, so the reading is all that counts. W stays as the checkpoint has it, (n, k) row by row; a thread
   walks down a block of its rows, with the rows that come next on their way into the second-level cache meanwhile.
   Blocks are handed out one by one, since a core that also hosts the event loop gets fewer of them done.

   Called from cpu.py, where the arguments are checked. Products and sums are in float32 (vdpbf16ps). */

#include "cpu_common.h"

enum {
    LANES = 32,    /* bfloat16 values in a register */
    MAX_X = 8,     /* rows of x in one tile */
    MAX_W = 4,     /* rows of W in one tile */
    MAX_BLOCK = 96 /* rows of W handed out at once: a multiple of 3 and 4 */
};

/* One step along k for num_x rows of x and num_w of W; both are constants where this is inlined. */
INLINE void multiply_add(const int num_x, const int num_w, __m512 sums[MAX_X][MAX_W], const bf16 *w, const bf16 *x, long k,
                         __mmask32 mask) {
    __m512bh w_lanes[MAX_W];
#pragma GCC unroll 4
    for (int j = 0; j < num_w; j++) {
        w_lanes[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + j * k);
        /* To the second level: into the first, the prefetches would push out x. */
        _mm_prefetch((const char *)(w + (num_w + j) * k), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int i = 0; i < num_x; i++) {
        __m512bh x_lanes = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i * k);
#pragma GCC unroll 4
        for (int j = 0; j < num_w; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], w_lanes[j], x_lanes);
    }
}

/* The sums of the lanes of a, b, c and d; each is added up in the same order. */
INLINE __m128 sums_of_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
    __m512 abcd = _mm512_add_ps(low, high);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* y (num_x, num_w), rows MAX_BLOCK apart. */
INLINE void tile(const int num_x, const int num_w, const bf16 *w, const bf16 *x, float *y, long k) {
    __m512 sums[MAX_X][MAX_W];
#pragma GCC unroll 8
    for (int i = 0; i < num_x; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < num_w; j++) sums[i][j] = _mm512_setzero_ps();
    }
    long done = 0;
    for (; done + LANES <= k; done += LANES) multiply_add(num_x, num_w, sums, w + done, x + done, k, ~0u);
    if (done < k) multiply_add(num_x, num_w, sums, w + done, x + done, k, (1u << (k - done)) - 1);
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

/* num_x rows of x with `rows` rows of W. The tile's sums and operands fill the 32 registers. */
INLINE void strip(const int num_x, const bf16 *w, const bf16 *x, float *y, long k, long rows) {
    const int num_w = num_x == 1 ? 1 : num_x <= 4 ? 4 : 3;
    long row = 0;
    for (; row + num_w <= rows; row += num_w) tile(num_x, num_w, w + row * k, x, y + row, k);
    for (; row < rows; row++) tile(num_x, 1, w + row * k, x, y + row, k);
}

TARGET static void block(const bf16 *w, const bf16 *x, const bf16 *bias, bf16 *y, long m, long k, long n, long rows) {
    float sums[MAX_X * MAX_BLOCK];
    for (long tiles = (m + MAX_X - 1) / MAX_X; tiles > 0; tiles--) {
        long num_x = (m + tiles - 1) / tiles; /* of equal size: one row alone would read all of W again */
        switch (num_x) {
        case 1: strip(1, w, x, sums, k, rows); break;
        case 2: strip(2, w, x, sums, k, rows); break;
        case 3: strip(3, w, x, sums, k, rows); break;
        case 4: strip(4, w, x, sums, k, rows); break;
        case 5: strip(5, w, x, sums, k, rows); break;
        case 6: strip(6, w, x, sums, k, rows); break;
        case 7: strip(7, w, x, sums, k, rows); break;
        default: strip(8, w, x, sums, k, rows);
        }
        for (long i = 0; i < num_x; i++) {
            for (long row = 0; row < rows; row += 16) {
                __mmask16 mask = lanes(rows - row);
                __m512 sum = _mm512_maskz_loadu_ps(mask, sums + i * MAX_BLOCK + row);
                if (bias) sum = _mm512_add_ps(sum, load(bias + row, mask));
                store(y + i * n + row, mask, sum);
            }
        }
        m -= num_x, x += num_x * k, y += num_x * n;
    }
}

/* x (m, k), w (n, k), bias (n) or null, y (m, n), all dense. */
void lightvl_linear(const bf16 *w, const bf16 *x, const bf16 *bias, bf16 *y, long m, long k, long n, int num_threads) {
    long share = n / (8L * num_threads) / 12 * 12; /* eight blocks a thread at least, where there are rows for it */
    long block_rows = share < 12 ? 12 : share > MAX_BLOCK ? MAX_BLOCK : share;
    long num_blocks = (n + block_rows - 1) / block_rows;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (long b = 0; b < num_blocks; b++) {
        long row = b * block_rows;
        long rows = n - row < block_rows ? n - row : block_rows;
        block(w + row * k, x, bias ? bias + row : 0, y + row, m, k, n, rows);
    }
}
