"""The decoder's layers: self-attention, and the cross attention of Llama-3.2-Vision. Each reads the step's inputs from
its arguments only; where K,V live is the attention backend's business.

A layer takes x and the branch of the layer before it, which is not added yet, and returns the same two. T tokens, H
query heads, G K,V heads, D head size.
"""

from __future__ import annotations

import functools

import torch

from lightvl.attention.base import AttentionBackend, StepAttention, StepInputs
from lightvl.attention.ops import CpuKernelOps, Ops, RopeTable
from lightvl.kernels.cpu import MAX_LINEAR_ROWS
from lightvl.kernels.cpu_layers import LayerStack, LayerWeights, LinearWeights
from lightvl.models.config import DecoderConfig
from lightvl.models.linear import Linear
from lightvl.models.load import Target

_linear = functools.partial(Linear, few_rows=True)
"""Decode steps bring one row for each sequence."""


class Vector:
    """A small parameter: a norm's weight or a gate."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.value = torch.empty(size, dtype=dtype, device=device)

    def target(self) -> Target:
        return Target(tuple(self.value.shape), lambda tensor: _copy(self.value, tensor))


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)


class RMSNorm:
    """Over the last dimension; float32 inside."""

    def __init__(self, size: int, eps: float, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self.weight, self._eps, self._ops = Vector(size, dtype, device), eps, ops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._ops.rms_norm(x, self.weight.value, self._eps)

    def after(self, branch: torch.Tensor | None, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + branch, x + branch): a sublayer's branch is added by the next one's norm. Overwrites both.
        None before the first sublayer."""
        if branch is None:
            return self(x), x
        return self._ops.add_rms_norm(branch, x, self.weight.value, self._eps)


