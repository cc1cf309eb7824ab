"""The elementwise operations between the matmuls of decoders and vision towers: norms, activations, rope. One small
seam, chosen by device when a model is built: torch and our own kernels for CPUs here, fused kernels in `cuda_ops.py`.

Called by `models`; knows no layers. T tokens or patches, D head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from lightvl.kernels.cpu import CpuKernels, cpu_kernels

RopeTable = tuple[torch.Tensor, torch.Tensor]
"""What `Ops.rope_table` makes and `Ops.rope` takes, once per step: its contents are the implementation's own."""


class Ops(Protocol):
    """Operations may overwrite what they are given where it is said."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension of x (T, size) or (T, heads, D); float32 inside."""
        ...

    def add_rms_norm(
        self, branch: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + branch, x + branch), both (T, size). Overwrites x, and may overwrite `branch`."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of (T, 2 * size), gate first, to (T, size)."""
        ...

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        """x * sigmoid(1.702 x). May overwrite x, which is dense."""
        ...

    def rope_table(self, cos: torch.Tensor, sin: torch.Tensor) -> RopeTable:
        """From cos and sin of a step's angles, each (T, D / 2) float32."""
        ...

    def rope(
        self, heads: torch.Tensor, num_heads: int, num_kv_heads: int, table: RopeTable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v of heads (T, H + 2 G, D) with q and k turned; may overwrite `heads` and return views of it."""
        ...


class TorchOps:
    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Rounded before the weight, as transformers does. (torch's own rms_norm takes 2 to 20 times as long for a
        chunk on a CPU.)"""
        wide = x.float()
        norm: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(weight)

    def add_rms_norm(
        self, branch: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x.add_(branch)
        return self.rms_norm(x, weight, eps), x

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 1.702).sigmoid_().mul_(x)

    def rope_table(self, cos: torch.Tensor, sin: torch.Tensor) -> RopeTable:
        """As `apply_rope` wants them."""
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def rope(
        self, heads: torch.Tensor, num_heads: int, num_kv_heads: int, table: RopeTable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_turned = num_heads + num_kv_heads
        turned = apply_rope(heads[:, :num_turned], *table)
        return turned[:, :num_heads], turned[:, num_heads:], heads[:, num_turned:]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate all heads of x (T, heads, D), q and k together, in float32; returns x's dtype, contiguous. cos and sin
    (T, 1, D) float32; the sine's first half is negated."""
    wide = x.float()
    half = x.shape[-1] // 2
    turned = torch.cat((wide[..., half:], wide[..., :half]), -1)
    return torch.addcmul(turned.mul_(sin), wide, cos).to(x.dtype)


class CpuKernelOps:
    """As `TorchOps`, rounding included, in one pass each; bfloat16 only."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self.kernels.rms_norm(x.contiguous(), weight, eps)

    def add_rms_norm(
        self, branch: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kernels.rms_norm(x, weight, eps, branch), x

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.kernels.silu_and_mul(gate_up)

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.quick_gelu_(x)

    def rope_table(self, cos: torch.Tensor, sin: torch.Tensor) -> RopeTable:
        return cos.contiguous(), sin.contiguous()

    def rope(
        self, heads: torch.Tensor, num_heads: int, num_kv_heads: int, table: RopeTable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_turned = num_heads + num_kv_heads
        self.kernels.rope(heads, num_turned, *table)
        return heads[:, :num_heads], heads[:, num_heads:num_turned], heads[:, num_turned:]


def ops_for(device: torch.device, dtype: torch.dtype) -> Ops:
    """Raises ConfigError where the device's kernels are not installed; on a CPU they are not needed."""
    if device.type == "cuda":
        from lightvl.attention.cuda_ops import FlashinferOps

        return FlashinferOps()
    kernels = cpu_kernels() if dtype == torch.bfloat16 else None
    return TorchOps() if kernels is None else CpuKernelOps(kernels)
