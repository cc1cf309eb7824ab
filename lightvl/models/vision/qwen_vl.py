"""The tower of Qwen2-VL and Qwen2.5-VL: one image's patches to features of the decoder's width.

Called by families/qwen2_vl.py, which plans the grid. The two differ by data: norms and MLP, and in Qwen2.5-VL most
layers attend within windows, so its patches travel in window order and the features are put back at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from lightvl.attention.base import EncoderAttention
from lightvl.models.linear import Linear
from lightvl.models.load import Target
from lightvl.models.rope import apply_rope
from lightvl.models.vision.config import QwenVisionConfig
from lightvl.models.vision.vit import (
    MLP,
    PatchEmbedding,
    RMSNorm,
    container_targets,
    head_pieces,
    layer_norm,
    pauses_after,
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
        self._blocks_in_order = [_Block(config, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(self._blocks_in_order)
        self.merger = _Merger(config, dtype=dtype, device=device)

    def encode(
        self, patches: torch.Tensor, high: int, wide: int, attention: EncoderAttention
    ) -> Iterator[torch.Tensor | None]:
        """`patches` (high * wide, patch * patch * 3) uint8, in squares of merge x merge as `transforms.patchify` gives
        them. Yields None several times a layer, at last (high * wide / merge**2, out_size)."""
        config, per_token = self._config, self._config.merge**2
        order, window_lens = window_order(high // config.merge, wide // config.merge, config.window)
        order = order.to(self._device)
        patches = patches.to(self._device)
        if config.window:  # bytes are the cheapest thing to reorder
            patches = patches.view(len(order), -1)[order].view(len(patches), -1)
        x = self.patch_embed(patches)
        positions = patch_positions(high, wide, config.merge).to(self._device)
        positions = positions.view(len(order), per_token, 2)[order].view(-1, 2)
        cos, sin = rope_table(positions, config.hidden_size // config.num_heads, config.rope_theta)
        window_lens = [tokens * per_token for tokens in window_lens]
        for layer_idx, block in enumerate(self._blocks_in_order):
            whole = not config.window or layer_idx in config.full_attention_layers
            yield from block.attend(x, cos, sin, [len(x)] if whole else window_lens, attention)
            yield from block.feed_forward(x)
        features: torch.Tensor = self.merger(x)
        yield features[order.argsort()]


class _Block(nn.Module):
    def __init__(self, config: QwenVisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size = config.hidden_size
        self._num_heads = config.num_heads
        self.norm1 = _norm(config, dtype, device)
        self.norm2 = _norm(config, dtype, device)
        self.qkv = Linear(size, {"attn.qkv": 3 * size}, bias=True, dtype=dtype, device=device)
        self.proj = Linear(size, {"attn.proj": size}, bias=True, dtype=dtype, device=device)
        self.mlp = MLP(
            size,
            config.mlp_size,
            size,
            ups=("gate_proj", "up_proj") if config.gated_mlp else ("fc1",),
            down="down_proj" if config.gated_mlp else "fc2",
            activation=config.activation,
            dtype=dtype,
            device=device,
        )

    def attend(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seg_lens: list[int], attention: EncoderAttention
    ) -> Iterator[None]:
        """Add attention's part to x (N, size), in place, in bounded pieces."""
        num_turned = 2 * self._num_heads  # q and k
        qkv = x.new_empty(len(x), 3 * self._num_heads, x.shape[-1] // self._num_heads)
        for rows in row_chunks(x):
            part = self.qkv(self.norm1(x[rows])).view(-1, *qkv.shape[1:])
            qkv[rows, :num_turned] = apply_rope(part[:, :num_turned], cos[rows], sin[rows])
            qkv[rows, num_turned:] = part[:, num_turned:]
            if pauses_after(rows):
                yield
        q, k, v = qkv.chunk(3, 1)
        attended = torch.empty_like(q, memory_format=torch.contiguous_format)
        for heads in head_pieces(q, sum(seg_len**2 for seg_len in seg_lens)):
            attended[:, heads] = attention(q[:, heads], k[:, heads], v[:, heads], seg_lens)
            yield
        x += self.proj(attended.flatten(1))

    def feed_forward(self, x: torch.Tensor) -> Iterator[None]:
        """Add the MLP's part to x, in place, in bounded pieces."""
        for rows in row_chunks(x):
            x[rows] += self.mlp(self.norm2(x[rows]))
            if pauses_after(rows):
                yield
        yield

    def weight_targets(self) -> dict[str, Target]:
        return container_targets(self)


class _Merger(nn.Module):
    """merge x merge patches become one token."""

    def __init__(self, config: QwenVisionConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._size = config.hidden_size * config.merge**2
        self.ln_q = _norm(config, dtype, device)
        self.mlp = MLP(
            self._size, self._size, config.out_size, ups=("0",), down="2", activation="gelu", dtype=dtype, device=device
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(self.ln_q(x).view(-1, self._size))
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


def rope_table(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, 1, head_dim) float32 as `apply_rope` takes them: a quarter of a head turns by the row, the next
    by the column, the other half mirrors them."""
    exponents = torch.arange(0, head_dim // 2, 2, dtype=torch.float32, device=positions.device) / (head_dim // 2)
    angles = (positions[..., None].float() * theta**-exponents).flatten(1)  # (N, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def window_order(high: int, wide: int, window: int) -> tuple[torch.Tensor, list[int]]:
    """Tokens of a (high, wide) grid ordered window by window, and the windows' lengths in tokens. No window: as is."""
    if not window:
        return torch.arange(high * wide), [high * wide]
    rows, columns = np.indices((high, wide)).reshape(2, -1) // window
    window_idx = rows * -(-wide // window) + columns
    return torch.from_numpy(np.argsort(window_idx, kind="stable")), np.bincount(window_idx).tolist()
