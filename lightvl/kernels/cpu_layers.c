/* Decode rows through consecutive self-attention layers, in one parallel region: what `SelfLayer` in models/decoder.py
   computes, to the bit. Between the matrix products there is little to do, but each small operation was a call from
   Python and a start of the threads: 100 us a layer, in which memory delivered nothing. Called from cpu_layers.py, where
   the arguments are checked. */

#include "cpu_team.h"

typedef struct {
    Matrix weight;
    const bf16 *bias; /* or null */
} Linear;

typedef struct {
    Linear qkv, out, gate_up, down;
    const bf16 *attention_norm, *mlp_norm; /* (hidden) */
} Layer;

/* Rows of one token each. All but x, branch and the K,V pages is for the kernel's own use. */
typedef struct {
    bf16 *x;         /* (rows, hidden) */
    bf16 *branch;    /* (rows, hidden): what is still to be added to x; comes so, unless has_branch is 0, and goes so */
    bf16 *normed;    /* (rows, hidden) */
    bf16 *qkv;       /* (rows, heads + 2 kv_heads, dim) */
    bf16 *attended;  /* (rows, heads, dim) */
    bf16 *gate_up;   /* (rows, 2 intermediate) */
    bf16 *activated; /* (rows, intermediate) */
    const float *cos, *sin; /* (rows, dim / 2) */
    Attention attention;    /* keys and values are those of the first layer; its other tensors are set here */
    long layer_stride;      /* from one layer's keys to the next one's, in elements */
    long hidden, intermediate, has_branch;
    float eps;
} Rows;

static void layer_of_team(const Layer *layer, const Rows *r, const Attention *a, int has_branch) {
    long rows = a->rows, heads = a->heads + 2 * a->kv_heads, q_size = a->heads * a->dim;
    lightvl_team_rms_norm(has_branch ? r->branch : 0, r->x, layer->attention_norm, r->normed, rows, r->hidden, r->eps);
    lightvl_team_linear(&layer->qkv.weight, r->normed, layer->qkv.bias, r->qkv, rows, r->hidden, heads * a->dim);
    lightvl_team_rope(r->qkv, r->cos, r->sin, rows, heads, a->heads + a->kv_heads, a->dim / 2);
    lightvl_team_attention(a);
    lightvl_team_linear(&layer->out.weight, r->attended, layer->out.bias, r->branch, rows, q_size, r->hidden);
    lightvl_team_rms_norm(r->branch, r->x, layer->mlp_norm, r->normed, rows, r->hidden, r->eps);
    lightvl_team_linear(&layer->gate_up.weight, r->normed, layer->gate_up.bias, r->gate_up, rows, r->hidden,
                        2 * r->intermediate);
    lightvl_team_silu_and_mul(r->gate_up, r->activated, rows, r->intermediate);
    lightvl_team_linear(&layer->down.weight, r->activated, layer->down.bias, r->branch, rows, r->intermediate, r->hidden);
}

void lightvl_decode_layers(const Layer *layers, long num_layers, const Rows *r, int num_threads) {
#pragma omp parallel num_threads(num_threads)
    {
        Attention a = r->attention;
        long row = (a.heads + 2 * a.kv_heads) * a.dim;
        a.q = r->qkv, a.q_stride = row, a.out = r->attended;
        a.new_keys = r->qkv + a.heads * a.dim, a.new_values = a.new_keys + a.kv_heads * a.dim, a.new_stride = row;
        for (long l = 0; l < num_layers; l++, a.keys += r->layer_stride, a.values += r->layer_stride)
            layer_of_team(layers + l, r, &a, l > 0 || r->has_branch);
    }
}
