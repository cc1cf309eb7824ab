"""The product of few rows: against float64, for every tile of the kernel, and who uses it when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.kernels.cpu import MAX_LINEAR_ROWS, CpuKernels, PackedMatrix, cpu_kernels, open_kernels
from lightvl.models import linear as linear_module
from lightvl.models.linear import Linear


def check(kernels: CpuKernels, rows: int, num_in: int, num_out: int, *, bias: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    x, weight, offset = draw(rows, num_in), draw(num_out, num_in), draw(num_out) if bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    out = kernels.linear(x, weight, offset)
    assert out.shape == wanted.shape and out.dtype == torch.bfloat16
    # half a unit in the last of 8 bits, and what float32 loses in the sum
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-5 * num_in)


@pytest.mark.parametrize("rows", [*range(1, 18), 64, MAX_LINEAR_ROWS])
def test_every_number_of_rows(kernels: CpuKernels, rows: int) -> None:
    check(kernels, rows, 96, 101, bias=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.integers(1, 400), st.booleans(), st.integers(0, 1 << 20))
def test_every_shape(kernels: CpuKernels, rows: int, num_in: int, num_out: int, bias: bool, seed: int) -> None:
    check(kernels, rows, num_in, num_out, bias=bias, seed=seed)


def test_leading_dimensions_and_strides(kernels: CpuKernels) -> None:
    x, weight = torch.randn(3, 4, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    torch.testing.assert_close(
        kernels.linear(x.transpose(0, 1), weight, None), kernels.linear(x, weight, None).transpose(0, 1)
    )


def test_does_not_read_or_write_beyond(kernels: CpuKernels) -> None:
    """What lies behind the operands is NaN, and what lies behind the result stays."""
    weight = torch.full((9, 40), torch.nan, dtype=torch.bfloat16)
    x = torch.full((3, 40), torch.nan, dtype=torch.bfloat16)
    weight[:7], x[:2] = 1.0, 2.0
    assert kernels.linear(x[:2], weight[:7], None).eq(80).all()


def test_not_a_number_stays_in_its_row(kernels: CpuKernels) -> None:
    x, weight = torch.ones(5, 64).bfloat16(), torch.ones(12, 64).bfloat16()
    x[3, 5] = torch.nan
    assert kernels.linear(x, weight, None).isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("threads", [1, 3])
def test_bit_equal_with_any_company_and_threads(kernels: CpuKernels, threads: int) -> None:
    """A row's result depends neither on the other rows nor on who computed it."""
    x, weight = torch.randn(11, 200).bfloat16(), torch.randn(333, 200).bfloat16()
    alone = torch.cat([kernels.linear(row[None], weight, None) for row in x])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernels.linear(x, weight, None), alone)
    finally:
        torch.set_num_threads(before)


class Counted:
    """The kernels, with a note of how many rows were multiplied by them."""

    def __init__(self, kernels: CpuKernels) -> None:
        self.pack, self.unpack_slab, self._kernels = kernels.pack, kernels.unpack_slab, kernels
        self.calls: list[int] = []

    def linear(self, x: torch.Tensor, weight: torch.Tensor | PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        self.calls.append(len(x))
        return self._kernels.linear(x, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_in", [64, 256])  # not packed, packed
@pytest.mark.parametrize("few_rows", [True, False])
def test_linear_chooses(
    kernels: CpuKernels, few_rows: bool, num_in: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(kernels)
    monkeypatch.setattr(linear_module, "cpu_kernels", lambda: counted)
    monkeypatch.setattr(linear_module, "SLAB_SIZE", 1)  # several slabs
    weight, offset = torch.randn(400, num_in).bfloat16(), torch.randn(400).bfloat16()
    cpu = torch.device("cpu")
    linear = Linear(num_in, {"a": 400}, bias=bias, dtype=torch.bfloat16, device=cpu, few_rows=few_rows)
    linear.weight_targets()["a.weight"].fill(weight)
    if bias:
        linear.weight_targets()["a.bias"].fill(offset)
    for rows in (1, MAX_LINEAR_ROWS, MAX_LINEAR_ROWS + 1):
        x = torch.randn(rows, num_in).bfloat16()
        wanted = torch.nn.functional.linear(x.float(), weight.float(), offset.float() if bias else None)
        torch.testing.assert_close(linear.forward(x).float(), wanted, rtol=2**-7, atol=1e-3)
        torch.testing.assert_close(linear.forward(x[:, None])[:, 0].float(), wanted, rtol=2**-7, atol=1e-3)
    assert counted.calls == ([1, 1, MAX_LINEAR_ROWS, MAX_LINEAR_ROWS] if few_rows else [])


def test_other_dtypes_do_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "cpu_kernels", lambda: pytest.fail("asked"))
    Linear(64, {"a": 24}, bias=False, dtype=torch.float32, device=torch.device("cpu"), few_rows=True)


def test_installed_library_if_any_is_current(kernels: CpuKernels) -> None:
    installed = cpu_kernels()
    if installed is None:
        pytest.skip("LightVL was installed without a C compiler, or is run from its folder without being installed")
    x, weight = torch.randn(3, 70).bfloat16(), torch.randn(50, 70).bfloat16()
    assert torch.equal(installed.linear(x, weight, None), kernels.linear(x, weight, None))


def test_no_library(tmp_path: Path) -> None:
    assert open_kernels(tmp_path / "missing.so") is None
