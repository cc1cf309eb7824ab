"""Linear layers whose weight is held as the device wants it, and the choice of dtype that goes with it.

On a CPU a decoder's bfloat16 weights are packed into 12 bits each, exactly, and few rows are multiplied by a kernel of
our own; for many rows they are unpacked for oneDNN, which takes 6% of the product's time at 512 rows. All else is
packed once for oneDNN, whose packed matmul is 1.5 to 4 times faster than F.linear when few rows are computed and 5%
faster with thousands. The head is kept in 7 bits too, from which the greatest logits of a few rows are found.
Used by the decoder and by vision towers; knows nothing about either.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from lightvl.kernels.cpu import (
    MAX_BEST_ROWS,
    MAX_LINEAR_ROWS,
    CoarseMatrix,
    CpuKernels,
    PackedMatrix,
    cpu_kernels,
    empty_weight,
)
from lightvl.kernels.cpu_layers import LinearWeights
from lightvl.models.load import Target

PACK_ROWS_HINT = 64
"""Rows that oneDNN chooses its blocking for. Any number will do; none at all is half as fast."""
SLAB_SIZE = 1 << 25
"""Most weights unpacked at once for many rows: 64 MB. Smaller slabs would stay in the cache, but threads wait for each
other at each one's end: on a busy machine that takes longer."""
SLAB_ROWS = 192
"""Slabs have a multiple of it, where so many fit: as matmuls and packing like it."""


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
    ".weight") to its rows. `few_rows`: most calls bring few rows, as decoding does. `is_head`: `best` is called. Where
    the weight is packed, that happens when the last piece has arrived, and the plain matrix is not kept."""

    def __init__(
        self,
        in_features: int,
        pieces: dict[str, int],
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        few_rows: bool = False,
        is_head: bool = False,
    ) -> None:
        super().__init__()
        self._in_features, self._pieces = in_features, dict(pieces)
        self._out_features = sum(pieces.values())
        self._dtype, self._device = dtype, device
        self._weight: torch.Tensor | None = None  # (out, in); blocked for oneDNN once full, where the device wants that
        self._packed: PackedMatrix | None = None  # instead of it
        self._coarse: CoarseMatrix | None = None  # beside that
        self._bias = torch.empty(self._out_features, dtype=dtype, device=device) if bias else None
        self._num_empty = len(pieces)
        self._is_blocked, self._is_head = False, is_head
        wants_kernels = few_rows and device.type == "cpu" and dtype == torch.bfloat16
        self._kernels: CpuKernels | None = cpu_kernels() if wants_kernels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out)."""
        assert self._num_empty == 0
        is_few = x.numel() <= MAX_LINEAR_ROWS * self._in_features
        if self._kernels is not None and self._packed is not None:
            return self._kernels.linear(x, self._packed, self._bias) if is_few else self._by_slabs(x)
        assert self._weight is not None
        if self._is_blocked:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        if self._kernels is not None and is_few:
            return self._kernels.linear(x, self._weight, self._bias)
        return F.linear(x, self._weight, self._bias)

    def kernel_weights(self) -> LinearWeights | None:
        """The weight as our own kernels take it, if they do."""
        weight = self._weight if self._packed is None else self._packed
        return None if self._kernels is None or weight is None else LinearWeights(weight, self._bias)

    def best(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, of x (T, in), but outputs less than their row's greatest may be minus infinity: a third less to
        read where the weight is packed."""
        if self._coarse is None or self._packed is None or self._kernels is None or len(x) > MAX_BEST_ROWS:
            return self.forward(x)
        return self._kernels.best(x, self._packed, self._coarse)

    def _by_slabs(self, x: torch.Tensor) -> torch.Tensor:
        assert self._kernels is not None and self._packed is not None
        flat = x.reshape(-1, self._in_features)
        out = x.new_empty(len(flat), self._out_features)
        step = max(1, SLAB_SIZE // self._in_features // SLAB_ROWS) * SLAB_ROWS
        memory = _slab_memory(step * self._in_features)
        for first in range(0, self._out_features, step):
            end = min(first + step, self._out_features)
            slab = memory[: (end - first) * self._in_features].view(end - first, self._in_features)
            self._kernels.unpack_slab(self._packed, first, slab)
            if self._bias is None:
                torch.mm(flat, slab.t(), out=out[:, first:end])
            else:
                torch.addmm(self._bias[first:end], flat, slab.t(), out=out[:, first:end])
        return out.view(*x.shape[:-1], self._out_features)

    def weight_targets(self) -> dict[str, Target]:
        targets: dict[str, Target] = {}
        start = 0
        for name, rows in self._pieces.items():
            targets[f"{name}.weight"] = Target((rows, self._in_features), _Fill(self, start, is_bias=False))
            if self._bias is not None:
                targets[f"{name}.bias"] = Target((rows,), _Fill(self, start, is_bias=True))
            start += rows
        return targets

    def use_weight(self, weight: torch.Tensor) -> bool:
        """Take an existing (out, in) matrix, as a head does that is tied to the embedding. Whether `rows` now gives the
        matrix back, so that it need not be kept beside."""
        assert weight.shape == (self._out_features, self._in_features)
        self._weight, self._num_empty = weight, 0
        self._pack()
        return self._packed is not None

    def rows(self, idx: torch.Tensor) -> torch.Tensor:
        """The rows idx (R,) int64 of the weight, as they came."""
        assert self._kernels is not None and self._packed is not None
        return self._kernels.unpack_rows(self._packed, idx)

    def _fill_rows(self, start: int, piece: torch.Tensor) -> None:
        if self._weight is None:  # only now, so that a whole model's plain matrices never exist at once
            shape = (self._out_features, self._in_features)
            if self._kernels is not None:
                self._weight = empty_weight(shape, self._dtype)
            else:
                self._weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._weight[start : start + len(piece)].copy_(piece)
        self._num_empty -= 1
        if self._num_empty == 0:
            self._pack()

    def _pack(self) -> None:
        if self._kernels is not None and self._weight is not None:
            self._packed = self._kernels.pack(self._weight)
            if self._packed is not None:
                if self._is_head and self._bias is None:
                    self._coarse = self._kernels.coarsen(self._weight)
                self._weight = None
        elif self._kernels is None and self._device.type == "cpu" and _can_pack(self._dtype):
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACK_ROWS_HINT)
            self._is_blocked = True


@functools.lru_cache(maxsize=4)
def _slab_memory(size: int) -> torch.Tensor:
    """For all layers, since one thread computes. Fresh memory would cost more in page faults than the unpacking."""
    return empty_weight((size,), torch.bfloat16)


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
