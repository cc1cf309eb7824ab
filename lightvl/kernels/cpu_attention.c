/* Attention of decode rows (one query token each) straight from the pages of the K,V store, in bfloat16.

   A row's keys are cut into splits, so that a long context is worked on by all threads; a second pass puts a row's
   splits together (the online softmax of flash attention). The query heads of one K,V head go through its keys
   together. Scores, weights and sums stay in float32. Called from cpu.py, where the arguments are checked. */

#include <math.h>

#include "cpu_common.h"

enum {
    SPLIT = 512, /* keys of one split */
    BLOCK = 32,  /* keys whose scores are computed before their values are read */
    MAX_GROUP = 8 /* query heads at a time */
};

typedef struct {
    const bf16 *q;            /* (rows, heads, dim), rows q_stride apart */
    const bf16 *keys;         /* (kv_heads, num_pages, page_len, dim) */
    const bf16 *values;       /* the same */
    const int64_t *pages;     /* (rows, pages_stride) */
    const int64_t *kv_lens;   /* (rows) */
    float *partial;           /* (splits of all rows, heads, dim + 2): sums of weighted values, greatest score, sum */
    bf16 *out;                /* (rows, heads, dim) */
    long rows, q_stride, pages_stride, heads, kv_heads, dim, num_pages, page_len;
    float scale;
} Attention;

static inline long num_splits(int64_t kv_len) { return (kv_len + SPLIT - 1) / SPLIT; }

/* `num` query heads with `num_keys` <= BLOCK keys of one page. sums (num, dim), stride dim + 2 as in `partial`. */
INLINE void attend_block(const int num, const bf16 *q, const bf16 *k, const bf16 *v, long num_keys, long dim, float scale,
                         float *sums) {
    float weights[MAX_GROUP][BLOCK];
    long stride = dim + 2;
    for (long key = 0; key < num_keys; key++) {
        __m512 dots[MAX_GROUP];
#pragma GCC unroll 8
        for (int h = 0; h < num; h++) dots[h] = _mm512_setzero_ps();
        for (long d = 0; d < dim; d += 32) {
            __m512bh k_lanes = (__m512bh)_mm512_loadu_si512(k + key * dim + d);
#pragma GCC unroll 8
            for (int h = 0; h < num; h++)
                dots[h] = _mm512_dpbf16_ps(dots[h], (__m512bh)_mm512_loadu_si512(q + h * dim + d), k_lanes);
        }
#pragma GCC unroll 8
        for (int h = 0; h < num; h++) weights[h][key] = _mm512_reduce_add_ps(dots[h]) * scale;
    }
    float shrink[MAX_GROUP];
#pragma GCC unroll 8
    for (int h = 0; h < num; h++) {
        __mmask16 low = lanes(num_keys), high = num_keys > 16 ? lanes(num_keys - 16) : 0;
        __m512 none = _mm512_set1_ps(-INFINITY);
        __m512 s0 = _mm512_mask_loadu_ps(none, low, weights[h]), s1 = _mm512_mask_loadu_ps(none, high, weights[h] + 16);
        float *most = sums + h * stride + dim, *total = most + 1;
        float before = *most, now = _mm512_reduce_max_ps(_mm512_max_ps(s0, s1));
        now = now > before ? now : before;
        __m512 now16 = _mm512_set1_ps(now);
        s0 = _mm512_maskz_mov_ps(low, exp16(_mm512_sub_ps(s0, now16)));
        s1 = _mm512_maskz_mov_ps(high, exp16(_mm512_sub_ps(s1, now16)));
        _mm512_storeu_ps(weights[h], s0);
        _mm512_storeu_ps(weights[h] + 16, s1);
        shrink[h] = before == now ? 1.0f : expf(before - now);
        *most = now;
        *total = *total * shrink[h] + _mm512_reduce_add_ps(_mm512_add_ps(s0, s1));
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
            __m512 v_low = load(v + key * dim + d, 0xffff), v_high = load(v + key * dim + d + 16, 0xffff);
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

/* One split of one row and one K,V head; `num` of its query heads, from `head` on. */
INLINE void attend_split(const int num, const Attention *a, long row, long kv_head, long head, long split, float *sums) {
    long begin = split * SPLIT, end = a->kv_lens[row] < begin + SPLIT ? a->kv_lens[row] : begin + SPLIT;
    for (int h = 0; h < num; h++) {
        float *own = sums + h * (a->dim + 2);
        memset(own, 0, a->dim * sizeof *own);
        own[a->dim] = -INFINITY, own[a->dim + 1] = 0.0f;
    }
    const bf16 *q = a->q + row * a->q_stride + head * a->dim;
    for (long key = begin; key < end;) {
        long offset = key % a->page_len, left = a->page_len - offset, num_keys = end - key;
        num_keys = num_keys < left ? num_keys : left;
        num_keys = num_keys < BLOCK ? num_keys : BLOCK;
        long page = a->pages[row * a->pages_stride + key / a->page_len];
        long at = ((kv_head * a->num_pages + page) * a->page_len + offset) * a->dim;
        attend_block(num, q, a->keys + at, a->values + at, num_keys, a->dim, a->scale, sums);
        key += num_keys;
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

/* dim is a multiple of 32, every kv_len at least 1. */
void lightvl_decode_attention(const Attention *a, int num_threads) {
    long splits = 0;
    for (long row = 0; row < a->rows; row++) splits += num_splits(a->kv_lens[row]);
    long split_floats = a->heads * (a->dim + 2);
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < splits * a->kv_heads; item++) {
            long row = 0, split = item / a->kv_heads;
            while (split >= num_splits(a->kv_lens[row])) split -= num_splits(a->kv_lens[row++]);
            attend_heads(a, row, item % a->kv_heads, split, a->partial + item / a->kv_heads * split_floats);
        }
#pragma omp for schedule(static)
        for (long item = 0; item < a->rows * a->heads; item++) {
            long row = item / a->heads, first = 0;
            for (long before = 0; before < row; before++) first += num_splits(a->kv_lens[before]);
            merge(a, row, item % a->heads, a->partial + first * split_floats);
        }
    }
}
