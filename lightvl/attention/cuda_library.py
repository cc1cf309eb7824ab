"""flashinfer, imported when a model is first built for a GPU and never on a CPU (it takes seconds and needs much).

Used by the `cuda_*` modules beside it; knows what they need of it: the version whose signatures they were read against.
"""

from __future__ import annotations

import functools
import os
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
