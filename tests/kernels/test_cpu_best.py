"""The greatest logits by bounds: the same tokens as from all logits, whatever the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.kernels.cpu import CpuKernels


def check(kernels: CpuKernels, x: torch.Tensor, weight: torch.Tensor) -> float:
    """The share of logits that were not computed."""
    packed, coarse = kernels.pack(weight), kernels.coarsen(weight)
    assert packed is not None and coarse is not None
    full, got = kernels.linear(x, packed, None), kernels.best(x, packed, coarse)
    is_left_out = got == -torch.inf
    assert torch.equal(got[~is_left_out], full[~is_left_out])
    assert torch.equal(got.argmax(-1), full.argmax(-1))
    is_greatest = full == full.amax(-1, keepdim=True)
    assert torch.equal(got[is_greatest], full[is_greatest])
    return is_left_out.float().mean().item()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8])
def test_few_logits_are_computed(kernels: CpuKernels, num_rows: int) -> None:
    left_out = check(kernels, normal(num_rows, 1536, seed=1), normal(20_000, 1536) * 0.02)
    assert left_out > 0.95


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 8),
    num_out=st.integers(1, 400),
    num_in=st.sampled_from([128, 256, 640]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]),
    twins=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(
    kernels: CpuKernels, num_rows: int, num_out: int, num_in: int, scale: float, twins: bool, seed: int
) -> None:
    weight = normal(num_out, num_in, seed=seed) * scale
    if twins:  # ties: the first of equal logits is the one
        weight = torch.cat((weight, weight))
    check(kernels, normal(num_rows, num_in, seed=seed + 1), weight)


def test_logits_that_are_equal_only_when_rounded(kernels: CpuKernels) -> None:
    base = normal(1, 512, seed=3)
    weight = (base + normal(600, 512, seed=4) * 2**-9).to(torch.bfloat16)
    full = (base.float() @ weight.float().T)[0]
    assert (full.bfloat16() == full.bfloat16().max()).sum() > (full == full.max()).sum()
    check(kernels, base, weight)


def test_rounding_that_goes_one_way_in_all_of_a_row(kernels: CpuKernels) -> None:
    """The worst case of the bound: in 7 bits the first row is nearly zero, and it has the greatest logit."""
    signs = normal(1, 1024, seed=6).sign()
    weight = torch.zeros(2, 1024).bfloat16()
    weight[0] = 0.49 * signs[0]
    weight[1, :450] = signs[0, :450]
    weight[:, -1] = 63 * signs[0, -1]  # from which the steps of the row follow
    full = (signs.float() @ weight.float().T)[0]
    assert full[0] > full[1] > 63
    check(kernels, signs, weight)


def test_equal_logits_without_any_rounding_of_weights(kernels: CpuKernels) -> None:
    """Nothing but the tie itself lets the first of these be found: their bounds differ by what bfloat16 rounds away."""
    weight = torch.full((5, 256), 63.0).bfloat16()
    weight[0, 0] = 62
    x = torch.ones(1, 256).bfloat16()
    assert (x.float() @ weight.float().T)[0].bfloat16().unique().numel() == 1
    check(kernels, x, weight)


def test_rows_of_very_different_size_and_zeros(kernels: CpuKernels) -> None:
    weight = normal(300, 256) * torch.logspace(-3, 3, 300)[:, None].bfloat16()
    weight[7] = 0
    check(kernels, normal(2, 256, seed=9), weight)
    check(kernels, torch.zeros(1, 256).bfloat16(), weight)
    check(kernels, -normal(1, 256).abs() * 1e-3, normal(300, 256).abs())  # all logits are negative


def test_what_is_not_finite_is_computed(kernels: CpuKernels) -> None:
    weight, x = normal(90, 128), normal(3, 128, seed=2)
    packed, coarse = kernels.pack(weight), kernels.coarsen(weight)
    assert packed is not None and coarse is not None
    x[1, 5], x[2, 6] = torch.nan, torch.inf
    got, full = kernels.best(x, packed, coarse), kernels.linear(x, packed, None)
    assert got[1].isnan().all() and torch.equal(got[2], full[2]) and got[0].argmax() == full[0].argmax()


def test_a_weight_that_is_not_finite_breaks_only_its_logit(kernels: CpuKernels) -> None:
    weight, x = normal(300, 1024), normal(1, 1024, seed=2)
    weight[4, 9] = torch.nan
    packed, coarse = kernels.pack(weight), kernels.coarsen(weight)
    assert packed is not None and coarse is not None
    got, full = kernels.best(x, packed, coarse)[0], kernels.linear(x, packed, None)[0]
    assert got[4].isnan() and got.nan_to_num(-torch.inf).argmax() == full.nan_to_num(-torch.inf).argmax()
