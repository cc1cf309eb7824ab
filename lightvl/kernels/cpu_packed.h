/* bfloat16 matrices in 12 bits a weight, exactly.

   A weight's high byte is its sign and most of its exponent, and nearly all high bytes of a row are among 15: four bits
   tell which, the low byte is kept as it is. Code 15 says that it is another one, which is kept apart. */
#ifndef LIGHTVL_CPU_PACKED_H
#define LIGHTVL_CPU_PACKED_H

#include "cpu_common.h"

enum {
    UNIT = 128, /* weights that are packed together: k is a multiple */
    UNIT_BYTES = UNIT + UNIT / 2,
    GROUP = 3,  /* rows whose units are interleaved; the last group may have fewer */
    AHEAD = 36, /* units that are on their way from memory while one is unpacked: few enough for the first-level cache */
    TABLE = 16, /* bytes of a row's table, the last unused */
    ESCAPE = 15 /* the code of a high byte that is not in the table */
};

/* An (n, k) matrix. A unit is 128 low bytes, then 64 bytes of codes, whose low halves belong to the first 64 weights and
   whose high halves to the others. Both stand in the order in which unpacking interleaves bytes (`weight_at`). The rows
   that are multiplied together are interleaved by units: memory delivers one stream faster than several. */
typedef struct {
    const uint8_t *units;   /* (n / GROUP, k / UNIT, GROUP, UNIT_BYTES) */
    const uint8_t *tables;  /* (n, TABLE): the high bytes of a row's codes */
    const uint8_t *escaped; /* high bytes, row by row, in the order of codes */
    const int32_t *starts;  /* (n): where a row's begin in `escaped` */
    long n, k;
} Packed;

/* Where the units of a row are: the first one's offset, and the bytes from one to the next. */
typedef struct {
    long first, step;
} Units;

static inline Units units_of(long row, long n, long k) {
    long in_group = row % GROUP, start = row - in_group, rows = n - start < GROUP ? n - start : GROUP;
    return (Units){start * (k / UNIT) * UNIT_BYTES + in_group * UNIT_BYTES, rows * UNIT_BYTES};
}

/* Row x (k) with the rows of the group that begins at `first`: the same bits as lightvl_packed_linear before it rounds. */
void lightvl_multiply_group(const Packed *w, long first, const bf16 *x, float y[GROUP]);

/* Which of 64 weights the byte at position p belongs to. */
static inline long weight_at(long p) { return p / 16 * 8 + p % 8 + (p % 16 < 8 ? 0 : 32); }

/* The table of `row`, in each of the four parts in which vpshufb looks up. */
INLINE __m512i table_of(const Packed *w, long row) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(w->tables + row * TABLE)));
}

INLINE void prefetch_unit(const uint8_t *unit) {
#pragma GCC unroll 3
    for (int line = 0; line < UNIT_BYTES; line += 64)
        _mm_prefetch((const char *)(unit + AHEAD * UNIT_BYTES + line), _MM_HINT_T0);
}

/* A half (0 or 1) of a unit: 32 weights and 32 more. Moves `escaped` behind the bytes that it took. */
INLINE void unpack_half(const uint8_t *unit, const int half, __m512i table, const uint8_t **escaped, __m512i out[2]) {
    __m512i codes = _mm512_loadu_si512(unit + UNIT);
    if (half) codes = _mm512_srli_epi16(codes, 4);
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(0x0f));
    __m512i low = _mm512_loadu_si512(unit + half * UNIT / 2), high = _mm512_shuffle_epi8(table, codes);
    uint64_t left = _mm512_cmpeq_epi8_mask(codes, _mm512_set1_epi8(ESCAPE));
    if (__builtin_expect(left != 0, 0)) { /* one time in fifty or a hundred */
        uint8_t bytes[64];
        _mm512_storeu_si512(bytes, high);
        for (; left != 0; left &= left - 1) bytes[__builtin_ctzll(left)] = *(*escaped)++;
        high = _mm512_loadu_si512(bytes);
    }
    out[0] = _mm512_unpacklo_epi8(low, high);
    out[1] = _mm512_unpackhi_epi8(low, high);
}

#endif
