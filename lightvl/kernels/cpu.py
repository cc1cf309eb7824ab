"""The binding of the C files beside it: checks arguments, allocates results, calls with the GIL released.

The library is compiled when LightVL is installed, where there is a C compiler (see pyproject.toml). Without it, or on a
CPU without AVX-512 BF16, `cpu_kernels()` is None and the callers use torch, which is slower: oneDNN reads a decoder's
weights at half to two thirds of the memory's speed, and each small operation of a layer is a call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import math
import mmap
from pathlib import Path
from typing import Any

import torch

MAX_LINEAR_ROWS = 128
"""Rows of x up to which `linear` is the fastest way; oneDNN's blocking wins beyond (tools/LOG.md)."""

PACKED_UNIT, PACKED_UNIT_BYTES, PACKED_GROUP, PACKED_TABLE = 128, 192, 3, 16
"""UNIT, UNIT_BYTES, GROUP and TABLE of cpu_packed.h."""
COARSE_STEP = 64
"""STEP of cpu_best.c."""
MAX_BEST_ROWS = 8
"""MAX_X of cpu_tile.h."""
MAX_ESCAPED = 1 / 512
"""Of a packed matrix' weights: with more, a plain one is multiplied as fast. Normally distributed ones have one in
ten thousand at most."""


class AttentionStruct(ctypes.Structure):
    """`Attention` of cpu_team.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "new_keys", "new_values", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("pages", "kv_lens", "partial", "out")),
        *((name, ctypes.c_long) for name in ("rows", "q_stride", "new_stride", "pages_stride")),
        *((name, ctypes.c_long) for name in ("heads", "kv_heads", "dim")),
        *((name, ctypes.c_long) for name in ("num_pages", "page_len")),
        ("scale", ctypes.c_float),
    )


class _Packed(ctypes.Structure):
    """`Packed` of cpu_packed.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("units", "tables", "escaped", "starts")),
        *((name, ctypes.c_long) for name in ("num_out", "num_in")),
    )


class _Coarse(ctypes.Structure):
    """`Coarse` of cpu_best.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("steps", "scales", "errors"))


_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "lightvl_supported": ([], _INT),
    "lightvl_linear": ([_POINTER] * 4 + [_LONG] * 3 + [_INT], None),
    "lightvl_packed_linear": ([ctypes.POINTER(_Packed)] + [_POINTER] * 3 + [_LONG, _INT], None),
    "lightvl_choose_tables": ([_POINTER] * 3 + [_LONG] * 2 + [_INT], None),
    "lightvl_pack": ([_POINTER] * 5 + [_LONG] * 2 + [_INT], None),
    "lightvl_unpack_rows": ([ctypes.POINTER(_Packed)] + [_POINTER] * 2 + [_LONG, _INT], None),
    "lightvl_unpack_slab": ([ctypes.POINTER(_Packed), _LONG, _POINTER, _LONG, _INT], None),
    "lightvl_coarsen": ([_POINTER, ctypes.POINTER(_Coarse)] + [_LONG] * 2 + [_INT], None),
    "lightvl_best": ([ctypes.POINTER(_Packed), ctypes.POINTER(_Coarse)] + [_POINTER] * 3 + [_LONG, _INT], None),
    "lightvl_attention_scratch": ([_POINTER, _LONG, _LONG, _LONG], _LONG),
    "lightvl_decode_attention": ([ctypes.POINTER(AttentionStruct), _INT], None),
    "lightvl_decode_layers": ([_POINTER, _LONG, _POINTER, _INT], None),
    "lightvl_rms_norm": ([_POINTER] * 4 + [_LONG] * 2 + [_FLOAT, _INT], None),
    "lightvl_silu_and_mul": ([_POINTER] * 2 + [_LONG] * 2 + [_INT], None),
    "lightvl_quick_gelu": ([_POINTER, _LONG, _INT], None),
    "lightvl_softmax": ([_POINTER] + [_LONG] * 2 + [_INT], None),
    "lightvl_rope": ([_POINTER] * 3 + [_LONG] * 4 + [_INT], None),
}


@functools.cache
def cpu_kernels() -> CpuKernels | None:
    """Those that were installed, if they are there and this CPU runs them."""
    spec = importlib.util.find_spec("lightvl.kernels._cpu")
    return None if spec is None or spec.origin is None else open_kernels(Path(spec.origin))


def open_kernels(path: Path) -> CpuKernels | None:
    """None where the library or the CPU does not allow it, or the library is that of an older version. torch is loaded
    by now: its OpenMP threads are used."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (argtypes, restype) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = argtypes, restype
    except (OSError, AttributeError):
        return None
    return CpuKernels(library) if library.lightvl_supported() else None


