"""Decode rows through consecutive decoder layers in one call of C: the binding of cpu_layers.c."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightvl.kernels.cpu import AttentionStruct, CpuKernels, PackedMatrix


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """(n, k) and (n,), bfloat16, dense."""

    weight: torch.Tensor | PackedMatrix
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Of a self-attention layer with SwiGLU; norms are (hidden,)."""

    attention_norm: torch.Tensor
    qkv: LinearWeights
    out: LinearWeights
    mlp_norm: torch.Tensor
    gate_up: LinearWeights
    down: LinearWeights


class _Linear(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("plain", "packed", "bias"))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm")),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "branch", "normed", "qkv", "attended", "gate_up", "activated")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        ("attention", AttentionStruct),
        *((name, ctypes.c_long) for name in ("layer_stride", "hidden", "intermediate", "has_branch")),
        ("eps", ctypes.c_float),
    )


class LayerStack:
    """Consecutive layers of one shape: H query heads, G K,V heads, D head size, a multiple of 32."""

    def __init__(
        self, kernels: CpuKernels, layers: Sequence[LayerWeights], *, heads: tuple[int, int, int], eps: float
    ) -> None:
        """heads: H, G and D."""
        self._kernels, self._weights = kernels, tuple(layers)  # kept: the structs hold their addresses only
        self._heads, self._eps = heads, eps
        self._layers = (_Layer * len(layers))(*(_layer(weights) for weights in layers))
        down, gate_up = layers[0].down.weight, layers[0].gate_up.weight
        self._hidden, self._intermediate = down.shape
        assert gate_up.shape == (2 * self._intermediate, self._hidden)

    def run(
        self,
        branch: torch.Tensor | None,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        kv_lens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and branch (R, hidden), R rows of one token each, to the same behind the layers; both are overwritten.
        cos and sin (R, D / 2) float32. keys and values (layers, G, num_pages, page_len, D) get each row's new ones, as
        the last of its kv_lens (R,) int64 in its pages (R, P) int64. All dense but the pages."""
        num_rows, (num_heads, num_kv_heads, dim) = len(x), self._heads
        assert keys.shape[:2] == (len(self._layers), num_kv_heads) and keys[0].is_contiguous() and keys.shape[-1] == dim
        assert x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and pages.stride(1) == 1
        assert x.shape[1] == self._hidden and cos.shape == (num_rows, dim // 2) and dim % 32 == 0
        has_branch = branch is not None
        if branch is None:
            branch = torch.empty_like(x)
        sizes = (
            self._hidden,
            (num_heads + 2 * num_kv_heads) * dim,
            num_heads * dim,
            2 * self._intermediate,
            self._intermediate,
        )
        scratch = [x.new_empty(num_rows, size) for size in sizes]
        partial = self._kernels.attention_scratch(kv_lens, num_heads, dim)
        attention = AttentionStruct(
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            pages=pages.data_ptr(),
            kv_lens=kv_lens.data_ptr(),
            partial=partial.data_ptr(),
            rows=num_rows,
            pages_stride=pages.stride(0),
            heads=num_heads,
            kv_heads=num_kv_heads,
            dim=dim,
            num_pages=keys.shape[2],
            page_len=keys.shape[3],
            scale=dim**-0.5,
        )
        tensors = (x, branch, *scratch, cos, sin)
        shape = keys.stride(0), self._hidden, self._intermediate, has_branch
        rows = _Rows(*(tensor.data_ptr() for tensor in tensors), attention, *shape, self._eps)
        self._kernels.decode_layers(self._layers, rows)
        return branch, x


def _layer(weights: LayerWeights) -> _Layer:
    linears = (_linear(linear) for linear in (weights.qkv, weights.out, weights.gate_up, weights.down))
    return _Layer(*linears, weights.attention_norm.data_ptr(), weights.mlp_norm.data_ptr())


def _linear(linear: LinearWeights) -> _Linear:
    bias = None if linear.bias is None else linear.bias.data_ptr()
    if isinstance(linear.weight, PackedMatrix):
        return _Linear(None, ctypes.addressof(linear.weight.struct), bias)
    assert linear.weight.is_contiguous() and linear.weight.dtype == torch.bfloat16
    return _Linear(linear.weight.data_ptr(), None, bias)