class MLP:
    """SwiGLU."""

    def __init__(self, config: DecoderConfig, ops: Ops, dtype: torch.dtype, device: torch.device) -> None:
        self._ops = ops
        hidden, size = config.hidden_size, config.intermediate_size
        self._gate_up = _linear(hidden, {"gate_proj": size, "up_proj": size}, bias=False, dtype=dtype, device=device)
        self._down = _linear(size, {"down_proj": hidden}, bias=False, dtype=dtype, device=device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down.forward(self._ops.silu_and_mul(self._gate_up.forward(x)))

    def kernel_weights(self) -> tuple[LinearWeights | None, LinearWeights | None]:
        """Of gate and up, and of down."""
        return self._gate_up.kernel_weights(), self._down.kernel_weights()

    def weight_targets(self) -> dict[str, Target]:
        return self._gate_up.weight_targets() | self._down.weight_targets()


class SelfLayer:
    """`self_idx` counts the self-attention layers: the backend's layer index."""

    def __init__(
        self, config: DecoderConfig, self_idx: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.idx, self._num_heads, self._num_kv_heads = self_idx, config.num_heads, config.num_kv_heads
        self._dim, self._ops = config.head_dim, ops
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        pieces = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self._qkv = _linear(config.hidden_size, pieces, bias=config.qkv_bias, dtype=dtype, device=device)
        self._out = _linear(q_size, {"o_proj": config.hidden_size}, bias=False, dtype=dtype, device=device)
        self._attention_norm = RMSNorm(config.hidden_size, config.rms_eps, ops, dtype, device)
        self._mlp_norm = RMSNorm(config.hidden_size, config.rms_eps, ops, dtype, device)
        self._mlp = MLP(config, ops, dtype, device)

    def __call__(
        self,
        branch: torch.Tensor | None,
        x: torch.Tensor,
        rope: RopeTable,
        inputs: StepInputs,
        attention: StepAttention,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        normed, x = self._attention_norm.after(branch, x)
        heads = self._qkv.forward(normed).view(len(x), -1, self._dim)  # (T, H + 2 G, D)
        q, k, v = self._ops.rope(heads, self._num_heads, self._num_kv_heads, rope)
        attended = self._out.forward(attention.attend(self.idx, q, k, v, inputs))
        normed, x = self._mlp_norm.after(attended, x)
        return self._mlp(normed), x

    def kernel_weights(self) -> LayerWeights | None:
        """As our own kernels for CPUs take them, if they take all."""
        linears = self._qkv.kernel_weights(), self._out.kernel_weights(), *self._mlp.kernel_weights()
        qkv, out, gate_up, down = linears
        if qkv is None or out is None or gate_up is None or down is None:
            return None
        norms = self._attention_norm.weight.value, self._mlp_norm.weight.value
        return LayerWeights(norms[0], qkv, out, norms[1], gate_up, down)

    def weight_targets(self) -> dict[str, Target]:
        return {
            "input_layernorm.weight": self._attention_norm.weight.target(),
            "post_attention_layernorm.weight": self._mlp_norm.weight.target(),
            **under("self_attn.", self._qkv.weight_targets() | self._out.weight_targets()),
            **under("mlp.", self._mlp.weight_targets()),
        }


class SelfRun:
    """Consecutive self-attention layers. On a CPU decode rows go through all of them in one call, where our own kernels
    take the weights: Python between the products would be a twentieth of a step of a 2B model."""

    def __init__(self, layers: list[SelfLayer], config: DecoderConfig, ops: Ops) -> None:
        self._layers, self._ops = layers, ops
        self._heads, self._eps = (config.num_heads, config.num_kv_heads, config.head_dim), config.rms_eps
        self._stack: LayerStack | None = None  # made when there are weights

    def __call__(
        self,
        branch: torch.Tensor | None,
        x: torch.Tensor,
        rope: RopeTable,
        inputs: StepInputs,
        attention: StepAttention,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        rows = attention.paged_rows(inputs) if len(x) <= MAX_LINEAR_ROWS else None
        if rows is not None and (stack := self._made_stack()) is not None:
            layers = slice(self._layers[0].idx, self._layers[-1].idx + 1)
            return stack.run(branch, x, *rope, rows.keys[layers], rows.values[layers], rows.pages, rows.kv_lens)
        for layer in self._layers:
            branch, x = layer(branch, x, rope, inputs, attention)
        return branch, x

    def _made_stack(self) -> LayerStack | None:
        if self._stack is None and isinstance(self._ops, CpuKernelOps):
            weights = [layer.kernel_weights() for layer in self._layers]
            given = [layer for layer in weights if layer is not None]
            if len(given) == len(weights):
                self._stack = LayerStack(self._ops.kernels, given, heads=self._heads, eps=self._eps)
        return self._stack


class CrossLayer:
    """Queries of the text over the K,V of images; no rope, norms per head, both branches gated.

    Tokens that see no image pass through unchanged: their attention comes back as zero and their MLP branch is
    multiplied by zero (Meta's rule; transformers does only the second).
    """

    def __init__(
        self, config: DecoderConfig, cross_idx: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._idx, self._dim = cross_idx, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden = config.hidden_size
        self._q = _linear(hidden, {"q_proj": q_size}, bias=False, dtype=dtype, device=device)
        self._kv = Linear(hidden, {"k_proj": kv_size, "v_proj": kv_size}, bias=False, dtype=dtype, device=device)
        self._out = _linear(q_size, {"o_proj": hidden}, bias=False, dtype=dtype, device=device)
        self._q_norm = RMSNorm(config.head_dim, config.rms_eps, ops, dtype, device)
        self._k_norm = RMSNorm(config.head_dim, config.rms_eps, ops, dtype, device)
        self._attention_norm = RMSNorm(hidden, config.rms_eps, ops, dtype, device)
        self._mlp_norm = RMSNorm(hidden, config.rms_eps, ops, dtype, device)
        self._attention_gate = Vector(1, dtype, device)
        self._mlp_gate = Vector(1, dtype, device)
        self._mlp = MLP(config, ops, dtype, device)

    def __call__(
        self,
        branch: torch.Tensor | None,
        x: torch.Tensor,
        rope: RopeTable,
        inputs: StepInputs,
        attention: StepAttention,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        if inputs.cross is None:
            return branch, x
        normed, x = self._attention_norm.after(branch, x)
        q = self._q_norm(self._q.forward(normed).view(len(x), -1, self._dim))
        seen = self._out.forward(attention.cross_attend(self._idx, q, inputs))
        normed, x = self._mlp_norm.after(self._attention_gate.value.tanh() * seen, x)
        return self._mlp_gate.value.tanh() * (inputs.cross.sees_image * self._mlp(normed)), x

    def write(self, features: torch.Tensor, pages: tuple[int, ...], attention: AttentionBackend) -> None:
        k, v = self._kv.forward(features).view(len(features), -1, self._dim).chunk(2, 1)
        attention.write_cross(self._idx, self._k_norm(k), v, pages)

    def weight_targets(self) -> dict[str, Target]:
        linears = self._q.weight_targets() | self._kv.weight_targets() | self._out.weight_targets()
        norms = {"q_norm.weight": self._q_norm.weight.target(), "k_norm.weight": self._k_norm.weight.target()}
        return {
            "input_layernorm.weight": self._attention_norm.weight.target(),
            "post_attention_layernorm.weight": self._mlp_norm.weight.target(),
            "cross_attn_attn_gate": self._attention_gate.target(),
            "cross_attn_mlp_gate": self._mlp_gate.target(),
            **under("cross_attn.", linears | norms),
            **under("mlp.", self._mlp.weight_targets()),
        }


def in_runs(layers: list[SelfLayer | CrossLayer], config: DecoderConfig, ops: Ops) -> list[SelfRun | CrossLayer]:
    """The layers in their order, self-attention layers that follow each other together."""
    parts: list[SelfRun | CrossLayer] = []
    run: list[SelfLayer] = []
    for layer in layers:
        if isinstance(layer, SelfLayer):
            run.append(layer)
            continue
        parts += [SelfRun(run, config, ops), layer] if run else [layer]
        run = []
    return [*parts, SelfRun(run, config, ops)] if run else parts


def under(prefix: str, targets: dict[str, Target]) -> dict[str, Target]:
    return {prefix + name: target for name, target in targets.items()}
