/* y = x W^T + b in bfloat16 for few rows of x, at the speed at which memory delivers W.

   Decoding multiplies one to a hundred rows with every weight of the model: each weight is read from memory once and
   used a few times, so the reading is all that counts. W is packed (cpu_packed.h), and unpacked in registers, or it is
   as the checkpoint has it, (n, k) row by row. A thread walks down a block of its rows, with what comes next on its way
   into the cache meanwhile. Blocks are handed out one by one, since a core that also hosts the event loop gets fewer of
   them done.

   Called from cpu.py, where the arguments are checked. Products and sums are in float32 (vdpbf16ps). */

#include <omp.h>

#include "cpu_team.h"
#include "cpu_tile.h"

INLINE void plain_step(const int num_x, const int num_w, __m512 sums[MAX_X][MAX_W], const bf16 *w, const bf16 *x, long k,
                       __mmask32 mask) {
    __m512i w_lanes[MAX_W];
#pragma GCC unroll 4
    for (int j = 0; j < num_w; j++) {
        w_lanes[j] = _mm512_maskz_loadu_epi16(mask, w + j * k);
        /* To the second level: into the first, the prefetches would push out x. */
        _mm_prefetch((const char *)(w + (num_w + j) * k), _MM_HINT_T1);
    }
    multiply_add(num_x, num_w, sums, w_lanes, x, k, mask);
}

INLINE void plain_tile(const int num_x, const int num_w, const bf16 *w, const bf16 *x, float *y, long k) {
    __m512 sums[MAX_X][MAX_W];
    set_zero(num_x, num_w, sums);
    long done = 0;
    for (; done + LANES <= k; done += LANES) plain_step(num_x, num_w, sums, w + done, x + done, k, ~0u);
    if (done < k) plain_step(num_x, num_w, sums, w + done, x + done, k, (1u << (k - done)) - 1);
    write_sums(num_x, num_w, sums, y);
}

/* The same sums in the same order of a group of packed rows: num_w of them, from `first` on. */
INLINE void packed_tile(const int num_x, const int num_w, const Packed *w, long first, const bf16 *x, float *y) {
    __m512 sums[MAX_X][MAX_W];
    set_zero(num_x, num_w, sums);
    const uint8_t *unit = w->units + units_of(first, w->n, w->k).first, *escaped[MAX_W];
    __m512i tables[MAX_W], halves[MAX_W][2], w_lanes[MAX_W];
#pragma GCC unroll 4
    for (int j = 0; j < num_w; j++) tables[j] = table_of(w, first + j), escaped[j] = w->escaped + w->starts[first + j];
    long k = w->k;
    for (long done = 0; done < k; unit += num_w * UNIT_BYTES) {
#pragma GCC unroll 4
        for (int j = 0; j < num_w; j++) prefetch_unit(unit + j * UNIT_BYTES);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
#pragma GCC unroll 4
            for (int j = 0; j < num_w; j++) unpack_half(unit + j * UNIT_BYTES, half, tables[j], &escaped[j], halves[j]);
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++, done += LANES) {
#pragma GCC unroll 4
                for (int j = 0; j < num_w; j++) w_lanes[j] = halves[j][part];
                multiply_add(num_x, num_w, sums, w_lanes, x + done, k, ~0u);
            }
        }
    }
    write_sums(num_x, num_w, sums, y);
}

TARGET void lightvl_multiply_group(const Packed *w, long first, const bf16 *x, float y[GROUP]) {
    if (first + GROUP <= w->n) packed_tile(1, GROUP, w, first, x, y);
    else if (first + 2 == w->n) packed_tile(1, 2, w, first, x, y);
    else packed_tile(1, 1, w, first, x, y);
}

/* num_x rows of x with rows first <= row < first + rows of W. The tile's sums and operands fill the 32 registers. */
INLINE void strip(const int num_x, const Matrix *w, long first, const bf16 *x, float *y, long k, long rows) {
    long row = 0;
    if (w->packed) {
        for (; row + GROUP <= rows; row += GROUP) packed_tile(num_x, GROUP, w->packed, first + row, x, y + row);
        if (rows - row == 2) packed_tile(num_x, 2, w->packed, first + row, x, y + row);
        if (rows - row == 1) packed_tile(num_x, 1, w->packed, first + row, x, y + row);
    } else {
        const int num_w = num_x == 1 ? 1 : num_x <= 4 ? 4 : 3;
        const bf16 *plain = w->plain + first * k;
        for (; row + num_w <= rows; row += num_w) plain_tile(num_x, num_w, plain + row * k, x, y + row, k);
        for (; row < rows; row++) plain_tile(num_x, 1, plain + row * k, x, y + row, k);
    }
}

TARGET static void block(const Matrix *w, long first, const bf16 *x, const bf16 *bias, bf16 *y, long m, long k, long n,
                         long rows) {
    float sums[MAX_X * MAX_BLOCK];
    for (long tiles = (m + MAX_X - 1) / MAX_X; tiles > 0; tiles--) {
        long num_x = (m + tiles - 1) / tiles; /* of equal size: one row alone would read all of W again */
        switch (num_x) {
        case 1: strip(1, w, first, x, sums, k, rows); break;
        case 2: strip(2, w, first, x, sums, k, rows); break;
        case 3: strip(3, w, first, x, sums, k, rows); break;
        case 4: strip(4, w, first, x, sums, k, rows); break;
        case 5: strip(5, w, first, x, sums, k, rows); break;
        case 6: strip(6, w, first, x, sums, k, rows); break;
        case 7: strip(7, w, first, x, sums, k, rows); break;
        default: strip(8, w, first, x, sums, k, rows);
        }
        for (long i = 0; i < num_x; i++) {
            for (long row = 0; row < rows; row += 16) {
                __mmask16 mask = lanes(rows - row);
                __m512 sum = _mm512_maskz_loadu_ps(mask, sums + i * MAX_BLOCK + row);
                if (bias) sum = _mm512_add_ps(sum, load(bias + first + row, mask));
                store(y + i * n + first + row, mask, sum);
            }
        }
        m -= num_x, x += num_x * k, y += num_x * n;
    }
}

void lightvl_team_linear(const Matrix *w, const bf16 *x, const bf16 *bias, bf16 *y, long m, long k, long n) {
    long share = n / (8L * omp_get_num_threads()) / 12 * 12; /* eight blocks a thread at least, where there are rows for it */
    long block_rows = share < 12 ? 12 : share > MAX_BLOCK ? MAX_BLOCK : share;
    long num_blocks = (n + block_rows - 1) / block_rows;
#pragma omp for schedule(dynamic, 1)
    for (long b = 0; b < num_blocks; b++) {
        long first = b * block_rows, rows = n - first < block_rows ? n - first : block_rows;
        block(w, first, x, bias, y, m, k, n, rows);
    }
}

/* x (m, k), w (n, k), bias (n) or null, y (m, n), all dense. */
void lightvl_linear(const bf16 *w, const bf16 *x, const bf16 *bias, bf16 *y, long m, long k, long n, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    lightvl_team_linear(&(Matrix){.plain = w}, x, bias, y, m, k, n);
}

/* The same, bit by bit, of a packed matrix. */
void lightvl_packed_linear(const Packed *w, const bf16 *x, const bf16 *bias, bf16 *y, long m, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    lightvl_team_linear(&(Matrix){.packed = w}, x, bias, y, m, w->k, w->n);
}
