"""`ops.Ops` with fused kernels: float16 and bfloat16, on the current stream, fit for CUDA graphs. They are
flashinfer's; what it does not have, and vision towers need, are our own (`kernels/cuda.py`).

Made by `ops.ops_for` when a model is built. Every kernel wants the last dimension contiguous; rows may be strided.
"""

from __future__ import annotations

import torch

from lightvl.attention.cuda_library import flashinfer
from lightvl.attention.ops import RopeTable, TorchOps
from lightvl.kernels.cuda import tower_kernels

ROPE_DIMS = (64, 128, 256)
"""Head sizes that flashinfer's rope is for; those of towers are 72 and 80."""


class FlashinferOps:
    def __init__(self) -> None:
        library = flashinfer()
        self._tower, self._torch = tower_kernels(), TorchOps()
        self._rmsnorm = library.rmsnorm
        self._fused_add_rmsnorm = library.fused_add_rmsnorm
        self._silu_and_mul = library.silu_and_mul
        self._apply_rope = library.apply_rope_with_cos_sin_cache_inplace

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out: torch.Tensor = self._rmsnorm(x, weight, eps)
        return out

    def add_rms_norm(
        self, branch: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._fused_add_rmsnorm(branch, x, weight, eps)  # x += branch, branch = norm(x)
        return branch, x

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self._silu_and_mul(gate_up)
        return out

    def quick_gelu(self, x: torch.Tensor) -> torch.Tensor:
        if self._tower is None:
            return self._torch.quick_gelu(x)
        self._tower.quick_gelu_(x)
        return x

    def rope_table(self, cos: torch.Tensor, sin: torch.Tensor) -> RopeTable:
        """The kernel looks a token's angles up by its position: here a token's position is its own row of the step's
        table, so that M-RoPE is the same kernel. (T,) int32 and (T, D) float32, cos then sin."""
        if self._leaves_rope_to_torch(2 * cos.shape[-1]):
            return self._torch.rope_table(cos, sin)
        return torch.arange(len(cos), dtype=torch.int32, device=cos.device), torch.cat((cos, sin), -1)

    def rope(
        self, heads: torch.Tensor, num_heads: int, num_kv_heads: int, table: RopeTable
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dim = heads.shape[-1]
        if self._leaves_rope_to_torch(dim):
            return self._torch.rope(heads, num_heads, num_kv_heads, table)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], 1)
        rows, cos_sin = table
        if dim in ROPE_DIMS:
            self._apply_rope(rows, q, k, dim, cos_sin, True)
        elif self._tower is not None:
            self._tower.rope_(heads, num_heads + num_kv_heads, cos_sin)
        return q, k, v

    def _leaves_rope_to_torch(self, dim: int) -> bool:
        return dim not in ROPE_DIMS and self._tower is None
