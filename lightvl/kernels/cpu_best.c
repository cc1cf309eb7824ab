/* The greatest logit without computing all of them exactly.

   Greedy decoding asks for one token of the whole vocabulary. A copy of the matrix in 7 bits a weight, which is read in
   two thirds of the time of the packed one, gives every logit up to an error that is bounded: by Cauchy and Schwarz, the
   length of x times the length of what rounding changed in the row. Only rows whose bound reaches the greatest certain
   value can be the greatest; these few hundred are computed exactly. Called from cpu.py, where the arguments are
   checked. */

#include <math.h>

#include "cpu_packed.h"
#include "cpu_tile.h"

enum {
    STEP = 64,  /* weights of a row that lie together */
    ZERO = 64,  /* what stands for 0 */
    MOST = 63,  /* and at most so far from it */
    FIRST = 128 /* of the numbers 128 to 255, which bfloat16 holds: its low byte is how far a number is from 128 */
};

/* w = scale * (byte - ZERO), about. */
typedef struct {
    uint8_t *steps;       /* (n / GROUP rounded up, k / STEP, GROUP, STEP), in the order of `weight_at` */
    float *scales;        /* (n) */
    float *errors;        /* (n): the length of w less that; somewhat more */
} Coarse;

/* How far off a logit of this row of x may be is reach * error + slack * scale. */
typedef struct {
    float reach, slack, shift;
} Bounds;

TARGET static Bounds bounds_of(const bf16 *x, long k) {
    double sum = 0, size = 0, squares = 0;
    for (long i = 0; i < k; i++) {
        double value = to_float(x[i]);
        sum += value, size += fabs(value), squares += value * value;
    }
    /* float32 sums of k / LANES terms in each lane, then of the lanes; the exact product's are no worse */
    double rounding = 4.0 * (k / LANES + 16) * 0x1p-24;
    return (Bounds){(float)(sqrt(squares) * 1.001), (float)(rounding * 2 * FIRST * size), (float)((FIRST + ZERO) * sum)};
}

/* GROUP rows from `first` on with num_x rows of x: sums of x * (FIRST + byte). */
INLINE void coarse_tile(const int num_x, const uint8_t *steps, const bf16 *x, float *y, long k) {
    __m512 sums[MAX_X][MAX_W];
    set_zero(num_x, GROUP, sums);
    __m512i high_byte = _mm512_set1_epi8(0x43), low[MAX_W], high[MAX_W]; /* 0x4300 is FIRST */
    for (long done = 0; done < k; done += STEP, steps += GROUP * STEP) {
#pragma GCC unroll 3
        for (int j = 0; j < GROUP; j++) {
            __m512i bytes = _mm512_loadu_si512(steps + j * STEP);
            _mm_prefetch((const char *)(steps + j * STEP + AHEAD * UNIT_BYTES), _MM_HINT_T0);
            low[j] = _mm512_unpacklo_epi8(bytes, high_byte), high[j] = _mm512_unpackhi_epi8(bytes, high_byte);
        }
        multiply_add(num_x, GROUP, sums, low, x + done, k, ~0u);
        multiply_add(num_x, GROUP, sums, high, x + done + LANES, k, ~0u);
    }
    write_sums(num_x, GROUP, sums, y);
}

/* `rows` rows of the matrix, from `first` on: what each logit is at most, to most (m, n); raises `certain` (m), what the
   greatest is at least. */
INLINE void bound_rows(const int m, const Coarse *c, const Bounds *bounds, long first, long rows, const bf16 *x, float *most,
                       float *certain, long k, long n) {
    float sums[MAX_X * MAX_BLOCK];
    for (long row = 0; row < rows; row += GROUP) coarse_tile(m, c->steps + (first + row) * k, x, sums + row, k);
    for (int i = 0; i < m; i++) {
        __m512 least = _mm512_set1_ps(-INFINITY);
        for (long row = 0; row < rows; row += 16) {
            __mmask16 mask = lanes(rows - row);
            __m512 scale = _mm512_maskz_loadu_ps(mask, c->scales + first + row);
            __m512 error = _mm512_maskz_loadu_ps(mask, c->errors + first + row);
            __m512 sum = _mm512_maskz_loadu_ps(mask, sums + i * MAX_BLOCK + row);
            __m512 logit = _mm512_mul_ps(scale, _mm512_sub_ps(sum, _mm512_set1_ps(bounds[i].shift)));
            __m512 off = _mm512_fmadd_ps(error, _mm512_set1_ps(bounds[i].reach),
                                         _mm512_mul_ps(scale, _mm512_set1_ps(bounds[i].slack)));
            _mm512_mask_storeu_ps(most + i * n + first + row, mask, _mm512_add_ps(logit, off));
            least = _mm512_mask_max_ps(least, mask, least, _mm512_sub_ps(logit, off));
        }
        certain[i] = fmaxf(certain[i], _mm512_reduce_max_ps(least));
    }
}

