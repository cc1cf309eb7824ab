/* Softmax, an activation, and the decoder's elementwise operations, in bfloat16, each in one pass over its operands. They round where
   torch's own operations, one after the other, round (attention/ops.py says what they compute). Called from cpu.py. */

#include <math.h>

#include "cpu_team.h"

enum {
    PARALLEL_SIZE = 1 << 15, /* elements from which on waking the other threads pays */
    PART = 2048              /* elements of a row that a thread takes at once */
};

TARGET static void norm_row(const bf16 *branch, bf16 *x, const bf16 *weight, bf16 *out, long size, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 value = load(x + i, mask);
        if (branch) {
            value = rounded(_mm512_add_ps(value, load(branch + i, mask)));
            store(x + i, mask, value);
        }
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 normed = rounded(_mm512_mul_ps(load(x + i, mask), scale));
        store(out + i, mask, _mm512_mul_ps(normed, load(weight + i, mask)));
    }
}

void lightvl_team_rms_norm(const bf16 *branch, bf16 *x, const bf16 *weight, bf16 *out, long rows, long size, float eps) {
#pragma omp for schedule(static)
    for (long row = 0; row < rows; row++)
        norm_row(branch ? branch + row * size : 0, x + row * size, weight, out + row * size, size, eps);
}

void lightvl_rms_norm(const bf16 *branch, bf16 *x, const bf16 *weight, bf16 *out, long rows, long size, float eps,
                      int num_threads) {
#pragma omp parallel num_threads(num_threads) if (rows * size >= PARALLEL_SIZE)
    lightvl_team_rms_norm(branch, x, weight, out, rows, size, eps);
}

TARGET static void silu_part(const bf16 *gate, const bf16 *up, bf16 *out, long size) {
    __m512 one = _mm512_set1_ps(1.0f);
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 x = load(gate + i, mask);
        __m512 below = _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x)));
        store(out + i, mask, _mm512_mul_ps(rounded(_mm512_div_ps(x, below)), load(up + i, mask)));
    }
}

void lightvl_team_silu_and_mul(const bf16 *gate_up, bf16 *out, long rows, long size) {
    long parts = (size + PART - 1) / PART;
#pragma omp for schedule(static)
    for (long item = 0; item < rows * parts; item++) {
        long row = item / parts, first = item % parts * PART, num = size - first < PART ? size - first : PART;
        const bf16 *gate = gate_up + 2 * row * size + first;
        silu_part(gate, gate + size, out + row * size + first, num);
    }
}

void lightvl_silu_and_mul(const bf16 *gate_up, bf16 *out, long rows, long size, int num_threads) {
#pragma omp parallel num_threads(num_threads) if (rows * size >= PARALLEL_SIZE)
    lightvl_team_silu_and_mul(gate_up, out, rows, size);
}

TARGET static void rope_head(bf16 *x, const float *cos, const float *sin, long half) {
    for (long i = 0; i < half; i += 16) {
        __mmask16 mask = lanes(half - i);
        __m512 a = load(x + i, mask), b = load(x + half + i, mask);
        __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
        store(x + i, mask, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store(x + half + i, mask, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
    }
}

void lightvl_team_rope(bf16 *x, const float *cos, const float *sin, long rows, long heads, long turned, long half) {
#pragma omp for schedule(static) collapse(2)
    for (long row = 0; row < rows; row++)
        for (long head = 0; head < turned; head++)
            rope_head(x + (row * heads + head) * 2 * half, cos + row * half, sin + row * half, half);
}

void lightvl_rope(bf16 *x, const float *cos, const float *sin, long rows, long heads, long turned, long half,
                  int num_threads) {
#pragma omp parallel num_threads(num_threads) if (rows * turned * half >= PARALLEL_SIZE)
    lightvl_team_rope(x, cos, sin, rows, heads, turned, half);
}

TARGET static void quick_gelu_part(bf16 *x, long size) {
    __m512 one = _mm512_set1_ps(1.0f), slope = _mm512_set1_ps(-1.702f);
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 value = load(x + i, mask);
        store(x + i, mask, _mm512_div_ps(value, _mm512_add_ps(one, exp16(_mm512_mul_ps(value, slope)))));
    }
}

/* x = x sigmoid(1.702 x), in place. */
void lightvl_quick_gelu(bf16 *x, long size, int num_threads) {
    long part = 4096, num_parts = (size + part - 1) / part;
#pragma omp parallel for schedule(static) num_threads(num_threads) if (size >= PARALLEL_SIZE)
    for (long p = 0; p < num_parts; p++) quick_gelu_part(x + p * part, size - p * part < part ? size - p * part : part);
}

TARGET static void softmax_row(bf16 *x, long size) {
    float weights[size]; /* as long as an image's or a context's keys: fits the cache, and the stack by far */
    __m512 most = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        most = _mm512_mask_max_ps(most, mask, most, load(x + i, mask)); /* the second operand comes back for NaN */
    }
    __m512 greatest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        __m512 weight = exp16(_mm512_sub_ps(load(x + i, mask), greatest));
        sums = _mm512_mask_add_ps(sums, mask, sums, weight);
        _mm512_mask_storeu_ps(weights + i, mask, weight);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sums));
    for (long i = 0; i < size; i += 16) {
        __mmask16 mask = lanes(size - i);
        store(x + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weights + i), share));
    }
}

/* Over the last dimension of x (rows, size), in place. */
void lightvl_softmax(bf16 *x, long rows, long size, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (rows * size >= PARALLEL_SIZE)
    for (long row = 0; row < rows; row++) softmax_row(x + row * size, size);
}

/* Whether this CPU has the instructions of all these kernels. */
int lightvl_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}
