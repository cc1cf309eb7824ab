"""The tower of Llama-3.2-Vision: the patches of images' real tiles to features for cross attention.

Called by families/mllama.py, which plans tiles and aspect ratio. The model always saw `max_tiles` tiles, so padding
tiles are computed too: rows of real tiles attend to everything, padding included; padding (whole padding tiles, and the
few zero rows that round every tile up to a multiple of 8) attends to real rows only. An image's rows are therefore kept
in the order "real, padding", and one attention becomes two. Only the real rows come out.

    rows:  | tile 0 | ... | tile n-1 | padding tile n | ... | rounding of tile 0 | ... | rounding of the last |
           |<------- real --------->|<----------------------------- padding ------------------------------->|
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from lightvl.attention.base import EncoderAttention
from lightvl.models.vision.config import MllamaVisionConfig
from lightvl.models.vision.vit import (
    Layer,
    PatchEmbedding,
    layer_norm,
    parameter,
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

    def encode(
        self, images: Sequence[tuple[torch.Tensor, int]], attention: EncoderAttention
    ) -> Iterator[torch.Tensor | None]:
        """`images`: the patches (real tiles, patches of a tile, patch * patch * 3) uint8 and the aspect ratio id of
        each. Yields None several times a layer, at last (all real tiles * tile_len, feature_size), image after image.
        """
        config = self._config
        x = torch.cat([self._embed(patches, ratio_id) for patches, ratio_id in images])
        by_image = x.view(len(images), -1, x.shape[-1])
        attend = _RealAndPadding(
            [len(patches) * config.tile_len for patches, _ in images], by_image.shape[1], attention, self._device
        )
        kept = {}
        for layer_idx, layer in enumerate(self.transformer.in_order):
            yield from layer.steps(x, attend)
            if layer_idx in config.kept_layers:
                kept[layer_idx] = x[attend.real]
        x.copy_(self.layernorm_post(x))
        for rows, (_, ratio_id) in zip(by_image, images, strict=True):
            per_tile = self.post_tile_positional_embedding(ratio_id)  # (max_tiles, 1, size)
            for tiles in self._by_tile(rows):
                tiles += per_tile
        for layer in self.global_transformer.in_order:
            yield from layer.steps(x, attend)
        # in the checkpoint's projection the kept layers vary fastest
        inner = torch.stack([kept[layer_idx] for layer_idx in config.kept_layers], -1)
        yield torch.cat((x[attend.real], inner.flatten(1)), -1)

    def _embed(self, patches: torch.Tensor, aspect_ratio_id: int) -> torch.Tensor:
        """An image's rows before the first layer, real tiles first, rounding last."""
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
        """Views (max_tiles, rows, size) of an image's tiles and of their rounding."""
        tiles = self._config.max_tiles
        end = tiles * self._config.tile_len
        return x[:end].view(tiles, -1, x.shape[-1]), x[end:].view(tiles, -1, x.shape[-1])


class _RealAndPadding:
    """`vit.Attend`: an image's real rows attend to all of its rows, its padding to the real ones only."""

    def __init__(
        self, num_real: Sequence[int], num_rows: int, attention: EncoderAttention, device: torch.device
    ) -> None:
        """`num_real` rows of each image, which has `num_rows` in all."""
        self._attention, self._real_lens = attention, list(num_real)
        self._padding_lens = [num_rows - num for num in num_real]
        self._all_lens = [num_rows] * len(self._real_lens)
        self.num_scores = len(self._real_lens) * num_rows**2
        is_real = torch.arange(num_rows) < torch.tensor(self._real_lens)[:, None]
        self.real = is_real.flatten().nonzero()[:, 0].to(device)  # all images' real rows
        self._padding = (~is_real).flatten().nonzero()[:, 0].to(device)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[self.real] = self._attention(q[self.real], k, v, self._real_lens, self._all_lens)
        real_keys, real_values = k[self.real], v[self.real]
        out[self._padding] = self._attention(
            q[self._padding], real_keys, real_values, self._padding_lens, self._real_lens
        )
        return out


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
        self.in_order = [_layer(config, is_gated, dtype, device) for _ in range(num_layers)]
        self.layers = nn.ModuleList(self.in_order)


def _layer(config: MllamaVisionConfig, is_gated: bool, dtype: torch.dtype, device: torch.device) -> Layer:
    names, size = ("input_layernorm", "post_attention_layernorm"), config.hidden_size
    return Layer(
        size,
        config.num_heads,
        config.mlp_size,
        norms={name: layer_norm(size, config.norm_eps, dtype=dtype, device=device) for name in names},
        proj="self_attn.o_proj",
        attention_bias=False,
        is_gated=is_gated,
        act_name=config.activation,
        dtype=dtype,
        device=device,
    )
