/* Packing bfloat16 matrices into 12 bits a weight, and getting them back: cpu_packed.h has the layout. Called from
   cpu.py, where the arguments are checked. */

#include "cpu_packed.h"

/* The 15 most frequent high bytes of a row. Returns how many of its weights have another. */
static int32_t choose_table(const bf16 *w, long k, uint8_t *table) {
    int32_t counts[4][256] = {{0}}; /* several: adding to the same count again waits for the last time */
    for (long i = 0; i < k; i++) counts[i % 4][w[i] >> 8]++;
    int32_t num = 0, count[256];
    uint8_t byte[256]; /* those that there are */
    for (int b = 0; b < 256; b++) {
        int32_t all = counts[0][b] + counts[1][b] + counts[2][b] + counts[3][b];
        if (all) byte[num] = (uint8_t)b, count[num++] = all;
    }
    memset(table, 0, TABLE);
    int32_t others = (int32_t)k;
    for (int code = 0; code < ESCAPE && num > 0; code++) {
        int best = 0;
        for (int i = 1; i < num; i++)
            if (count[i] > count[best]) best = i;
        table[code] = byte[best];
        others -= count[best];
        byte[best] = byte[--num], count[best] = count[num];
    }
    return others;
}

/* w (n, k). Fills tables (n, TABLE) and others (n): how many weights of each row need an escape. */
void lightvl_choose_tables(const bf16 *w, uint8_t *tables, int32_t *others, long n, long k, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long row = 0; row < n; row++) others[row] = choose_table(w + row * k, k, tables + row * TABLE);
}

/* The low bytes of 64 weights to `low`; returns their codes. */
INLINE __m512i pack_half(const bf16 *w, const uint8_t *table, uint8_t *low, uint8_t **escaped) {
    __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + 32), low_byte = _mm512_set1_epi16(0xff);
    _mm512_storeu_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, low_byte), _mm512_and_si512(b, low_byte)));
    __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    __m512i codes = _mm512_set1_epi8(ESCAPE);
    for (int code = 0; code < ESCAPE; code++) {
        __mmask64 same = _mm512_cmpeq_epi8_mask(high, _mm512_set1_epi8((char)table[code]));
        codes = _mm512_mask_mov_epi8(codes, same, _mm512_set1_epi8((char)code));
    }
    uint64_t left = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(ESCAPE));
    for (; left != 0; left &= left - 1) *(*escaped)++ = w[weight_at(__builtin_ctzll(left))] >> 8;
    return codes;
}

TARGET static void pack_row(const bf16 *w, const uint8_t *table, uint8_t *unit, long step, uint8_t *escaped, long k) {
    for (long i = 0; i < k; i += UNIT, unit += step) {
        __m512i first = pack_half(w + i, table, unit, &escaped);
        __m512i second = pack_half(w + i + UNIT / 2, table, unit + UNIT / 2, &escaped);
        _mm512_storeu_si512(unit + UNIT, _mm512_or_si512(first, _mm512_slli_epi16(second, 4)));
    }
}

/* w (n, k), tables and starts (n); fills units and escaped. */
void lightvl_pack(const bf16 *w, const uint8_t *tables, const int32_t *starts, uint8_t *units, uint8_t *escaped, long n,
                  long k, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long row = 0; row < n; row++) {
        Units to = units_of(row, n, k);
        pack_row(w + row * k, tables + row * TABLE, units + to.first, to.step, escaped + starts[row], k);
    }
}

/* `num` rows of one group, from `first` on, to (num, k): any one row, or GROUP whose units are one stream. */
INLINE void unpack_rows(const int num, const Packed *w, long first, bf16 *to) {
    Units at = units_of(first, w->n, w->k);
    const uint8_t *unit = w->units + at.first, *escaped[GROUP];
    __m512i tables[GROUP], values[2];
    for (int j = 0; j < num; j++) tables[j] = table_of(w, first + j), escaped[j] = w->escaped + w->starts[first + j];
    for (long i = 0; i < w->k; i += UNIT, unit += at.step) {
#pragma GCC unroll 3
        for (int j = 0; j < num; j++) {
            prefetch_unit(unit + j * UNIT_BYTES);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                bf16 *part = to + j * w->k + i + half * UNIT / 2;
                unpack_half(unit + j * UNIT_BYTES, half, tables[j], &escaped[j], values);
                _mm512_storeu_si512(part, values[0]);
                _mm512_storeu_si512(part + 32, values[1]);
            }
        }
    }
}

TARGET static void unpack_row(const Packed *w, long row, bf16 *to) { unpack_rows(1, w, row, to); }

TARGET static void unpack_group(const Packed *w, long first, bf16 *to) { unpack_rows(GROUP, w, first, to); }

/* out (num, k): row rows[i] of w for each i. */
void lightvl_unpack_rows(const Packed *w, const int64_t *rows, bf16 *out, long num, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num * w->k >= 1 << 15)
    for (long i = 0; i < num; i++) unpack_row(w, rows[i], out + i * w->k);
}

/* out (num, k): rows first <= row < first + num of w; `first` is a multiple of GROUP. */
void lightvl_unpack_slab(const Packed *w, long first, bf16 *out, long num, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
    for (long i = 0; i < num; i += GROUP) {
        if (i + GROUP <= num) unpack_group(w, first + i, out + i * w->k);
        else
            for (long j = i; j < num; j++) unpack_row(w, first + j, out + j * w->k);
    }
}
