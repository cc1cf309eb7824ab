"""Part 1: the machine has what LightVL needs, and flashinfer's compiled modules are found, or built, and load."""

from __future__ import annotations

import importlib.util
import os

import torch

from gpu.modules import FLASHINFER, NEEDED, KernelModule
from gpu.rows import Context, Row


def run(context: Context) -> None:
    context.check("torch sees the device", lambda row: _torch(context, row))
    context.check(f"flashinfer {FLASHINFER} is installed", lambda row: _flashinfer(context, row))
    for module in NEEDED:
        context.check(f"kernel {module.name}", lambda row, module=module: _load(context, module, row), seconds=3)


def _torch(context: Context, row: Row) -> None:
    row.note = f"torch {torch.__version__}"
    device = torch.device(context.device)
    if device.type == "cuda":
        row.note += f", CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}"
    x = torch.arange(1000, device=device)
    assert int(x.sum()) == 499500


def _flashinfer(context: Context, row: Row) -> None:
    if _absent(context, row):
        return
    from importlib.metadata import version

    row.note = f"{version('flashinfer-python')}, tvm-ffi {version('apache-tvm-ffi')}"
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        row.note += f", kernels {version('flashinfer-jit-cache')}"
    assert version("flashinfer-python") == FLASHINFER, row.note


def _load(context: Context, module: KernelModule, row: Row) -> None:
    """Found ahead where the package of tools/build_kernels.py is; else built here, which takes nvcc and minutes."""
    if _absent(context, row):
        return
    if context.is_dry:  # names only: compiled code is not loaded where no GPU is
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    spec = module.spec()
    row.note = "built ahead" if spec.is_aot else "to be built here"
    if not context.is_dry:
        spec.build_and_load()


def _absent(context: Context, row: Row) -> bool:
    if importlib.util.find_spec("flashinfer") is not None:
        return False
    if context.is_dry:
        row.verdict, row.note = "told", "flashinfer is not installed; a CPU does without"
        return True
    raise RuntimeError("flashinfer is not installed")
