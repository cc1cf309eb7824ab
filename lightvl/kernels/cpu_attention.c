/* Attention of decode rows (one query token each) straight from the pages of the K,V store, in bfloat16.

   A row's keys are cut into splits, so that a long context is worked on by all threads; a second pass puts a row's
   splits together (the online softmax of flash attention). The query heads of one K,V head go through its keys
   together. Scores, weights and sums stay in float32. Other weights have gone through the cache since a row's keys were
   last read, so they come from memory: values are on their way while scores are computed, the next keys while values
   are added up. Called from cpu.py, where the arguments are checked. */

#include <math.h>

#include "cpu_team.h"

enum {
    SPLIT = 512, /* keys of one split */
    BLOCK = 64,  /* keys whose scores are computed before their values are read */
    MAX_GROUP = 8 /* query heads at a time */
};

static inline long num_splits(int64_t kv_len) { return (kv_len + SPLIT - 1) / SPLIT; }

/* Where a K,V head's key of a row is, and its value: an offset into `keys` and `values`. */
static inline long place_of(const Attention *a, long row, long kv_head, long key) {
    long page = a->pages[row * a->pages_stride + key / a->page_len];
    return ((kv_head * a->num_pages + page) * a->page_len + key % a->page_len) * a->dim;
}

/* Values become finite: a page's next owner reads them with weight 0 until it has written its own, and 0 * NaN is NaN. */
TARGET static void write_new(const Attention *a, long row, long kv_head) {
    long to = place_of(a, row, kv_head, a->kv_lens[row] - 1), from = row * a->new_stride + kv_head * a->dim;
    __m512i exponent = _mm512_set1_epi16(0x7f80), greatest = _mm512_set1_epi16(0x7f7f), sign = _mm512_set1_epi16((short)0x8000);
    for (long d = 0; d < a->dim; d += 32) {
        _mm512_storeu_si512(a->keys + to + d, _mm512_loadu_si512(a->new_keys + from + d));
        __m512i value = _mm512_loadu_si512(a->new_values + from + d), size = _mm512_andnot_si512(sign, value);
        __mmask32 infinite = _mm512_cmpeq_epi16_mask(size, exponent), nan = _mm512_cmpgt_epi16_mask(size, exponent);
        value = _mm512_mask_mov_epi16(value, infinite, _mm512_or_si512(_mm512_and_si512(value, sign), greatest));
        _mm512_storeu_si512(a->values + to + d, _mm512_maskz_mov_epi16(~nan, value));
    }
}

INLINE void prefetch_row(const bf16 *row, long dim) {
    for (long d = 0; d < dim; d += 32) _mm_prefetch((const char *)(row + d), _MM_HINT_T0);
}

/* `num` query heads with `num_keys` <= BLOCK keys, which are `at` these places, as many `next` to come. sums (num, dim),
   stride dim + 2 as in `partial`. */
