"""The kernels, compiled from the source with the flags of pyproject.toml, so that these tests do not depend on how
LightVL was installed."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from lightvl.kernels.cpu import CpuKernels, open_kernels

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "avx512_bf16" not in cpuinfo.read_text() or shutil.which("gcc") is None:
        pytest.skip("needs a CPU with AVX-512 BF16 and gcc")
    with open(ROOT / "pyproject.toml", "rb") as file:
        (extension,) = tomllib.load(file)["tool"]["setuptools"]["ext-modules"]
    target = tmp_path_factory.mktemp("kernels") / "library.so"
    flags = [*extension["extra-compile-args"], *extension["extra-link-args"], "-shared", "-fPIC", "-Wall", "-Werror"]
    sources = [str(ROOT / source) for source in extension["sources"]]
    subprocess.run(["gcc", *flags, *sources, "-o", str(target)], check=True)
    opened = open_kernels(target)
    assert opened is not None
    return opened
