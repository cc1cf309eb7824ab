"""The decoder's elementwise operations: as torch's, rounding included, and in place only where it is said."""

from __future__ import annotations

import pytest
import torch

from lightvl.attention.ops import CpuKernelOps, TorchOps
from lightvl.kernels.cpu import CpuKernels

SIZES = [(1, 16), (3, 40), (2, 100), (5, 1536), (70, 896)]


def assert_nearly_equal(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """In bfloat16's steps: almost all equal, a rounding the other way now and then (float32 sums differ in order)."""
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted.float(), rtol=2**-6, atol=1e-37)
    assert (got != wanted).float().mean() < 0.01


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_rms_norm(kernels: CpuKernels, rows: int, size: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, size).bfloat16(), torch.randn(size).bfloat16()
    assert_nearly_equal(CpuKernelOps(kernels).rms_norm(x, weight, 1e-6), TorchOps().rms_norm(x, weight, 1e-6))
    heads = torch.randn(rows, 3, size).bfloat16()
    part = heads[:, :2]  # not dense
    assert_nearly_equal(CpuKernelOps(kernels).rms_norm(part, weight, 1e-5), TorchOps().rms_norm(part, weight, 1e-5))


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_add_rms_norm(kernels: CpuKernels, rows: int, size: int) -> None:
    torch.manual_seed(rows)
    x, branch, weight = (torch.randn(*shape).bfloat16() for shape in ((rows, size), (rows, size), (size,)))
    wanted, wanted_x = TorchOps().add_rms_norm(branch.clone(), x.clone(), weight, 1e-6)
    got, got_x = CpuKernelOps(kernels).add_rms_norm(branch, x, weight, 1e-6)
    assert torch.equal(got_x, wanted_x)
    assert_nearly_equal(got, wanted)


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_silu_and_mul(kernels: CpuKernels, rows: int, size: int) -> None:
    torch.manual_seed(rows)
    gate_up = (torch.randn(rows, 2 * size) * 20).bfloat16()
    assert_nearly_equal(CpuKernelOps(kernels).silu_and_mul(gate_up), TorchOps().silu_and_mul(gate_up))


def test_silu_at_the_ends(kernels: CpuKernels) -> None:
    gate = torch.tensor([0.0, -0.0, 200.0, -200.0, 3e38, -3e38, torch.nan, torch.inf]).bfloat16()
    got = CpuKernelOps(kernels).silu_and_mul(torch.cat((gate, torch.ones(8).bfloat16()))[None])[0]
    assert got[:6].tolist() == [0.0, 0.0, 200.0, 0.0, pytest.approx(3e38, rel=0.01), 0.0]
    assert got[6].isnan() and got[7] == torch.inf


@pytest.mark.parametrize(("rows", "size"), SIZES)
def test_quick_gelu(kernels: CpuKernels, rows: int, size: int) -> None:
    torch.manual_seed(rows)
    x = (torch.randn(rows, size) * 4).bfloat16()
    wanted = (x.float() * (1.702 * x.float()).sigmoid()).bfloat16()
    got = kernels.quick_gelu_(x)
    assert got is x
    assert_nearly_equal(got, wanted)


@pytest.mark.parametrize(("rows", "size"), [*SIZES, (2, 1), (3, 17), (40, 3996)])
def test_softmax(kernels: CpuKernels, rows: int, size: int) -> None:
    torch.manual_seed(size)
    scores = (torch.randn(rows, size) * 10).bfloat16()
    scores[0, size // 2 :] -= torch.inf if size > 1 else 0.0
    wanted = scores.softmax(-1)
    got = kernels.softmax_(scores)
    assert got is scores
    assert_nearly_equal(got, wanted)
    assert got[wanted == 0].eq(0).all()


def test_softmax_of_a_row_that_is_not_a_number(kernels: CpuKernels) -> None:
    scores = torch.zeros(3, 40).bfloat16()
    scores[1, 7] = torch.nan
    assert kernels.softmax_(scores).isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(("rows", "dim"), [(1, 64), (7, 128), (3, 80), (300, 32)])
def test_rope(kernels: CpuKernels, rows: int, dim: int) -> None:
    torch.manual_seed(dim)
    heads = torch.randn(rows, 9, dim).bfloat16()
    angles = torch.rand(rows, dim // 2) * 5000
    ours, torchs = CpuKernelOps(kernels), TorchOps()
    wanted = torchs.rope(heads.clone(), 5, 2, torchs.rope_table(angles.cos(), angles.sin()))
    got = ours.rope(heads.clone(), 5, 2, ours.rope_table(angles.cos(), angles.sin()))
    for ours_part, wanted_part in zip(got, wanted, strict=True):
        assert_nearly_equal(ours_part, wanted_part)
    assert torch.equal(got[2], heads[:, 7:])
