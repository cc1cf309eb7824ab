"""The tower of Llama-3.2-Vision: the patches of an image's real tiles to features for cross attention.

Called by families/mllama.py, which plans tiles and aspect ratio. The model always saw `max_tiles` tiles, so padding
tiles are computed too: rows of real tiles attend to everything, padding included; padding (whole padding tiles, and the
few zero rows that round every tile up to a multiple of 8) attends to real rows only. Rows are therefore kept in the
order "real, padding", and one attention becomes two. Only the real rows come out.

    rows:  | tile 0 | ... | tile n-1 | padding tile n | ... | rounding of tile 0 | ... | rounding of the last |
           |<------- real --------->|<----------------------------- padding ------------------------------->|
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lightvl.models.linear import Linear
from lightvl.models.load import Target
from lightvl.models.vision.config import MllamaVisionConfig
from lightvl.models.vision.vit import (
    MLP,
    PatchEmbedding,
    attend,
    container_targets,
    head_pieces,
    layer_norm,
    parameter,
    pauses_after,
    row_chunks,
)

TILE_MULTIPLE = 8
"""Every tile is padded with zero rows to a multiple of this. They are seen by the real rows, so they must be kept."""


class MllamaTower(nn.Module):
    """Attributes carry the checkpoint's names."""

    def __init__(self, config: MllamaVisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._config, self._device = config, device
        size, num_ids = config.hidden_size, len(config.grids) + 1
        self.patch_embedding = PatchEmbedding(
            "weight", (config.patch, config.patch), size, config.pixels, dtype=dtype, device=device
        )
        self.class_embedding = parameter(size, dtype=dtype, device=device)
        self.pre_tile_positional_embedding = _TileEmbedding(num_ids, config, dtype, device)
        self.post_tile_positional_embedding = _TileEmbedding(num_ids, config, dtype, device)
        self.gated_positional_embedding = _PositionEmbedding(num_ids, config, dtype, device)
        self.layernorm_pre = layer_norm(size, 1e-5, dtype=dtype, device=device)
        self.layernorm_post = layer_norm(size, 1e-5, dtype=dtype, device=device)
        self.transformer = _Encoder(config, config.num_layers, is_gated=False, dtype=dtype, device=device)
        self.global_transformer = _Encoder(config, config.num_global_layers, is_gated=True, dtype=dtype, device=device)

    def encode(self, patches: torch.Tensor, aspect_ratio_id: int) -> Iterator[torch.Tensor | None]:
        """`patches` (real tiles, patches of a tile, patch * patch * 3) uint8. Yields None several times a
        layer, at last (real tiles * tile_len, feature_size)."""
        config = self._config
        num_real = len(patches) * config.tile_len
        x = self._embed(patches.to(self._device), aspect_ratio_id)
        kept = {}
        for layer_idx, layer in enumerate(self.transformer.in_order):
            yield from layer.steps(x, num_real)
            if layer_idx in config.kept_layers:
                kept[layer_idx] = x[:num_real].clone()
        x = self.layernorm_post(x)
        per_tile = self.post_tile_positional_embedding(aspect_ratio_id)  # (max_tiles, 1, size)
        for rows in self._by_tile(x):
            rows += per_tile
        for layer in self.global_transformer.in_order:
            yield from layer.steps(x, num_real)
        # in the checkpoint's projection the kept layers vary fastest
        inner = torch.stack([kept[layer_idx] for layer_idx in config.kept_layers], -1)
        yield torch.cat((x[:num_real], inner.flatten(1)), -1)

    def _embed(self, patches: torch.Tensor, aspect_ratio_id: int) -> torch.Tensor:
        """Rows before the first layer, real tiles first, rounding last."""
        config = self._config
        embedded = self.patch_embedding(patches)
        # the pixels of padding tiles are zero after normalising, and so are their embeddings
        tiles = embedded.new_zeros(config.max_tiles, *embedded.shape[1:])
        tiles[: len(patches)] = embedded
        tiles += self.pre_tile_positional_embedding(aspect_ratio_id)
        tiles = torch.cat((self.class_embedding.expand(config.max_tiles, 1, -1), tiles), 1)
        tiles = self.layernorm_pre(self.gated_positional_embedding(tiles, aspect_ratio_id))
        rounding = -config.tile_len % TILE_MULTIPLE
        return torch.cat((tiles.flatten(0, 1), tiles.new_zeros(config.max_tiles * rounding, tiles.shape[-1])))

    def _by_tile(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (max_tiles, rows, size) of the tiles and of their rounding."""
        tiles = self._config.max_tiles
        end = tiles * self._config.tile_len
        return x[:end].view(tiles, -1, x.shape[-1]), x[end:].view(tiles, -1, x.shape[-1])


class _TileEmbedding(nn.Module):
    """One gated vector per tile, by aspect ratio."""

    def __init__(self, num_ids: int, config: MllamaVisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._shape = (config.max_tiles, 1, config.hidden_size)
        self.embedding = _Table(num_ids, config.max_tiles * config.hidden_size, dtype, device)
        self.gate = parameter(1, dtype=dtype, device=device)

    def forward(self, aspect_ratio_id: int) -> torch.Tensor:
        return self.embedding.weight[aspect_ratio_id].view(self._shape) * self.gate.tanh()


class _PositionEmbedding(nn.Module):
    """A position inside the tile and a position by tile and aspect ratio, traded against each other by one gate."""

    def __init__(self, num_ids: int, config: MllamaVisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._shape = (config.max_tiles, config.tile_len, config.hidden_size)
        self.embedding = parameter(config.tile_len, config.hidden_size, dtype=dtype, device=device)
        self.tile_embedding = _Table(num_ids, config.max_tiles * config.tile_len * config.hidden_size, dtype, device)
        self.gate = parameter(1, dtype=dtype, device=device)

    def forward(self, tiles: torch.Tensor, aspect_ratio_id: int) -> torch.Tensor:
        gate = self.gate.tanh()
        tiles = tiles + (1 - gate) * self.embedding
        return tiles.add_(gate * self.tile_embedding.weight[aspect_ratio_id].view(self._shape))


class _Table(nn.Module):
    """Rows to look up, named as an embedding's."""

    def __init__(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = parameter(rows, size, dtype=dtype, device=device)


class _Encoder(nn.Module):
    def __init__(
        self, config: MllamaVisionConfig, num_layers: int, *, is_gated: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_order = [_Layer(config, is_gated, dtype, device) for _ in range(num_layers)]
        self.layers = nn.ModuleList(self.in_order)


class _Layer(nn.Module):
    def __init__(self, config: MllamaVisionConfig, is_gated: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size = config.hidden_size
        self._num_heads = config.num_heads
        self.input_layernorm = layer_norm(size, config.norm_eps, dtype=dtype, device=device)
        self.post_attention_layernorm = layer_norm(size, config.norm_eps, dtype=dtype, device=device)
        qkv = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), size)
        self.qkv = Linear(size, qkv, bias=False, dtype=dtype, device=device)
        self.proj = Linear(size, {"self_attn.o_proj": size}, bias=False, dtype=dtype, device=device)
        self.mlp = MLP(
            size,
            config.mlp_size,
            size,
            ups=("fc1",),
            down="fc2",
            activation=config.activation,
            dtype=dtype,
            device=device,
        )
        self.gate_attn = parameter(1, dtype=dtype, device=device) if is_gated else None
        self.gate_ffn = parameter(1, dtype=dtype, device=device) if is_gated else None

    def steps(self, x: torch.Tensor, num_real: int) -> Iterator[None]:
        """Advance x (N, size) in place, in bounded pieces. The first `num_real` rows are real, the others padding."""
        q, k, v = self.qkv(self.input_layernorm(x)).view(len(x), 3, self._num_heads, -1).unbind(1)
        attended = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads in head_pieces(q, len(x) ** 2):
            keys, values = k[:, heads], v[:, heads]
            attended[:num_real, heads] = attend(q[:num_real, heads], keys, values)
            attended[num_real:, heads] = attend(q[num_real:, heads], keys[:num_real], values[:num_real])
            yield
        x += _gated(self.proj(attended.flatten(1)), self.gate_attn)
        for rows in row_chunks(x):
            x[rows] += _gated(self.mlp(self.post_attention_layernorm(x[rows])), self.gate_ffn)
            if pauses_after(rows):
                yield
        yield

    def weight_targets(self) -> dict[str, Target]:
        return container_targets(self)


def _gated(x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x if gate is None else x * gate.tanh()
