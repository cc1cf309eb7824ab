"""The one decoder: Llama, Vicuna, Mistral, Yi, Qwen2 and the text sides of Qwen2-VL and Llama-3.2-Vision. What differs
is data in its `DecoderConfig`, decided when built.

`Model.forward` runs it once per step. It reads its inputs from its arguments only, and knows neither families nor
sequences; where K,V live is the attention backend's business. T tokens, H query heads, G K,V heads, D head size.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from lightvl.attention.base import AttentionBackend, StepAttention, StepInputs
from lightvl.attention.ops import Ops, RopeTable, ops_for
from lightvl.models.config import DecoderConfig
from lightvl.models.linear import Linear
from lightvl.models.load import Target, WeightPart
from lightvl.models.rope import Rope

NAMES = (r"(?:model\.language_model|language_model\.model|model)\.(.+)", r"(?:language_model\.)?(lm_head\.weight)")
"""Where checkpoints keep the decoder: transformers 5 in memory, published nested, flat and original LLaVA."""

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

    def weight_targets(self) -> dict[str, Target]:
        return self._gate_up.weight_targets() | self._down.weight_targets()


class SelfLayer:
    """`self_idx` counts the self-attention layers: the backend's layer index.

    A layer takes x and the branch of the layer before it, which is not added yet, and returns the same two."""

    def __init__(
        self, config: DecoderConfig, self_idx: int, ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._idx, self._num_heads, self._num_kv_heads = self_idx, config.num_heads, config.num_kv_heads
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
        attended = self._out.forward(attention.attend(self._idx, q, k, v, inputs))
        normed, x = self._mlp_norm.after(attended, x)
        return self._mlp(normed), x

    def weight_targets(self) -> dict[str, Target]:
        return {
            "input_layernorm.weight": self._attention_norm.weight.target(),
            "post_attention_layernorm.weight": self._mlp_norm.weight.target(),
            **_under("self_attn.", self._qkv.weight_targets() | self._out.weight_targets()),
            **_under("mlp.", self._mlp.weight_targets()),
        }


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
            **_under("cross_attn.", linears | norms),
            **_under("mlp.", self._mlp.weight_targets()),
        }


class Decoder:
    """Token ids and features in, logits out. Weights arrive through `weight_part()`."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype = config, dtype
        shape = config.embedding_rows, config.hidden_size
        self._embedding: torch.Tensor | None = torch.empty(shape, dtype=dtype, device=device)  # None: the head has it
        ops = ops_for(device, dtype)
        self._rope = Rope(config, device, ops)
        self._layers: list[SelfLayer | CrossLayer] = []
        self._cross_layers: list[CrossLayer] = []
        for layer_idx in range(config.num_layers):
            if layer_idx in config.cross_layers:
                self._cross_layers.append(CrossLayer(config, len(self._cross_layers), ops, dtype, device))
                self._layers.append(self._cross_layers[-1])
            else:
                self._layers.append(SelfLayer(config, layer_idx - len(self._cross_layers), ops, dtype, device))
        self._norm = RMSNorm(config.hidden_size, config.rms_eps, ops, dtype, device)
        self._head = _linear(config.hidden_size, {"lm_head": config.vocab_size}, bias=False, dtype=dtype, device=device)

    def forward(self, inputs: StepInputs, attention: StepAttention) -> torch.Tensor | None:
        """Logits (S, vocab_size) in the model's dtype, for the tokens of `logits_idx`; None when none are wanted.
        The backend must have been prepared for these inputs."""
        x = self._embed(inputs.token_ids)
        for feature in inputs.features:
            x[feature.start : feature.start + len(feature.rows)] = feature.rows
        rope = self._rope.table(inputs.positions)
        branch: torch.Tensor | None = None
        for layer in self._layers:
            branch, x = layer(branch, x, rope, inputs, attention)
        if inputs.logits_idx is None:
            return None
        branch = None if branch is None else branch[inputs.logits_idx]
        normed, _ = self._norm.after(branch, x[inputs.logits_idx])
        return self._head.forward(normed)

    def write_cross(self, features: torch.Tensor, pages: tuple[int, ...], attention: AttentionBackend) -> None:
        """Project an image's features (len(pages) * cross_page_len, hidden) to K,V of every cross layer, once."""
        for layer in self._cross_layers:
            layer.write(features, pages, attention)

    def weight_part(self) -> WeightPart:
        embedding_shape = self.config.embedding_rows, self.config.hidden_size
        targets = {"embed_tokens.weight": Target(embedding_shape, self._fill_embedding)}
        for layer_idx, layer in enumerate(self._layers):
            targets |= _under(f"layers.{layer_idx}.", layer.weight_targets())
        targets["norm.weight"] = self._norm.weight.target()
        if self.config.tied_head:
            return WeightPart("decoder", NAMES, targets, excused=r"lm_head\.weight")
        return WeightPart("decoder", NAMES, targets | self._head.weight_targets())

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        # An image token may lie beyond the embedding (original LLaVA): its row is replaced by a feature.
        idx = token_ids.clamp_max(self.config.embedding_rows - 1)
        return self._head.rows(idx) if self._embedding is None else F.embedding(idx, self._embedding)

    def _fill_embedding(self, tensor: torch.Tensor) -> None:
        assert self._embedding is not None
        self._embedding.copy_(tensor)
        if self.config.tied_head:
            is_kept = self._head.use_weight(self._embedding[: self.config.vocab_size])
            if is_kept and self.config.vocab_size == self.config.embedding_rows:
                self._embedding = None


def _under(prefix: str, targets: dict[str, Target]) -> dict[str, Target]:
    return {prefix + name: target for name, target in targets.items()}
