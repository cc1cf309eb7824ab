"""Matrices in 12 bits a weight: every bit comes back, and products are those of the plain matrix, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.kernels import cpu as cpu_module
from lightvl.kernels.cpu import MAX_ESCAPED, MAX_LINEAR_ROWS, PACKED_UNIT, CpuKernels, PackedMatrix
from lightvl.models.linear import Linear

SPECIAL = torch.tensor([0x0000, 0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x7F7F, 0x3F80])
"""Bits of zeros, denormals, infinities, quiet and signalling NaNs, the largest number and one."""


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16)


def from_bits(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.int16).view(torch.bfloat16)


def packed(kernels: CpuKernels, weight: torch.Tensor) -> PackedMatrix:
    matrix = kernels.pack(weight)
    assert matrix is not None and matrix.shape == tuple(weight.shape)
    return matrix


def draw_weight(num_out: int, units: int, num_rare: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of different scale, with `num_rare` weights of any bits at all in each."""
    weight = torch.randn(num_out, units * PACKED_UNIT, generator=generator)
    weight = (weight * 2.0 ** torch.randint(-140, 100, (num_out, 1), generator=generator)).bfloat16()
    for row in weight:
        where = torch.randint(0, len(row), (num_rare,), generator=generator)
        row[where] = from_bits(torch.randint(0, 1 << 16, (num_rare,), generator=generator))
    return weight


@pytest.fixture
def any_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack whatever share of the weights is rare."""
    monkeypatch.setattr(cpu_module, "MAX_ESCAPED", 1.0)


@pytest.mark.usefixtures("any_share")
def test_every_bit_pattern_comes_back(kernels: CpuKernels) -> None:
    """All 65,536, each of them rare: in order, in any order, and beside a common one."""
    every = torch.arange(1 << 16)
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    beside = torch.stack((shuffled, torch.full_like(every, 0x3C12)), 1)
    for weight in (from_bits(values).view(-1, 1024) for values in (every, shuffled, beside)):
        matrix = packed(kernels, weight)
        assert torch.equal(bits(kernels.unpack_rows(matrix, torch.arange(len(weight)))), bits(weight))


@settings(max_examples=60, deadline=None)
@given(num_out=st.integers(1, 50), units=st.integers(1, 6), num_rare=st.integers(0, 40), seed=st.integers(0, 1 << 20))
def test_rows_come_back_in_any_order(kernels: CpuKernels, num_out: int, units: int, num_rare: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = draw_weight(num_out, units, num_rare, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_module, "MAX_ESCAPED", 1.0)
        matrix = packed(kernels, weight)
    rows = torch.randint(0, num_out, (2 * num_out,), generator=generator)
    assert torch.equal(bits(kernels.unpack_rows(matrix, rows)), bits(weight[rows]))
    for first in range(0, num_out, 3):
        for end in (first + 1, (first + num_out + 1) // 2, num_out):
            slab = torch.empty_like(weight[first:end])
            kernels.unpack_slab(matrix, first, slab)
            assert torch.equal(bits(slab), bits(weight[first:end]))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 20),
    num_out=st.integers(1, 250),
    units=st.integers(1, 6),
    num_rare=st.integers(0, 10),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_products_are_those_of_the_plain_matrix(
    kernels: CpuKernels, rows: int, num_out: int, units: int, num_rare: int, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = draw_weight(num_out, units, num_rare, generator)
    x = torch.randn(rows, weight.shape[1], generator=generator).bfloat16()
    offset = torch.randn(num_out, generator=generator).bfloat16() if bias else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_module, "MAX_ESCAPED", 1.0)
        matrix = packed(kernels, weight)
    assert torch.equal(bits(kernels.linear(x, matrix, offset)), bits(kernels.linear(x, weight, offset)))


@pytest.mark.parametrize("rows", [*range(1, 18), MAX_LINEAR_ROWS])
def test_every_number_of_rows(kernels: CpuKernels, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(n, 512, generator=generator).bfloat16() for n in (rows, 101))
    assert torch.equal(kernels.linear(x, packed(kernels, weight), None), kernels.linear(x, weight, None))


def test_long_rows(kernels: CpuKernels) -> None:
    """Longer than what is fetched ahead."""
    x, weight = torch.randn(3, 8960).bfloat16(), torch.randn(7, 8960).bfloat16()
    assert torch.equal(kernels.linear(x, packed(kernels, weight), None), kernels.linear(x, weight, None))


@pytest.mark.usefixtures("any_share")
def test_special_values(kernels: CpuKernels) -> None:
    common = torch.randn(6, 256).bfloat16()
    common[:, ::5] = from_bits(SPECIAL).repeat(5)[: len(common[0, ::5])]
    common[4], common[5] = 0.0, -0.0  # all equal
    matrix = packed(kernels, common)
    assert torch.equal(bits(kernels.unpack_rows(matrix, torch.arange(6))), bits(common))
    x = torch.randn(2, 256).bfloat16()
    assert torch.equal(bits(kernels.linear(x, matrix, None)), bits(kernels.linear(x, common, None)))


def test_small_and_large_share_of_rare_weights(kernels: CpuKernels) -> None:
    """15 high bytes are in the table, more are rare; only so many rare ones are worth it."""
    weight = torch.ones(4, 1024, dtype=torch.bfloat16)
    most = int(weight.numel() * MAX_ESCAPED)
    exponents = torch.arange(15 + most)
    rare = weight.clone()
    rare[0, : 14 + most] = from_bits(exponents[: 14 + most] << 8)  # 1.0 and 14 of these are in the table
    assert kernels.pack(rare) is not None
    rare[0, 14 + most] = from_bits(exponents[14 + most] << 8)
    assert kernels.pack(rare) is None


@pytest.mark.parametrize("shape", [(8, 64), (8, 129), (8, 200), (0, 128), (8, 0)])
def test_shapes_that_stay_plain(kernels: CpuKernels, shape: tuple[int, int]) -> None:
    assert kernels.pack(torch.ones(shape, dtype=torch.bfloat16)) is None


def test_three_quarters_of_the_memory(kernels: CpuKernels) -> None:
    weight = torch.randn(96, 1536).bfloat16()
    matrix = packed(kernels, weight)
    assert sum(tensor.nbytes for tensor in matrix.tensors) < 0.77 * weight.nbytes


@pytest.mark.parametrize("threads", [1, 3])
def test_bit_equal_with_any_company_and_threads(kernels: CpuKernels, threads: int) -> None:
    """A row's result depends neither on the other rows nor on who computed it; nor does packing on threads."""
    x, weight = torch.randn(11, 256).bfloat16(), torch.randn(333, 256).bfloat16()
    matrix = packed(kernels, weight)
    alone = torch.cat([kernels.linear(row[None], matrix, None) for row in x])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for same in (matrix, packed(kernels, weight)):
            assert torch.equal(kernels.linear(x, same, None), alone)
        assert torch.equal(kernels.unpack_rows(matrix, torch.arange(333)), weight)
    finally:
        torch.set_num_threads(before)


def test_a_linear_gives_its_rows_back(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightvl.models.linear.cpu_kernels", lambda: kernels)
    options = {"bias": False, "dtype": torch.bfloat16, "device": torch.device("cpu"), "few_rows": True}
    weight, idx = torch.randn(40, 256).bfloat16(), torch.tensor([39, 0, 7, 7])
    linear = Linear(256, {"a": 40}, **options)
    assert linear.use_weight(weight)
    assert torch.equal(linear.rows(idx), weight[idx])
    assert not Linear(64, {"a": 40}, **options).use_weight(weight[:, :64].contiguous())
