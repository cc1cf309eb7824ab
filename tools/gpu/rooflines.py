"""The least that a step must do: bytes that decode must read, operations that prefill and encode must compute; and how
fast this device reads and multiplies. Pure numbers from the model's own config, but for the two measurements."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu.devices import wait
from lightvl.models.config import DecoderConfig
from lightvl.models.family import ImageLayout
from lightvl.models.vision.config import MllamaVisionConfig, QwenVisionConfig


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float  # read and written, by a copy from device to device
    flops: float  # a second, bfloat16


def measure_bytes_per_s(device: str, num_bytes: int) -> float:
    source = torch.randn(num_bytes // 2).to(device, torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(device, lambda: target.copy_(source))


def measure_flops(device: str, size: int) -> float:
    """Random numbers: zeros multiply faster."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds(device, lambda: torch.mm(a, b, out=out))


def seconds(device: str, run: Callable[[], object], *, rounds: int = 10) -> float:
    """Median, after some rounds of warming up."""
    for _ in range(3):
        run()
    wait(device)
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def layer_weights(config: DecoderConfig) -> int:
    """Of one self-attention layer's matrices."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def cross_layer_weights(config: DecoderConfig) -> int:
    """Of one cross layer, when only queries are made: K,V of the image exist."""
    return config.hidden_size * (2 * config.num_heads * config.head_dim + 3 * config.intermediate_size)


def decoder_weights(config: DecoderConfig, *, with_cross: bool) -> int:
    """Of all matrices that a token passes, without the head."""
    total = config.kv_shape.num_layers * layer_weights(config)
    return total + (len(config.cross_layers) * cross_layer_weights(config) if with_cross else 0)


def decode_bytes(config: DecoderConfig, kv_lens: list[int], *, num_cross_pages: int, cross_page_len: int) -> int:
    """That one decode step must read: each weight once, each key and value once, each cross page once however many
    rows see it."""
    dtype, shape = torch.bfloat16, config.kv_shape
    weights = decoder_weights(config, with_cross=num_cross_pages > 0) + config.vocab_size * config.hidden_size
    cross = num_cross_pages * shape.bytes_per_cross_page(cross_page_len, dtype) if num_cross_pages else 0
    return weights * dtype.itemsize + sum(kv_lens) * shape.bytes_per_token(dtype) + cross


def prefill_flops(config: DecoderConfig, num_tokens: int) -> int:
    """Of one text prompt: logits of the last token only, and half of the scores (causal)."""
    attention = 2 * num_tokens**2 * config.num_heads * config.head_dim * config.kv_shape.num_layers
    linear = 2 * num_tokens * decoder_weights(config, with_cross=False)
    return linear + attention + 2 * config.vocab_size * config.hidden_size


def encode_flops(vision: QwenVisionConfig | MllamaVisionConfig, decoder: DecoderConfig, layout: ImageLayout) -> int:
    """Of one image, without windows; for mllama the K,V of the cross layers too."""
    size, mlp = vision.hidden_size, vision.mlp_size
    per_row = 4 * size**2 + (3 if getattr(vision, "gated_mlp", False) else 2) * size * mlp
    if isinstance(vision, QwenVisionConfig):
        rows, num_layers = layout.grid[1] * layout.grid[2], vision.num_layers
        merged = size * vision.merge**2
        after = rows // vision.merge**2 * (merged**2 + merged * vision.out_size)
    else:
        rows, num_layers = layout.num_cross_pages * vision.tile_len, vision.num_layers + vision.num_global_layers
        kv = 2 * decoder.num_kv_heads * decoder.head_dim * len(decoder.cross_layers)
        after = rows * vision.out_size * (vision.feature_size + kv)
    embed = rows * 3 * vision.patch**2 * size
    return 2 * (rows * per_row * num_layers + after + embed) + 4 * rows**2 * size * num_layers
