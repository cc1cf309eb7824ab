"""The CLIP and SigLIP towers of the LLaVA models: square views in, one feature per patch (and class token) out.

Called by families/llava.py, which makes the views. The two differ by data: CLIP has a class token and a norm before its
layers, SigLIP a bias in its patch embedding. Only the layers up to the last one whose output is used exist here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lightvl.attention.base import EncoderAttention
from lightvl.models.load import Target
from lightvl.models.vision.llava_config import ViewTowerConfig
from lightvl.models.vision.vit import (
    Layer,
    PatchEmbedding,
    WithinSegments,
    container_targets,
    layer_norm,
    parameter,
)

GROUP_ROWS = 4096
"""Rows of the views that go through a CPU's layers together: more are no faster, and what is between layers grows."""


class ViewTower(nn.Module):
    """Attributes carry the checkpoints' names, `pre_layrnorm` as they spell it."""

    def __init__(self, config: ViewTowerConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._config, self._device = config, device
        self.embeddings = _Embeddings(config, dtype, device)
        if config.has_class_token:
            self.pre_layrnorm = layer_norm(config.hidden_size, config.norm_eps, dtype=dtype, device=device)
        self._layers_in_order = [_layer(config, dtype, device) for _ in range(max(config.kept_states))]
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(self._layers_in_order)

    def encode(self, views: torch.Tensor, attention: EncoderAttention) -> Iterator[torch.Tensor | None]:
        """`views` (n, patches, patch * patch * 3) uint8, taken in groups on a CPU. Yields None several times a layer,
        and after each group its features (group's views, view_len, feature_size)."""
        view_len = self._config.view_len
        size = max(1, GROUP_ROWS // view_len) if self._device.type == "cpu" else len(views)
        for group in torch.split(views, size):
            x = self.embeddings(group)
            if self._config.has_class_token:
                x = self.pre_layrnorm(x)
            x = x.flatten(0, 1)
            kept = {0: x.clone()} if 0 in self._config.kept_states else {}
            attend = WithinSegments([view_len] * len(group), attention)
            for layer_idx, layer in enumerate(self._layers_in_order, 1):
                yield from layer.steps(x, attend)
                if layer_idx in self._config.kept_states:
                    kept[layer_idx] = x.clone() if layer_idx < len(self._layers_in_order) else x
            features = torch.cat([kept[state_idx] for state_idx in self._config.kept_states], -1)
            yield features.view(len(group), view_len, -1)


class _Embeddings(nn.Module):
    def __init__(self, config: ViewTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size = config.hidden_size
        self.patch_embedding = PatchEmbedding(
            "weight", (config.patch, config.patch), size, config.pixels, dtype=dtype, device=device
        )
        self._position = parameter(config.view_len, size, dtype=dtype, device=device)
        self._class = parameter(size, dtype=dtype, device=device) if config.has_class_token else None
        self._bias = None if config.has_class_token else parameter(size, dtype=dtype, device=device)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """(n, patches, bytes) to (n, view_len, size)."""
        x: torch.Tensor = self.patch_embedding(views)
        if self._class is not None:
            x = torch.cat((self._class.expand(len(x), 1, -1), x), 1)
        if self._bias is not None:
            x += self._bias
        return x.add_(self._position)

    def weight_targets(self) -> dict[str, Target]:
        patches = self.patch_embedding.weight_targets()
        targets = {f"patch_embedding.{name}": target for name, target in patches.items()}
        own = container_targets(self)
        names = {
            "_position": "position_embedding.weight",
            "_class": "class_embedding",
            "_bias": "patch_embedding.bias",
        }
        return targets | {names[name]: target for name, target in own.items() if name in names}


def _layer(config: ViewTowerConfig, dtype: torch.dtype, device: torch.device) -> Layer:
    size = config.hidden_size
    return Layer(
        size,
        config.num_heads,
        config.mlp_size,
        norms={
            name: layer_norm(size, config.norm_eps, dtype=dtype, device=device)
            for name in ("layer_norm1", "layer_norm2")
        },
        proj="self_attn.out_proj",
        act_name=config.activation,
        dtype=dtype,
        device=device,
    )
