"""The product of few rows: against float64, for every tile of the kernel, and who uses it when.

The library is compiled here from the source and with the flags of pyproject.toml, so that these tests do not depend on
how LightVL was installed.
"""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.models import linear as linear_module
from lightvl.models.cpu_linear import MAX_ROWS, FewRowsLinear, few_rows_linear, open_library
from lightvl.models.linear import Linear

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> FewRowsLinear:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags or shutil.which("gcc") is None:
        pytest.skip("needs a CPU with AVX-512 BF16 and gcc")
    with open(ROOT / "pyproject.toml", "rb") as file:
        (extension,) = tomllib.load(file)["tool"]["setuptools"]["ext-modules"]
    target = tmp_path_factory.mktemp("kernel") / "library.so"
    flags = [*extension["extra-compile-args"], *extension["extra-link-args"], "-shared", "-fPIC", "-Wall", "-Werror"]
    sources = [str(ROOT / source) for source in extension["sources"]]
    subprocess.run(["gcc", *flags, *sources, "-o", str(target)], check=True)
    opened = open_library(target)
    assert opened is not None
    return opened


def check(kernel: FewRowsLinear, rows: int, num_in: int, num_out: int, *, bias: bool, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    x, weight, offset = draw(rows, num_in), draw(num_out, num_in), draw(num_out) if bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    out = kernel(x, weight, offset)
    assert out.shape == wanted.shape and out.dtype == torch.bfloat16
    # half a unit in the last of 8 bits, and what float32 loses in the sum
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-5 * num_in)


@pytest.mark.parametrize("rows", [*range(1, 18), 64, MAX_ROWS])
def test_every_number_of_rows(kernel: FewRowsLinear, rows: int) -> None:
    check(kernel, rows, 96, 101, bias=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.integers(1, 400), st.booleans(), st.integers(0, 1 << 20))
def test_every_shape(kernel: FewRowsLinear, rows: int, num_in: int, num_out: int, bias: bool, seed: int) -> None:
    check(kernel, rows, num_in, num_out, bias=bias, seed=seed)


def test_leading_dimensions_and_strides(kernel: FewRowsLinear) -> None:
    x, weight = torch.randn(3, 4, 64).bfloat16(), torch.randn(8, 64).bfloat16()
    torch.testing.assert_close(kernel(x.transpose(0, 1), weight, None), kernel(x, weight, None).transpose(0, 1))


def test_does_not_read_or_write_beyond(kernel: FewRowsLinear) -> None:
    """What lies behind the operands is NaN, and what lies behind the result stays."""
    weight = torch.full((9, 40), torch.nan, dtype=torch.bfloat16)
    x = torch.full((3, 40), torch.nan, dtype=torch.bfloat16)
    weight[:7], x[:2] = 1.0, 2.0
    assert kernel(x[:2], weight[:7], None).eq(80).all()


def test_not_a_number_stays_in_its_row(kernel: FewRowsLinear) -> None:
    x, weight = torch.ones(5, 64).bfloat16(), torch.ones(12, 64).bfloat16()
    x[3, 5] = torch.nan
    assert kernel(x, weight, None).isnan().any(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("threads", [1, 3])
def test_bit_equal_with_any_company_and_threads(kernel: FewRowsLinear, threads: int) -> None:
    """A row's result depends neither on the other rows nor on who computed it."""
    x, weight = torch.randn(11, 200).bfloat16(), torch.randn(333, 200).bfloat16()
    alone = torch.cat([kernel(row[None], weight, None) for row in x])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(kernel(x, weight, None), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("few_rows", [True, False])
def test_linear_chooses(kernel: FewRowsLinear, few_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(len(x))
        return kernel(x, weight, bias)

    monkeypatch.setattr(linear_module, "few_rows_linear", lambda: counted)
    weight = torch.randn(24, 64).bfloat16()
    linear = Linear(64, {"a": 24}, bias=False, dtype=torch.bfloat16, device=torch.device("cpu"), few_rows=few_rows)
    linear.weight_targets()["a.weight"].fill(weight)
    for rows in (1, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(rows, 64).bfloat16()
        wanted = torch.nn.functional.linear(x.float(), weight.float())
        torch.testing.assert_close(linear.forward(x).float(), wanted, rtol=2**-7, atol=1e-3)
    assert calls == ([1, MAX_ROWS] if few_rows else [])


def test_other_dtypes_do_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "few_rows_linear", lambda: pytest.fail("asked"))
    Linear(64, {"a": 24}, bias=False, dtype=torch.float32, device=torch.device("cpu"), few_rows=True)


def test_installed_library_if_any_is_current(kernel: FewRowsLinear) -> None:
    installed = few_rows_linear()
    if installed is None:
        pytest.skip("LightVL was installed without a C compiler, or is run from its folder without being installed")
    x, weight = torch.randn(3, 70).bfloat16(), torch.randn(50, 70).bfloat16()
    assert torch.equal(installed(x, weight, None), kernel(x, weight, None))


def test_no_library(tmp_path: Path) -> None:
    assert open_library(tmp_path / "missing.so") is None