INLINE void attend_block(const int num, const Attention *a, const bf16 *q, const long at[BLOCK], long num_keys,
                         const long next[BLOCK], float *sums) {
    float weights[MAX_GROUP][BLOCK];
    long dim = a->dim, stride = dim + 2;
    for (long key = 0; key < num_keys; key += 4) {
        const bf16 *k[4];
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) {
            long place = at[key + e < num_keys ? key + e : num_keys - 1];
            k[e] = a->keys + place;
            prefetch_row(a->values + place, dim);
        }
#pragma GCC unroll 8
        for (int h = 0; h < num; h++) {
            __m512 dots[4];
#pragma GCC unroll 4
            for (int e = 0; e < 4; e++) dots[e] = _mm512_setzero_ps();
            for (long d = 0; d < dim; d += 32) {
                __m512bh q_lanes = (__m512bh)_mm512_loadu_si512(q + h * dim + d);
#pragma GCC unroll 4
                for (int e = 0; e < 4; e++)
                    dots[e] = _mm512_dpbf16_ps(dots[e], q_lanes, (__m512bh)_mm512_loadu_si512(k[e] + d));
            }
            __m128 four = sums_of_lanes(dots[0], dots[1], dots[2], dots[3]);
            _mm_storeu_ps(weights[h] + key, _mm_mul_ps(four, _mm_set1_ps(a->scale)));
        }
    }
    float shrink[MAX_GROUP];
    for (int h = 0; h < num; h++) {
        __m512 most16 = _mm512_set1_ps(-INFINITY), totals = _mm512_setzero_ps();
        for (long key = 0; key < num_keys; key += 16)
            most16 = _mm512_mask_max_ps(most16, lanes(num_keys - key), most16, _mm512_loadu_ps(weights[h] + key));
        float *most = sums + h * stride + dim, *total = most + 1;
        float before = *most, now = _mm512_reduce_max_ps(most16);
        now = now > before ? now : before;
        for (long key = 0; key < num_keys; key += 16) {
            __m512 score = _mm512_sub_ps(_mm512_loadu_ps(weights[h] + key), _mm512_set1_ps(now));
            __m512 weight = _mm512_maskz_mov_ps(lanes(num_keys - key), exp16(score));
            _mm512_storeu_ps(weights[h] + key, weight);
            totals = _mm512_add_ps(totals, weight);
        }
        shrink[h] = before == now ? 1.0f : expf(before - now);
        *most = now;
        *total = *total * shrink[h] + _mm512_reduce_add_ps(totals);
    }
    for (long d = 0; d < dim; d += 32) {
        __m512 low[MAX_GROUP], high[MAX_GROUP];
#pragma GCC unroll 8
        for (int h = 0; h < num; h++) {
            __m512 factor = _mm512_set1_ps(shrink[h]);
            low[h] = _mm512_mul_ps(factor, _mm512_loadu_ps(sums + h * stride + d));
            high[h] = _mm512_mul_ps(factor, _mm512_loadu_ps(sums + h * stride + d + 16));
        }
        for (long key = 0; key < num_keys; key++) {
            const bf16 *v = a->values + at[key] + d;
            __m512 v_low = load(v, 0xffff), v_high = load(v + 16, 0xffff);
            _mm_prefetch((const char *)(a->keys + next[key] + d), _MM_HINT_T0);
#pragma GCC unroll 8
            for (int h = 0; h < num; h++) {
                __m512 weight = _mm512_set1_ps(weights[h][key]);
                low[h] = _mm512_fmadd_ps(weight, v_low, low[h]);
                high[h] = _mm512_fmadd_ps(weight, v_high, high[h]);
            }
        }
#pragma GCC unroll 8
        for (int h = 0; h < num; h++) {
            _mm512_storeu_ps(sums + h * stride + d, low[h]);
            _mm512_storeu_ps(sums + h * stride + d + 16, high[h]);
        }
    }
}

/* The places of the keys from `key` on, BLOCK of them at most, and not beyond `end`. Returns how many. */
static inline long places_from(const Attention *a, long row, long kv_head, long key, long end, long at[BLOCK]) {
    long num = end - key < BLOCK ? end - key : BLOCK, left = 0, place = 0;
    for (long i = 0; i < num; i++, left--, place += a->dim) {
        if (left == 0) place = place_of(a, row, kv_head, key + i), left = a->page_len - (key + i) % a->page_len;
        at[i] = place;
    }
    return num;
}

/* One split of one row and one K,V head; `num` of its query heads, from `head` on. */
INLINE void attend_split(const int num, const Attention *a, long row, long kv_head, long head, long split, float *sums) {
    long begin = split * SPLIT, end = a->kv_lens[row] < begin + SPLIT ? a->kv_lens[row] : begin + SPLIT;
    for (int h = 0; h < num; h++) {
        float *own = sums + h * (a->dim + 2);
        memset(own, 0, a->dim * sizeof *own);
        own[a->dim] = -INFINITY, own[a->dim + 1] = 0.0f;
    }
    const bf16 *q = a->q + row * a->q_stride + head * a->dim;
    long places[2][BLOCK] = {{0}}, num_keys = places_from(a, row, kv_head, begin, end, places[0]);
    for (long i = 0; i < num_keys; i++) prefetch_row(a->keys + places[0][i], a->dim);
    for (long key = begin, turn = 0; key < end; turn ^= 1) {
        long num_next = places_from(a, row, kv_head, key + num_keys, end, places[turn ^ 1]);
        attend_block(num, a, q, places[turn], num_keys, places[turn ^ 1], sums);
        key += num_keys, num_keys = num_next;
    }
}

