"""flashinfer, imported when a model is first built for a GPU and never on a CPU (it takes seconds and needs much).

Used by the `cuda_*` modules beside it; knows what they need of it: the version whose signatures they were read against.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

from lightvl.errors import ConfigError

FLASHINFER = "0.6.12"
"""Exactly: `plan` has other parameters from 0.6.18 on, and what is read of the wrappers' state may move in any."""


@functools.cache
def flashinfer() -> ModuleType:
    """Raises ConfigError when it is missing or another version."""
    # without this its norms ask for a compiler of kernels (cutlass-dsl) that nothing else here needs
    os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    try:
        import flashinfer as library
    except ImportError as error:
        raise ConfigError(f"serving on CUDA needs flashinfer ({error}); pip install 'lightvl[cuda]'") from error
    if library.__version__.split("+")[0] != FLASHINFER:
        raise ConfigError(
            f"serving on CUDA needs flashinfer {FLASHINFER}, not {library.__version__}; pip install 'lightvl[cuda]'"
        )
    module: ModuleType = library
    return module


def require_kernels() -> None:
    """Raises ConfigError where flashinfer's kernels are neither compiled ahead nor can be compiled here, which it would
    try when the first step runs."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    has_compiler = shutil.which("nvcc") is not None or Path(home, "bin", "nvcc").is_file()
    if not has_compiler and importlib.util.find_spec("flashinfer_jit_cache") is None:
        raise ConfigError(
            "serving on CUDA needs flashinfer's kernels, compiled ahead (by tools/build_kernels.py, or as the package "
            f"flashinfer-jit-cache {FLASHINFER}) or by nvcc of a CUDA toolkit (CUDA_HOME); there is neither"
        )
