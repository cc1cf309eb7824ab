"""Linear layers whose weight is held as the device wants it, and the choice of dtype that goes with it.

On a CPU a decoder's bfloat16 weights stay as they are and few rows are multiplied by a kernel of our own; all else is
packed once for oneDNN, whose packed matmul is 1.5 to 4 times faster than F.linear when few rows are computed and 5%
faster with thousands. Used by the decoder and by vision towers; knows nothing about either.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lightvl.kernels.cpu import MAX_LINEAR_ROWS, CpuKernels, cpu_kernels
from lightvl.models.load import Target

PACK_ROWS_HINT = 64
"""Rows that oneDNN chooses its blocking for. Any number will do; none at all is half as fast."""


def pick_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to serve in when the user did not choose, and why."""
    if device.type != "cpu":
        return torch.bfloat16, "the device computes in it natively"
    if _has_packed_ops() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16, "this CPU multiplies bfloat16 natively"
    return torch.float32, "this CPU is slow at bfloat16"


def _has_packed_ops() -> bool:
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


class Linear(nn.Module):
    """One matrix that several checkpoint weights fill, stacked along the output: `pieces` maps each one's name (without
    ".weight") to its rows. `few_rows`: most calls bring few rows, as decoding does. Where the weight is packed, that
    happens when the last piece has arrived, and the plain matrix is freed."""

    def __init__(
        self,
        in_features: int,
        pieces: dict[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        few_rows: bool = False,
    ) -> None:
        super().__init__()
        self._in_features, self._pieces = in_features, dict(pieces)
        self._out_features = sum(pieces.values())
        self._dtype, self._device = dtype, device
        self._weight: torch.Tensor | None = None  # (out, in); packed once full, where the device wants that
        self._bias = torch.empty(self._out_features, dtype=dtype, device=device) if bias else None
        self._num_empty = len(pieces)
        self._is_packed = False
        wants_kernels = few_rows and device.type == "cpu" and dtype == torch.bfloat16
        self._kernels: CpuKernels | None = cpu_kernels() if wants_kernels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        assert self._num_empty == 0 and self._weight is not None
        if self._is_packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        if self._kernels is not None and x.numel() <= MAX_LINEAR_ROWS * self._in_features:
            return self._kernels.linear(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def weight_targets(self) -> dict[str, Target]:
        targets: dict[str, Target] = {}
        start = 0
        for name, rows in self._pieces.items():
            targets[f"{name}.weight"] = Target((rows, self._in_features), _Fill(self, start, is_bias=False))
            if self._bias is not None:
                targets[f"{name}.bias"] = Target((rows,), _Fill(self, start, is_bias=True))
            start += rows
        return targets

    def use_weight(self, weight: torch.Tensor) -> None:
        """Take an existing (out, in) matrix, as a head does that is tied to the embedding."""
        assert weight.shape == (self._out_features, self._in_features)
        self._weight, self._num_empty = weight, 0
        self._pack()

    def _fill_rows(self, start: int, piece: torch.Tensor) -> None:
        if self._weight is None:  # only now, so that a whole model's plain matrices never exist at once
            shape = (self._out_features, self._in_features)
            self._weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._weight[start : start + len(piece)].copy_(piece)
        self._num_empty -= 1
        if self._num_empty == 0:
            self._pack()

    def _pack(self) -> None:
        if self._kernels is None and self._device.type == "cpu" and _can_pack(self._dtype):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACK_ROWS_HINT)
            self._is_packed = True


def _can_pack(dtype: torch.dtype) -> bool:
    if not _has_packed_ops():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Fill:
    def __init__(self, owner: Linear, start: int, *, is_bias: bool) -> None:
        self._owner, self._start, self._is_bias = owner, start, is_bias

    def __call__(self, piece: torch.Tensor) -> None:
        if self._is_bias:
            assert self._owner._bias is not None
            self._owner._bias[self._start : self._start + len(piece)].copy_(piece)
        else:
            self._owner._fill_rows(self._start, piece)