TARGET static void attend_heads(const Attention *a, long row, long kv_head, long split, float *sums) {
    long group = a->heads / a->kv_heads;
    for (long done = 0; done < group;) {
        long num = group - done < MAX_GROUP ? group - done : MAX_GROUP, head = kv_head * group + done;
        float *own = sums + head * (a->dim + 2);
        switch (num) {
        case 1: attend_split(1, a, row, kv_head, head, split, own); break;
        case 2: attend_split(2, a, row, kv_head, head, split, own); break;
        case 3: attend_split(3, a, row, kv_head, head, split, own); break;
        case 4: attend_split(4, a, row, kv_head, head, split, own); break;
        case 5: attend_split(5, a, row, kv_head, head, split, own); break;
        case 6: attend_split(6, a, row, kv_head, head, split, own); break;
        case 7: attend_split(7, a, row, kv_head, head, split, own); break;
        default: attend_split(8, a, row, kv_head, head, split, own);
        }
        done += num;
    }
}

TARGET static void merge(const Attention *a, long row, long head, const float *first) {
    long stride = a->heads * (a->dim + 2), splits = num_splits(a->kv_lens[row]);
    const float *sums = first + head * (a->dim + 2);
    float most = -INFINITY, total = 0.0f;
    for (long s = 0; s < splits; s++) most = fmaxf(most, sums[s * stride + a->dim]);
    for (long s = 0; s < splits; s++) total += sums[s * stride + a->dim + 1] * expf(sums[s * stride + a->dim] - most);
    for (long d = 0; d < a->dim; d += 16) {
        __m512 out = _mm512_setzero_ps();
        for (long s = 0; s < splits; s++) {
            __m512 share = _mm512_set1_ps(expf(sums[s * stride + a->dim] - most) / total);
            out = _mm512_fmadd_ps(share, _mm512_loadu_ps(sums + s * stride + d), out);
        }
        store(a->out + (row * a->heads + head) * a->dim + d, 0xffff, out);
    }
}

/* Floats that `partial` needs. */
long lightvl_attention_scratch(const int64_t *kv_lens, long rows, long heads, long dim) {
    long splits = 0;
    for (long row = 0; row < rows; row++) splits += num_splits(kv_lens[row]);
    return splits * heads * (dim + 2);
}

void lightvl_team_attention(const Attention *a) {
    long splits = 0;
    for (long row = 0; row < a->rows; row++) splits += num_splits(a->kv_lens[row]);
    long split_floats = a->heads * (a->dim + 2);
#pragma omp for schedule(dynamic, 1)
    for (long item = 0; item < splits * a->kv_heads; item++) {
        long row = 0, split = item / a->kv_heads;
        while (split >= num_splits(a->kv_lens[row])) split -= num_splits(a->kv_lens[row++]);
        if (a->new_keys && split == num_splits(a->kv_lens[row]) - 1) write_new(a, row, item % a->kv_heads);
        attend_heads(a, row, item % a->kv_heads, split, a->partial + item / a->kv_heads * split_floats);
    }
#pragma omp for schedule(static)
    for (long item = 0; item < a->rows * a->heads; item++) {
        long row = item / a->heads, first = 0;
        for (long before = 0; before < row; before++) first += num_splits(a->kv_lens[before]);
        merge(a, row, item % a->heads, a->partial + first * split_floats);
    }
}

void lightvl_decode_attention(const Attention *a, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    lightvl_team_attention(a);
}
