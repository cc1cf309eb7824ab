"""The Triton kernels of `triton_tower.py`, where they can be had: Triton compiles them at their first call, which takes
a C compiler on the machine."""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


@functools.cache
def tower_kernels() -> ModuleType | None:
    """None where they do not work; torch's operations then take a fifth longer for an image."""
    if not torch.cuda.is_available():
        return None
    try:
        from lightvl.kernels import triton_tower

        x = torch.zeros(1, 1, 80, dtype=torch.bfloat16, device="cuda")
        triton_tower.quick_gelu_(x)
        triton_tower.rope_(x, 1, torch.zeros(1, 80, device="cuda"))
    except Exception as error:
        logger.warning("vision towers go without kernels of our own: Triton does not work here (%s)", error)
        return None
    return triton_tower
