"""What vision towers need on a GPU and neither torch nor flashinfer has in one pass, in Triton: rope for head sizes
such as 72 and 80, and quick_gelu.

Bound by `cuda.py`, which imports this only where Triton is: launches are on the current stream. float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GELU_BLOCK = 2048
ROPE_LANES = 2048
"""Pairs of numbers that one program turns."""


@triton.jit  # type: ignore[untyped-decorator]
def _quick_gelu(x_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size).to(tl.float32)
    tl.store(x_ptr + at, x / (1.0 + tl.exp(-1.702 * x)), mask=at < size)


@triton.jit  # type: ignore[untyped-decorator]
def _rope(  # type: ignore[no-untyped-def]
    heads_ptr,
    table_ptr,
    row_stride,
    num_turned,
    HALF: tl.constexpr,
    HALF_LANES: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, HALF_LANES)[None, :]
    mask = (head < num_turned) & (lane < HALF)
    cos = tl.load(table_ptr + row * 2 * HALF + lane, mask=lane < HALF)
    sin = tl.load(table_ptr + row * 2 * HALF + HALF + lane, mask=lane < HALF)
    at = heads_ptr + row * row_stride + head * 2 * HALF + lane
    first = tl.load(at, mask=mask).to(tl.float32)
    second = tl.load(at + HALF, mask=mask).to(tl.float32)
    tl.store(at, first * cos - second * sin, mask=mask)
    tl.store(at + HALF, second * cos + first * sin, mask=mask)


def quick_gelu_(x: torch.Tensor) -> None:
    """x * sigmoid(1.702 x), in place; x dense."""
    assert x.is_contiguous()
    _quick_gelu[(triton.cdiv(x.numel(), GELU_BLOCK),)](x, x.numel(), BLOCK=GELU_BLOCK)


def rope_(heads: torch.Tensor, num_turned: int, cos_sin: torch.Tensor) -> None:
    """Turn the first `num_turned` heads of (T, heads, D) in place; cos_sin (T, D) float32 dense, cos first."""
    num_rows, _, dim = heads.shape
    assert heads.stride()[1:] == (dim, 1) and cos_sin.is_contiguous() and cos_sin.shape == (num_rows, dim)
    half_lanes = triton.next_power_of_2(dim // 2)
    num_heads = min(triton.next_power_of_2(num_turned), max(1, ROPE_LANES // half_lanes))
    grid = (num_rows, triton.cdiv(num_turned, num_heads))
    _rope[grid](heads, cos_sin, heads.stride(0), num_turned, HALF=dim // 2, HALF_LANES=half_lanes, HEADS=num_heads)
