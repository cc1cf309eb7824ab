"""The Triton kernels in Triton's interpreter, where it is installed: a GPU runs them in tools/gpu_check.py."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from lightvl.attention.ops import TorchOps

pytest.importorskip("triton")
NAME = "lightvl.kernels.triton_tower"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    sys.modules.pop(NAME, None)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.mark.parametrize("shape", [(1, 1), (7, 333), (3, 4096)])
def test_quick_gelu(kernels: ModuleType, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = 4 * torch.randn(shape)
    want = TorchOps().quick_gelu(x)
    kernels.quick_gelu_(x)
    torch.testing.assert_close(x, want)


@pytest.mark.parametrize(("num_heads", "dim"), [(16, 80), (5, 72), (1, 8), (70, 80)])
def test_rope(kernels: ModuleType, num_heads: int, dim: int) -> None:
    """Of q and k; v stays. Rows may lie further apart than their heads are long."""
    torch.manual_seed(0)
    ops, angles = TorchOps(), torch.rand(9, dim // 2) * 50
    heads = torch.randn(9, 3 * num_heads + 1, dim)[:, : 3 * num_heads]
    want = torch.cat(ops.rope(heads, num_heads, num_heads, ops.rope_table(angles.cos(), angles.sin())), 1)
    kernels.rope_(heads, 2 * num_heads, torch.cat((angles.cos(), angles.sin()), -1))
    torch.testing.assert_close(heads, want, atol=1e-6, rtol=1e-6)
