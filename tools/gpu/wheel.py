"""Built kernels to a wheel that flashinfer finds: a package `flashinfer_jit_cache` with `jit_cache/<name>/<name>.so`,
a version that starts with flashinfer's own, and `get_jit_cache_dir()`. The same files give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import platform
import zipfile
from collections.abc import Iterable
from pathlib import Path

from gpu.modules import FLASHINFER

PACKAGE = "flashinfer_jit_cache"
INIT = '''"""Precompiled flashinfer modules ({what}), found by flashinfer.jit.env."""

import pathlib

__version__ = "{version}"


def get_jit_cache_dir() -> str:
    return str(pathlib.Path(__file__).parent / "jit_cache")
'''


def wheel_version(arch: str, cuda: str) -> str:
    """("9.0a", "13.0") to "0.6.12+lightvl.cu130.sm90a"."""
    return f"{FLASHINFER}+lightvl.cu{cuda.replace('.', '')}.sm{arch.replace('.', '')}"


def pack(libraries: Iterable[Path], folder: Path, *, arch: str, cuda: str) -> Path:
    """Writes the wheel to `folder` and returns its path. Each library's file name is its module's, as flashinfer
    names it."""
    version = wheel_version(arch, cuda)
    tag = f"py3-none-linux_{platform.machine()}"
    info = f"{PACKAGE}-{version}.dist-info"
    init = INIT.format(what=f"sm_{arch.replace('.', '')}, CUDA {cuda}", version=version)
    files = {f"{PACKAGE}/__init__.py": init.encode()}
    for library in sorted(libraries):
        files[f"{PACKAGE}/jit_cache/{library.stem}/{library.name}"] = library.read_bytes()
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: flashinfer-jit-cache\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: LightVL\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{PACKAGE}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
