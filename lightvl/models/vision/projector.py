"""What stands between a LLaVA tower and the decoder: linear layers with an activation between, and the row that ends a
line of patches. Built by families/llava.py."""

from __future__ import annotations

import torch
from torch import nn

from lightvl.attention.ops import ops_for
from lightvl.models.linear import Linear
from lightvl.models.load import Target
from lightvl.models.vision.llava_config import LlavaConfig
from lightvl.models.vision.vit import activation, parameter


class Projector(nn.Module):
    def __init__(self, config: LlavaConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._act = activation(config.projector_activation, ops_for(device, dtype))
        self._linears: list[Linear] = []
        in_size = config.tower.hidden_size * len(config.tower.kept_states)
        for name in config.projector_names:
            linear = Linear(in_size, {name: config.out_size}, bias=config.projector_bias, dtype=dtype, device=device)
            self._linears.append(linear)
            in_size = config.out_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., tower's features) to (..., decoder's hidden size)."""
        for linear_idx, linear in enumerate(self._linears):
            x = linear(self._act(x) if linear_idx else x)
        return x

    def weight_targets(self) -> dict[str, Target]:
        # a lone linear layer is the projector itself and has no name of its own
        return {
            name.lstrip("."): target for linear in self._linears for name, target in linear.weight_targets().items()
        }


class Newline(nn.Module):
    """`image_newline` (hidden,), or None for a model without one; some checkpoints carry it all the same."""

    def __init__(self, config: LlavaConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        exists = config.merge == "spatial_unpad"
        self.image_newline = parameter(config.out_size, dtype=dtype, device=device) if exists else None
