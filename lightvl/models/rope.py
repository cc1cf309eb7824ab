"""Rotary positions as one cos/sin table per step. M-RoPE lives here and nowhere else: a layer applies a table and
knows nothing of grids."""

from __future__ import annotations

import math

import torch

from lightvl.attention.ops import Ops, RopeTable, TorchOps, apply_rope
from lightvl.models.config import DecoderConfig, RopeScaling

__all__ = ["Rope", "apply_rope"]
TORCH_OPS = TorchOps()


class Rope:
    """Made once for a decoder; called once per step, before the layers."""

    def __init__(self, config: DecoderConfig, device: torch.device, ops: Ops = TORCH_OPS) -> None:
        self._ops = ops
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inv_freq = 1.0 / (config.rope_theta**exponents)
        self._amplitude = 1.0
        if config.rope_scaling is not None:
            inv_freq, self._amplitude = _scale(inv_freq, config.rope_theta, config.rope_scaling)
        self._inv_freq = inv_freq.to(device)
        axes = [axis % 3 for axis, num in enumerate(config.mrope_section or ()) for _ in range(num)]
        self._axis_idx = torch.tensor(axes, dtype=torch.int64, device=device)  # (D / 2,): t, h or w

    def table(self, positions: torch.Tensor) -> RopeTable:
        """For positions (T,), or (3, T) with M-RoPE: what `Ops.rope` takes."""
        if positions.dim() == 2:
            angles = positions[self._axis_idx].T.float() * self._inv_freq  # (T, D / 2)
        else:
            angles = positions[:, None].float() * self._inv_freq
        return self._ops.rope_table(angles.cos() * self._amplitude, angles.sin() * self._amplitude)


def _scale(inv_freq: torch.Tensor, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    return _yarn(inv_freq, theta, scaling)


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    turns = scaling.original_max_positions * inv_freq / (2 * math.pi)  # over the original context
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * inv_freq / scaling.factor + keep * inv_freq


def _yarn(inv_freq: torch.Tensor, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """As llama3, but blended over the index of the frequency, and with a larger amplitude."""
    half = len(inv_freq)

    def index_of(turns: float) -> float:
        wavelength = scaling.original_max_positions / (turns * 2 * math.pi)
        return half * math.log(wavelength) / math.log(theta)

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    inv_freq = inv_freq / scaling.factor * stretched + inv_freq * (1 - stretched)
    return inv_freq, _yarn_amplitude(scaling)


def _yarn_amplitude(scaling: RopeScaling) -> float:
    def amplitude(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return amplitude(scaling.mscale) / amplitude(scaling.mscale_all_dim)
    return amplitude(1.0)
