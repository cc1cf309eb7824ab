"""The tower of Qwen2-VL and Qwen2.5-VL: patches of one or several images to features of the decoder's width.

Called by families/qwen2_vl.py, which plans the grids. The two differ by data: norms and MLP, and in Qwen2.5-VL most
layers attend within windows, so its patches travel in window order and the features are put back at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from lightvl.attention.base import EncoderAttention
from lightvl.attention.ops import ops_for
from lightvl.images.transforms import Grid
from lightvl.models.vision.config import QwenVisionConfig
from lightvl.models.vision.vit import (
    MLP,
    Layer,
    PatchEmbedding,
    RMSNorm,
    WithinSegments,
    layer_norm,
    row_chunks,
)

NORM_EPS = 1e-6


class QwenTower(nn.Module):
    def __init__(self, config: QwenVisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._config, self._device = config, device
        self.patch_embed = PatchEmbedding(
            "proj.weight",
            (config.frames, config.patch, config.patch),
            config.hidden_size,
            config.pixels,
            dtype=dtype,
            device=device,
        )
        self._layers_in_order = [_layer(config, dtype, device) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(self._layers_in_order)
        self.merger = _Merger(config, dtype=dtype, device=device)

    def encode(
        self, patches: torch.Tensor, grids: Sequence[Grid], attention: EncoderAttention
    ) -> Iterator[torch.Tensor | None]:
        """`patches` (all images' patches, patch * patch * 3) uint8, image after image, each in squares of merge x merge
        as `transforms.patchify` gives them; `grids`: (high, wide) of each, in patches. Yields None several times a
        layer, at last (patches / merge**2, out_size), image after image."""
        config, per_token = self._config, self._config.merge**2
        order, window_lens = _order_of_all(grids, config)
        order = order.to(self._device)
        if config.window:  # bytes are the cheapest thing to reorder
            patches = patches.view(len(order), -1)[order].view(len(patches), -1)
        x = self.patch_embed(patches)
        positions = torch.cat([patch_positions(high, wide, config.merge) for high, wide in grids]).to(self._device)
        positions = positions.view(len(order), per_token, 2)[order].view(-1, 2)
        angles = rope_angles(positions, config.hidden_size // config.num_heads, config.rope_theta)
        cos, sin, ops = angles.cos(), angles.sin(), ops_for(self._device, x.dtype)
        rope_tables = [ops.rope_table(cos[rows], sin[rows]) for rows in row_chunks(x)]
        in_image = WithinSegments([high * wide for high, wide in grids], attention)
        in_window = WithinSegments([tokens * per_token for tokens in window_lens], attention)
        for layer_idx, layer in enumerate(self._layers_in_order):
            is_whole = not config.window or layer_idx in config.full_attention_layers
            yield from layer.steps(x, in_image if is_whole else in_window, rope_tables)
        tokens = x.view(len(order), per_token, -1)
        features = x.new_empty(len(order), config.out_size)
        for rows in row_chunks(tokens):
            features[order[rows]] = self.merger(tokens[rows])
            yield None
        yield features


def _layer(config: QwenVisionConfig, dtype: torch.dtype, device: torch.device) -> Layer:
    return Layer(
        config.hidden_size,
        config.num_heads,
        config.mlp_size,
        norms={name: _norm(config, dtype, device) for name in ("norm1", "norm2")},
        qkv=("attn.qkv",),
        proj="attn.proj",
        ups=("gate_proj", "up_proj") if config.gated_mlp else ("fc1",),
        down="down_proj" if config.gated_mlp else "fc2",
        act_name=config.activation,
        dtype=dtype,
        device=device,
    )


class _Merger(nn.Module):
    """merge x merge patches become one token."""

    def __init__(self, config: QwenVisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._size = config.hidden_size * config.merge**2
        self.ln_q = _norm(config, dtype, device)
        self.mlp = MLP(
            self._size, self._size, config.out_size, ups=("0",), down="2", act_name="gelu", dtype=dtype, device=device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, merge**2, hidden_size) to (tokens, out_size)."""
        out: torch.Tensor = self.mlp(self.ln_q(x.flatten(0, 1)).view(-1, self._size))
        return out


def _norm(config: QwenVisionConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if config.gated_mlp:
        return RMSNorm(config.hidden_size, NORM_EPS, dtype=dtype, device=device)
    return layer_norm(config.hidden_size, NORM_EPS, dtype=dtype, device=device)


def patch_positions(high: int, wide: int, merge: int) -> torch.Tensor:
    """(high * wide, 2) int64: row and column of each patch, in the order of `transforms.patchify`."""
    rows, columns = np.indices((high, wide))
    grid = np.stack((rows, columns), -1).reshape(high // merge, merge, wide // merge, merge, 2)
    return torch.from_numpy(grid.swapaxes(1, 2).reshape(-1, 2))


def rope_angles(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """(N, head_dim / 2) float32: half of a head's pairs turn by the row, half by the column."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device) / (head_dim // 2)
    return (positions[..., None].float() * theta**-exponents).flatten(1)


def _order_of_all(grids: Sequence[Grid], config: QwenVisionConfig) -> tuple[torch.Tensor, list[int]]:
    """`window_order` of each image's tokens, one image behind the other."""
    orders, lens, begin = [], [], 0
    for high, wide in grids:
        order, window_lens = window_order(high // config.merge, wide // config.merge, config.window)
        orders.append(order + begin)
        lens += window_lens
        begin += len(order)
    return torch.cat(orders), lens


def window_order(high: int, wide: int, window: int) -> tuple[torch.Tensor, list[int]]:
    """Tokens of a (high, wide) grid ordered window by window, and the windows' lengths in tokens. No window: as is."""
    if not window:
        return torch.arange(high * wide), [high * wide]
    rows, columns = np.indices((high, wide)).reshape(2, -1) // window
    window_idx = rows * -(-wide // window) + columns
    return torch.from_numpy(np.argsort(window_idx, kind="stable")), np.bincount(window_idx).tolist()
