/* The parts of a decoder layer, each for all threads of a team to call: the work is shared, and ends with a barrier. */
#ifndef LIGHTVL_CPU_TEAM_H
#define LIGHTVL_CPU_TEAM_H

#include "cpu_packed.h"

/* One of the two, the other is null: (n, k) row by row, or packed. */
typedef struct {
    const bf16 *plain;
    const Packed *packed;
} Matrix;

typedef struct {
    const bf16 *q;            /* (rows, heads, dim), rows q_stride apart */
    const bf16 *new_keys;     /* (rows, kv_heads, dim), rows new_stride apart: each row's last, still to be written to */
    const bf16 *new_values;   /* its page; both null where they have been */
    bf16 *keys;               /* (kv_heads, num_pages, page_len, dim) */
    bf16 *values;             /* the same */
    const int64_t *pages;     /* (rows, pages_stride) */
    const int64_t *kv_lens;   /* (rows) */
    float *partial;           /* (splits of all rows, heads, dim + 2): sums of weighted values, greatest score, sum */
    bf16 *out;                /* (rows, heads, dim) */
    long rows, q_stride, new_stride, pages_stride, heads, kv_heads, dim, num_pages, page_len;
    float scale;
} Attention;

/* y (m, n) = x (m, k) W^T + bias (n) or null */
void lightvl_team_linear(const Matrix *w, const bf16 *x, const bf16 *bias, bf16 *y, long m, long k, long n);

/* out = rms_norm(x) * weight, (rows, size); with `branch`, x += branch before */
void lightvl_team_rms_norm(const bf16 *branch, bf16 *x, const bf16 *weight, bf16 *out, long rows, long size, float eps);

/* out (rows, size) = silu(gate) * up of gate_up (rows, 2 size) */
void lightvl_team_silu_and_mul(const bf16 *gate_up, bf16 *out, long rows, long size);

/* turns the first `turned` of `heads` heads of x (rows, heads, 2 half) in place; cos and sin (rows, half) */
void lightvl_team_rope(bf16 *x, const float *cos, const float *sin, long rows, long heads, long turned, long half);

/* dim is a multiple of 32, every kv_len at least 1 */
void lightvl_team_attention(const Attention *a);

#endif