class PackedMatrix:
    """An (n, k) matrix in 12 bits a weight, exactly; made by `CpuKernels.pack`, laid out as cpu_packed.h tells."""

    def __init__(self, num_in: int, tables: torch.Tensor, num_escaped: torch.Tensor) -> None:
        """Not filled yet. num_escaped (n,) int32: weights of each row whose high byte is not in its table."""
        self.shape = len(tables), num_in
        ends = num_escaped.cumsum(0, dtype=torch.int32)
        units = empty_weight((len(tables), num_in // PACKED_UNIT * PACKED_UNIT_BYTES), torch.uint8)
        self.tensors = units, tables, torch.empty(int(ends[-1]), dtype=torch.uint8), ends - num_escaped
        self.struct = _Packed(*(tensor.data_ptr() for tensor in self.tensors), *self.shape)


class CoarseMatrix:
    """A copy of an (n, k) matrix in 7 bits a weight, with bounds for what that loses; made by `CpuKernels.coarsen`."""

    def __init__(self, num_out: int, num_in: int) -> None:
        """Not filled yet."""
        padded = -(-num_out // PACKED_GROUP) * PACKED_GROUP
        self.tensors = empty_weight((padded, num_in), torch.uint8), torch.empty(num_out), torch.empty(num_out)
        self.struct = _Coarse(*(tensor.data_ptr() for tensor in self.tensors))


def empty_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """In huge pages where the system has them: of reading all weights once a step, translating addresses takes up to a
    tenth of the time. Given back to the system when freed, which malloc does not do below its heap's top."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class CpuKernels:
    """All tensors are bfloat16 on the CPU unless said otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def linear(self, x: torch.Tensor, weight: torch.Tensor | PackedMatrix, bias: torch.Tensor | None) -> torch.Tensor:
        """x (..., k), weight (n, k) and bias (n,) or None, all dense, to (..., n): the same bits, packed or not."""
        num_out, num_in = weight.shape
        assert x.shape[-1] == num_in and x.dtype == torch.bfloat16
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], num_out)
        operands = x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(), x.numel() // num_in
        threads = torch.get_num_threads()
        if isinstance(weight, PackedMatrix):
            self._library.lightvl_packed_linear(ctypes.byref(weight.struct), *operands, threads)
        else:
            assert weight.is_contiguous() and weight.dtype == torch.bfloat16
            self._library.lightvl_linear(weight.data_ptr(), *operands, num_in, num_out, threads)
        return out

    def pack(self, weight: torch.Tensor) -> PackedMatrix | None:
        """weight (n, k), dense. None where it would not become small: k is not a multiple of 128, or many weights are
        of rare magnitudes."""
        num_out, num_in = weight.shape
        assert weight.is_contiguous() and weight.dtype == torch.bfloat16
        if num_in % PACKED_UNIT or not weight.numel():
            return None
        tables = torch.empty(num_out, PACKED_TABLE, dtype=torch.uint8)
        num_escaped = torch.empty(num_out, dtype=torch.int32)
        weight_ptr, sizes = weight.data_ptr(), (num_out, num_in, torch.get_num_threads())
        self._library.lightvl_choose_tables(weight_ptr, tables.data_ptr(), num_escaped.data_ptr(), *sizes)
        if int(num_escaped.sum()) > weight.numel() * MAX_ESCAPED:
            return None
        packed = PackedMatrix(num_in, tables, num_escaped)
        to = packed.struct
        self._library.lightvl_pack(weight_ptr, to.tables, to.starts, to.units, to.escaped, *sizes)
        return packed

    def coarsen(self, weight: torch.Tensor) -> CoarseMatrix | None:
        """weight (n, k), dense. None where k is not a multiple of 64."""
        num_out, num_in = weight.shape
        assert weight.is_contiguous() and weight.dtype == torch.bfloat16
        if num_in % COARSE_STEP:
            return None
        coarse = CoarseMatrix(num_out, num_in)
        sizes = num_out, num_in, torch.get_num_threads()
        self._library.lightvl_coarsen(weight.data_ptr(), ctypes.byref(coarse.struct), *sizes)
        return coarse

    def best(self, x: torch.Tensor, weight: PackedMatrix, coarse: CoarseMatrix) -> torch.Tensor:
        """x (m, k) with m <= MAX_BEST_ROWS and the same matrix twice to (m, n): what is the greatest of its row, ties
        included, is as `linear` has it, to the bit; all else is too, or is minus infinity."""
        num_rows, num_in = x.shape
        assert num_rows <= MAX_BEST_ROWS and num_in == weight.shape[1] and x.dtype == torch.bfloat16
        x = x.contiguous()
        out = x.new_empty(num_rows, weight.shape[0])
        most = torch.empty(out.shape, dtype=torch.float32)
        matrices = ctypes.byref(weight.struct), ctypes.byref(coarse.struct)
        pointers = x.data_ptr(), out.data_ptr(), most.data_ptr()
        self._library.lightvl_best(*matrices, *pointers, num_rows, torch.get_num_threads())
        return out

    def unpack_rows(self, matrix: PackedMatrix, idx: torch.Tensor) -> torch.Tensor:
        """The rows idx (R,) int64, in range, of the matrix, (R, k)."""
        assert idx.dtype == torch.int64 and idx.is_contiguous()
        out = torch.empty(len(idx), matrix.shape[1], dtype=torch.bfloat16)
        operands = ctypes.byref(matrix.struct), idx.data_ptr(), out.data_ptr()
        self._library.lightvl_unpack_rows(*operands, len(idx), torch.get_num_threads())
        return out

    def unpack_slab(self, matrix: PackedMatrix, first: int, out: torch.Tensor) -> None:
        """The rows first <= row < first + R of the matrix, to out (R, k), dense; `first` is a multiple of 3."""
        num_rows = len(out)
        assert out.is_contiguous() and out.dtype == torch.bfloat16 and out.shape[1] == matrix.shape[1]
        assert first % PACKED_GROUP == 0 and first + num_rows <= matrix.shape[0]
        operands = ctypes.byref(matrix.struct), first, out.data_ptr(), num_rows
        self._library.lightvl_unpack_slab(*operands, torch.get_num_threads())

    def decode_attention(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        pages: torch.Tensor,
        kv_lens: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """q (R, H, D), one token of each row, attends to the first kv_lens (R,) int64 keys in its pages (R, P) int64 of
        keys and values (G, num_pages, page_len, D), dense. D is a multiple of 32. Returns (R, H, D)."""
        num_rows, num_heads, dim = q.shape
        num_kv_heads, num_pages, page_len, _ = keys.shape
        assert q.stride(1) == dim and q.stride(2) == 1 and dim % 32 == 0 and pages.stride(1) == 1
        assert keys.is_contiguous() and values.is_contiguous() and keys.dtype == q.dtype == torch.bfloat16
        partial = self.attention_scratch(kv_lens, num_heads, dim)
        out = q.new_empty(num_rows, num_heads, dim)
        pointers = (t.data_ptr() for t in (keys, values, pages, kv_lens, partial, out))
        strides = q.stride(0), 0, pages.stride(0)
        shapes = num_heads, num_kv_heads, dim, num_pages, page_len
        arguments = AttentionStruct(q.data_ptr(), None, None, *pointers, num_rows, *strides, *shapes, scale)
        self._library.lightvl_decode_attention(ctypes.byref(arguments), torch.get_num_threads())
        return out

    def attention_scratch(self, kv_lens: torch.Tensor, num_heads: int, dim: int) -> torch.Tensor:
        """What attention of such rows needs to put the parts of long ones together."""
        size = self._library.lightvl_attention_scratch(kv_lens.data_ptr(), len(kv_lens), num_heads, dim)
        return torch.empty(size, dtype=torch.float32)

    def decode_layers(self, layers: ctypes.Array[Any], rows: ctypes.Structure) -> None:
        """For `cpu_layers.LayerStack`, which makes the two."""
        self._library.lightvl_decode_layers(layers, len(layers), ctypes.byref(rows), torch.get_num_threads())

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, branch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Over the last dimension; with `branch`, x += branch before. x and branch dense."""
        assert x.is_contiguous() and x.dtype == weight.dtype == torch.bfloat16
        assert branch is None or (branch.is_contiguous() and branch.dtype == x.dtype)
        out, size = torch.empty_like(x), x.shape[-1]
        branch_ptr = None if branch is None else branch.data_ptr()
        operands = branch_ptr, x.data_ptr(), weight.data_ptr(), out.data_ptr()
        self._library.lightvl_rms_norm(*operands, x.numel() // size, size, eps, torch.get_num_threads())
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """(T, 2 * size), gate first, dense, to (T, size)."""
        assert gate_up.is_contiguous() and gate_up.dtype == torch.bfloat16
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(num_rows, size)
        threads = torch.get_num_threads()
        self._library.lightvl_silu_and_mul(gate_up.data_ptr(), out.data_ptr(), num_rows, size, threads)
        return out

    def quick_gelu_(self, x: torch.Tensor) -> torch.Tensor:
        """x * sigmoid(1.702 x), in place; x dense. Rounded once."""
        assert x.is_contiguous() and x.dtype == torch.bfloat16
        self._library.lightvl_quick_gelu(x.data_ptr(), x.numel(), torch.get_num_threads())
        return x

    def softmax_(self, x: torch.Tensor) -> torch.Tensor:
        """Over the last dimension, in place; x dense."""
        assert x.is_contiguous() and x.dtype == torch.bfloat16
        size = x.shape[-1]
        self._library.lightvl_softmax(x.data_ptr(), x.numel() // size, size, torch.get_num_threads())
        return x

    def rope(self, heads: torch.Tensor, num_turned: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn the first `num_turned` heads of (T, heads, D) in place; cos and sin (T, D / 2) float32. All dense."""
        assert heads.is_contiguous() and heads.dtype == torch.bfloat16
        assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == torch.float32
        num_rows, num_heads, dim = heads.shape
        operands = heads.data_ptr(), cos.data_ptr(), sin.data_ptr()
        self._library.lightvl_rope(*operands, num_rows, num_heads, num_turned, dim // 2, torch.get_num_threads())
