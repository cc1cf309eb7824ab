"""Products of few rows with bfloat16 weights on a CPU: the binding of cpu_linear.c, which `linear.Linear` calls.

The library is compiled when LightVL is installed, where there is a C compiler (see pyproject.toml); without it, or on a
CPU without AVX-512 BF16, the caller has oneDNN, which reads weights at half to two thirds of the speed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

MAX_ROWS = 128
"""Rows of x up to which this is the fastest way; oneDNN's blocking wins beyond (tools/LOG.md)."""

FewRowsLinear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@functools.cache
def few_rows_linear() -> FewRowsLinear | None:
    """The product with the library that was installed, if it is there and runs on this CPU."""
    spec = importlib.util.find_spec("lightvl.models._cpu_linear")
    return None if spec is None or spec.origin is None else open_library(Path(spec.origin))


def open_library(path: Path) -> FewRowsLinear | None:
    """`linear(x, weight, bias)`: x (..., k), weight (n, k), bias (n,) or None, all bfloat16, weight and bias dense;
    returns (..., n). None where the library or the CPU does not allow it. torch must be loaded first: its OpenMP
    threads are used."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    if not library.lightvl_linear_supported():
        return None
    multiply = library.lightvl_linear
    multiply.restype = None
    multiply.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 3 + [ctypes.c_int]

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        num_out, num_in = weight.shape
        assert x.shape[-1] == num_in and x.dtype == weight.dtype == torch.bfloat16 and weight.is_contiguous()
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], num_out)
        bias_ptr = None if bias is None else bias.data_ptr()
        num_rows = x.numel() // num_in
        threads = torch.get_num_threads()
        multiply(weight.data_ptr(), x.data_ptr(), bias_ptr, out.data_ptr(), num_rows, num_in, num_out, threads)
        return out

    return linear