TARGET static void bound_block(const Coarse *c, const Bounds *bounds, long first, long rows, const bf16 *x, float *most,
                               float *certain, long m, long k, long n) {
    switch (m) {
    case 1: bound_rows(1, c, bounds, first, rows, x, most, certain, k, n); break;
    case 2: bound_rows(2, c, bounds, first, rows, x, most, certain, k, n); break;
    case 3: bound_rows(3, c, bounds, first, rows, x, most, certain, k, n); break;
    case 4: bound_rows(4, c, bounds, first, rows, x, most, certain, k, n); break;
    case 5: bound_rows(5, c, bounds, first, rows, x, most, certain, k, n); break;
    case 6: bound_rows(6, c, bounds, first, rows, x, most, certain, k, n); break;
    case 7: bound_rows(7, c, bounds, first, rows, x, most, certain, k, n); break;
    default: bound_rows(8, c, bounds, first, rows, x, most, certain, k, n);
    }
}

/* y: logits of one row of x, those of `rows` rows of the matrix from `first` on; minus infinity where `most` is less than
   `needed` (nowhere where that is not a number). */
TARGET static void settle_block(const Packed *w, long first, long rows, const bf16 *x, const float *most, float needed,
                                bf16 *y) {
    for (long row = first; row < first + rows; row += 16) {
        __mmask16 mask = lanes(first + rows - row);
        __m512 bound = _mm512_maskz_loadu_ps(mask, most + row);
        uint32_t left = _mm512_mask_cmp_ps_mask(mask, bound, _mm512_set1_ps(needed), _CMP_NLT_UQ);
        store(y + row, mask, _mm512_set1_ps(-INFINITY));
        for (; left != 0; left &= left - 1) {
            long found = row + __builtin_ctz(left), group = found / GROUP * GROUP;
            float logits[GROUP];
            lightvl_multiply_group(w, group, x, logits);
            y[found] = to_bf16(logits[found - group]);
        }
    }
}

/* x (m, k) with m <= MAX_X; y (m, n): every logit that is the greatest of its row when rounded, exactly as
   lightvl_packed_linear gives it; the others too, or minus infinity. most (m, n) is for the kernel's own use. */
void lightvl_best(const Packed *w, const Coarse *c, const bf16 *x, bf16 *y, float *most, long m, int num_threads) {
    long n = w->n, k = w->k, num_blocks = (n + MAX_BLOCK - 1) / MAX_BLOCK;
    Bounds bounds[MAX_X];
    float certain[MAX_X];
    for (long i = 0; i < m; i++) bounds[i] = bounds_of(x + i * k, k), certain[i] = -INFINITY;
#pragma omp parallel num_threads(num_threads)
    {
        float own[MAX_X];
        for (long i = 0; i < m; i++) own[i] = -INFINITY;
#pragma omp for schedule(dynamic, 1) nowait
        for (long b = 0; b < num_blocks; b++) {
            long first = b * MAX_BLOCK, rows = n - first < MAX_BLOCK ? n - first : MAX_BLOCK;
            bound_block(c, bounds, first, rows, x, most, own, m, k, n);
        }
#pragma omp critical
        for (long i = 0; i < m; i++) certain[i] = fmaxf(certain[i], own[i]);
#pragma omp barrier
#pragma omp for schedule(dynamic, 16)
        for (long b = 0; b < num_blocks; b++) {
            long first = b * MAX_BLOCK, rows = n - first < MAX_BLOCK ? n - first : MAX_BLOCK;
            for (long i = 0; i < m; i++) {
                /* Logits that round to the same bfloat16 are equal: they lie within 1 / 128 of each other. */
                float needed = certain[i] - fabsf(certain[i]) * 0x1p-6f;
                settle_block(w, first, rows, x + i * k, most + i * n, needed, y + i * n);
            }
        }
    }
}

TARGET static void coarsen_row(const bf16 *w, uint8_t *steps, float *scale, float *error, long k) {
    float most = 0;
    for (long i = 0; i < k; i++) most = fmaxf(most, fabsf(to_float(w[i])));
    *scale = most / MOST;
    double squares = 0;
    int is_finite = 1;
    for (long i = 0; i < k; i++) {
        long from = i / STEP * STEP + weight_at(i % STEP);
        float value = to_float(w[from]);
        is_finite &= isfinite(value) != 0;
        int number = is_finite && most > 0 ? (int)lrintf(value / *scale) : 0;
        double off = (double)value - (double)number * *scale;
        squares += off * off;
        steps[i / STEP * GROUP * STEP + i % STEP] = (uint8_t)(ZERO + number);
    }
    *error = is_finite ? (float)(sqrt(squares) * 1.001) : INFINITY; /* then the row is always computed exactly */
}

/* w (n, k), k a multiple of STEP; fills c. */
void lightvl_coarsen(const bf16 *w, const Coarse *c, long n, long k, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long row = 0; row < n; row++) {
        uint8_t *steps = c->steps + row / GROUP * GROUP * k + row % GROUP * STEP;
        coarsen_row(w + row * k, steps, c->scales + row, c->errors + row, k);
    }
}
