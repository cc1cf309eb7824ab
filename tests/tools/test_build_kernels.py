"""tools/build_kernels.py with a compiler and a flashinfer that are stubs: which modules, by which settings, packed how;
and that everything LightVL calls of flashinfer is in the list."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from gpu import modules
from gpu.wheel import pack, wheel_version

from lightvl.attention import cuda, cuda_library

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/build_kernels.py"
SPEC = """
import json, os, pathlib

class Spec:
    def __init__(self, name):
        self.name = name
        folder = pathlib.Path(os.environ["FLASHINFER_WORKSPACE_BASE"]) / "cached_ops" / name
        self.jit_library_path = folder / f"{name}.so"

    def build(self, verbose):
        self.jit_library_path.parent.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if key.startswith(("FLASHINFER", "CUDA", "MAX_JOBS"))}
        self.jit_library_path.write_text(json.dumps(kept))
"""
STUB = {
    "tvm_ffi/__init__.py": "",
    "flashinfer/__init__.py": "",
    "flashinfer/spec.py": SPEC,
    "flashinfer/jit/__init__.py": "",
    "flashinfer/jit/activation.py": "from flashinfer.spec import Spec\n"
    "def gen_act_and_mul_module(name): return Spec(f'{name}_and_mul')\n",
    "flashinfer/jit/attention.py": "from flashinfer.spec import Spec\n"
    "def _name(*args): return '_'.join(str(arg).removeprefix('torch.') for arg in args)\n"
    "def gen_batch_prefill_module(*args): return Spec(_name('prefill', *args))\n"
    "def gen_batch_decode_module(*args): return Spec(_name('decode', *args))\n",
    **{
        f"flashinfer/jit/{name}.py": "from flashinfer.spec import Spec\n"
        f"def gen_{name}_module(): return Spec('{name}')\n"
        for name in ("page", "rope", "norm", "sampling", "cascade")
    },
    f"flashinfer_python-{modules.FLASHINFER}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: flashinfer-python\n"
    f"Version: {modules.FLASHINFER}\n",
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Folders `site` (flashinfer), `cuda` (a toolkit with an nvcc that tells its version) and `headers`."""
    for name, text in STUB.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    for name in ("cuda/lib64/libcudart.so", "headers/a/include/curand_kernel.h", "headers/b/include/cublasLt.h"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    return tmp_path


def run(machine: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(machine / "site"), "CUDA_HOME": str(machine / "cuda"), **environment}
    command = [sys.executable, str(TOOL), *args]
    return subprocess.run(command, env=variables, cwd=machine, capture_output=True, text=True, timeout=60)


def test_the_needed_kernels_are_built_with_the_facts_settings_and_packed(machine: Path) -> None:
    done = run(machine, "--arch", "9.0a", "--headers", str(machine / "headers"), FLASHINFER_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (machine / "dist").glob("flashinfer_jit_cache-0.6.12+lightvl.cu130.sm90a-py3-none-linux_*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        settings = json.loads(archive.read("flashinfer_jit_cache/jit_cache/sampling/sampling.so"))
    names = {name.split("/")[2] for name in libraries}
    shape = "bfloat16_bfloat16_bfloat16_int32_{0}_{0}_0_False_False"
    assert names == {"page", "rope", "norm", "silu_and_mul", "sampling"} | {
        f"{kind}{shape.format(dim)}{end}"
        for kind, end in (("prefill_fa2_", "_False"), ("decode_", ""))
        for dim in (64, 128)
    }
    assert "FLASHINFER_DISABLE_JIT" not in settings
    assert settings["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a" and settings["MAX_JOBS"] == "1"
    assert settings["CUDA_HOME"] == str(machine / "cuda")
    includes = settings["FLASHINFER_EXTRA_CUDAFLAGS"]
    assert includes.split() == [
        part for name in ("b", "a") for part in ("-isystem", str(machine / "headers" / name / "include"))
    ]
    links = machine / "build/kernels/lib"
    assert settings["FLASHINFER_EXTRA_LDFLAGS"] == f"-L{links} -s"
    assert (links / "libcudart.so").resolve() == machine / "cuda/lib64/libcudart.so"
    assert b"libcuda.so.1" in (links / "libcuda.so").read_bytes(), "the driver's name"


def test_a_few_modules_need_no_further_headers(machine: Path) -> None:
    done = run(machine, "--arch", "8.0", "--only", "page", "fa3_128", "--out", "wheels")
    assert done.returncode == 0, done.stderr
    (wheel,) = (machine / "wheels").glob("*cu130.sm80-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.endswith(".so") for name in names) == 2


@pytest.mark.parametrize(
    ("args", "environment", "told"),
    [
        (["--arch", "9.0a"], {"CUDA_HOME": "/nowhere"}, "there is no nvcc in /nowhere"),
        (["--arch", "9.0a"], {}, "cublasLt.h is neither in"),
        (["--arch", "9.0a", "--only", "page"], {"PYTHONPATH": ""}, "flashinfer is not installed"),
        (["--arch", "hopper"], {}, "'hopper' is not a compute capability"),
        ([], {}, "--arch is needed"),
    ],
)
def test_what_is_lacking_is_told_in_a_line(
    machine: Path, args: list[str], environment: dict[str, str], told: str
) -> None:
    done = run(machine, *args, **environment)
    assert done.returncode == 2 and told in done.stderr
    assert "Traceback" not in done.stderr and not (machine / "dist").exists()


def test_another_flashinfer_is_refused(machine: Path) -> None:
    metadata = next((machine / "site").glob("*.dist-info/METADATA"))
    metadata.write_text(metadata.read_text().replace(modules.FLASHINFER, "0.7.0"))
    done = run(machine, "--arch", "9.0a", "--only", "page")
    assert done.returncode == 2 and "flashinfer-python is 0.7.0" in done.stderr


def test_a_wheel_is_what_pip_and_flashinfer_want(tmp_path: Path) -> None:
    for name in ("page", "silu_and_mul"):
        (tmp_path / f"{name}.so").write_bytes(name.encode())
    wheel = pack(sorted(tmp_path.glob("*.so")), tmp_path / "out", arch="12.0f", cuda="13.0")
    assert wheel_version("12.0f", "13.0") == "0.6.12+lightvl.cu130.sm120f"
    assert wheel.read_bytes() == pack(tmp_path.glob("*.so"), tmp_path / "out", arch="12.0f", cuda="13.0").read_bytes()
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    record = next(name for name in files if name.endswith("/RECORD"))
    lines = dict(line.split(",", 1) for line in files[record].decode().splitlines())
    assert set(lines) == set(files)
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert lines[name] == ("," if name == record else f"sha256={digest},{len(data)}")
    # as pip installs it: `--no-deps --no-index` needs the network and the package index for nothing
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=120)
    code = "import flashinfer_jit_cache as c; print(c.__version__, c.get_jit_cache_dir())"
    told = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=True).stdout
    version, folder = told.split()
    assert version.startswith(modules.FLASHINFER)
    assert (Path(folder) / "page/page.so").read_bytes() == b"page"


SUBMODULES = {"norm", "page", "rope", "decode", "prefill", "sampling", "activation", "cascade"}


def called_of_flashinfer(source: str) -> set[str]:
    """Functions and classes of flashinfer's that a module names: imported from it, or an attribute of it or of what
    `cuda_library.flashinfer()` returns."""
    found: set[str] = set()
    aliases = {"flashinfer"}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashinfer":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {alias.asname or "" for alias in node.names if alias.name.split(".")[0] == "flashinfer"}
        elif isinstance(node, ast.Assign) and _is_library(node.value, set()):
            aliases |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if isinstance(owner, ast.Attribute) and owner.attr in SUBMODULES:
                owner = owner.value
            if _is_library(owner, aliases):
                found.add(node.attr)
    return {name for name in found - SUBMODULES if not name.startswith("__")}


def _is_library(node: ast.expr, aliases: set[str]) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "flashinfer"
    return isinstance(node, ast.Name) and node.id in aliases


def test_every_function_that_is_called_has_its_kernels_in_the_list() -> None:
    calls = "import flashinfer as f\nf.norm.rmsnorm(x)\nfrom flashinfer.page import g\nf.__version__.split()"
    assert called_of_flashinfer(calls) == {"rmsnorm", "g"}
    assert called_of_flashinfer("l = flashinfer()\nl.a\nflashinfer().decode.b(l.c)\nx.d") == {"a", "b", "c"}
    called = {
        (path.name, name)
        for path in sorted((ROOT / "lightvl").rglob("*.py"))
        for name in called_of_flashinfer(path.read_text())
    }
    assert len(called) >= 5
    needed = {module.name for module in modules.NEEDED}
    lacking = [call for call in called if not set(modules.modules_of(call[1])) & needed]
    assert lacking == [], "add them to tools/gpu/modules.py"


def test_versions_and_head_sizes_agree_with_the_backend() -> None:
    assert modules.FLASHINFER == cuda_library.FLASHINFER
    assert set(modules.HEAD_DIMS) <= set(cuda.HEAD_DIMS)
