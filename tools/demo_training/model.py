"""What the models of all architectures share: fresh weights, attention that can be looked at, the loss of answers.

The forwards of `qwen2_vl` and `mllama` are lean ones over transformers' own modules, several times faster on a CPU:
images of one grid are one dense tensor, and the branches of a sequence see only their shared prefix. tests/tools holds
them against transformers' own.
"""

import functools
import json
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from published import CLIP_MEAN, CLIP_STD
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import rotate_half

from .samples import Batch, Writer
from .views import PATCH, ImageGroup


class Architecture(Protocol):
    """What training asks of a model; `Qwen2VL` and `Mllama` are the two."""

    model: torch.nn.Module
    tower: torch.nn.Module
    feature_size: int

    def writer(self) -> Writer: ...
    def encode(self, group: ImageGroup) -> Tensor: ...
    def hidden_states(self, batch: Batch, views: list[Tensor], looks: dict[int, Tensor] | None = None) -> Tensor: ...
    def export(self, folder: Path) -> None: ...


def initialize(part: torch.nn.Module) -> None:
    """Weights by fan-in: the usual 0.02 is for wide models; a tower this narrow went unread for 600 steps with it."""
    for name, module in part.named_modules():
        if isinstance(module, torch.nn.Linear):
            std = module.in_features**-0.5
            if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")):  # they write to a residual of 4 layers
                std *= 8**-0.5
            torch.nn.init.normal_(module.weight, 0, std)


# Before it has learned anything, each head of a tower's first layers looks at one neighbour of its patch, so many rows
# and columns away, as the kernels of a convolution do: letters are learned in half of the steps.
NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 2), (0, -2), (2, 0), (-2, 0))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions applied to (..., length, head_dim)."""
    return x * cos + rotate_half(x) * sin


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain attention (rows, heads, length, head_dim) and its weights: 3 times faster than the fused kernel."""
    rows, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    query = (query * head_dim**-0.5).reshape(rows * key.shape[1], groups * length, head_dim)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    scores = torch.bmm(query, key.transpose(1, 2))
    if mask is not None:
        scores = (scores.view(rows, heads, length, -1) + mask).view(scores.shape)
    look = scores.softmax(-1)
    mixed = torch.bmm(look, value).view(rows, heads, length, head_dim)
    return mixed, look.view(rows, heads, length, -1)


def self_layer(layer: torch.nn.Module, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """One layer of a text model for (rows, length, hidden), and its attention (rows, heads, length, length)."""
    attn = layer.self_attn
    normed = layer.input_layernorm(x)
    query, key, value = (
        proj(normed).view(*x.shape[:2], -1, attn.head_dim).transpose(1, 2)
        for proj in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    mixed, look = attend(rotate(query, cos, sin), rotate(key, cos, sin), value, mask)
    x = x + attn.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
    return x + layer.mlp(layer.post_attention_layernorm(x)), look


def half(table: Tensor) -> Tensor:
    return table.to(torch.bfloat16) if torch.is_autocast_enabled(table.device.type) else table


def attention_mask(branches: Tensor) -> Tensor:
    """(rows, 1, length, length), added to scores: a token sees what precedes it in the prefix and in its branch."""
    same = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == 0)
    seen = same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril()
    return half(hidden_where(~seen)).unsqueeze(1)


def hidden_where(is_hidden: Tensor) -> Tensor:
    """Added to scores: nothing, or minus infinity."""
    return torch.zeros(is_hidden.shape, device=is_hidden.device).masked_fill_(is_hidden, float("-inf"))


@functools.cache
def pixel_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels of a flat patch, in units of a byte."""
    scales = (torch.tensor(values, device=device) for values in (CLIP_MEAN, CLIP_STD))
    mean, std = (scale.repeat_interleave(PATCH * PATCH) * 255 for scale in scales)
    return mean, std


def answer_loss(net: Architecture, batch: Batch, views: list[Tensor], looks: dict[int, Tensor] | None = None) -> Tensor:
    """Mean cross entropy over the tokens of answers (with the one that ends each); fills `looks`."""
    hidden = net.hidden_states(batch, views, looks).flatten(0, 1)[batch.answer_slots]
    losses = F.cross_entropy(net.model.lm_head(hidden).float(), batch.answer_ids, reduction="none")
    return (losses * batch.answer_weights).sum() / batch.answer_weights.sum()


def write_checkpoint(folder: Path, weights: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
    """Weights in bf16 under these names, and JSON files. The weights are renamed into place last, so that a folder with
    weights is whole."""
    packed = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    partial = folder / "model.safetensors.partial"
    save_file(packed, partial, metadata={"format": "pt"})
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    partial.chmod(0o644)
    partial.rename(folder / "model.safetensors")
