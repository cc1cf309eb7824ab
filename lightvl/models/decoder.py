"""The one decoder: Llama, Vicuna, Mistral, Yi, Qwen2 and the text sides of Qwen2-VL and Llama-3.2-Vision. What differs
is data in its `DecoderConfig`, decided when built.

`Model.forward` runs it once per step. It reads its inputs from its arguments only, and knows neither families nor
sequences; where K,V live is the attention backend's business. T tokens, H query heads, G K,V heads, D head size.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lightvl.attention.base import AttentionBackend, StepAttention, StepInputs
from lightvl.attention.ops import ops_for
from lightvl.models.config import DecoderConfig
from lightvl.models.layers import CrossLayer, RMSNorm, SelfLayer, in_runs, under
from lightvl.models.linear import Linear
from lightvl.models.load import Target, WeightPart
from lightvl.models.rope import Rope

NAMES = (r"(?:model\.language_model|language_model\.model|model)\.(.+)", r"(?:language_model\.)?(lm_head\.weight)")
"""Where checkpoints keep the decoder: transformers 5 in memory, published nested, flat and original LLaVA."""


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
        self._parts = in_runs(self._layers, config, ops)
        self._norm = RMSNorm(config.hidden_size, config.rms_eps, ops, dtype, device)
        head = {"lm_head": config.vocab_size}
        self._head = Linear(
            config.hidden_size, head, bias=False, dtype=dtype, device=device, few_rows=True, is_head=True
        )

    def forward(self, inputs: StepInputs, attention: StepAttention) -> torch.Tensor | None:
        """Logits (S, vocab_size) in the model's dtype, for the tokens of `logits_idx`; None when none are wanted.
        The backend must have been prepared for these inputs."""
        x = self._embed(inputs.token_ids)
        for feature in inputs.features:
            x[feature.start : feature.start + len(feature.rows)] = feature.rows
        rope = self._rope.table(inputs.positions)
        branch: torch.Tensor | None = None
        for part in self._parts:
            branch, x = part(branch, x, rope, inputs, attention)
        if inputs.logits_idx is None:
            return None
        branch = None if branch is None else branch[inputs.logits_idx]
        normed, _ = self._norm.after(branch, x[inputs.logits_idx])
        return self._head.best(normed) if inputs.best_only else self._head.forward(normed)

    def write_cross(self, features: torch.Tensor, pages: tuple[int, ...], attention: AttentionBackend) -> None:
        """Project an image's features (len(pages) * cross_page_len, hidden) to K,V of every cross layer, once."""
        for layer in self._cross_layers:
            layer.write(features, pages, attention)

    def weight_part(self) -> WeightPart:
        embedding_shape = self.config.embedding_rows, self.config.hidden_size
        targets = {"embed_tokens.weight": Target(embedding_shape, self._fill_embedding)}
        for layer_idx, layer in enumerate(self._layers):
            targets |= under(f"layers.{layer_idx}.", layer.weight_targets())
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
