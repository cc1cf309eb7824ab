"""K,V tensors in pages: their layout, their writes and their cost. Used by the backends; which page belongs to whom is
the scheduler's business.

One store serves self-attention, another the cross attention of images: the same layout with other sizes.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a decoder keeps per token. `num_layers` are its self-attention layers."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_cross_layers: int = 0
    num_heads: int | None = None  # of queries; kernels for GPUs plan a step by them

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """K and V of one token in all self-attention layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    def bytes_per_cross_page(self, cross_page_len: int, dtype: torch.dtype) -> int:
        """K and V of one image tile in all cross layers."""
        return 2 * self.num_cross_layers * cross_page_len * self.num_kv_heads * self.head_dim * dtype.itemsize


class PageStore:
    """`keys` and `values`: (layers, G, num_pages, page_len, D).

    Head first, so that one head's keys of consecutive pages are one matrix, and gathered pages too: what a matmul on a
    CPU wants.
    """

    def __init__(
        self, num_layers: int, num_kv_heads: int, num_pages: int, page_len: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        shape = (num_layers, num_kv_heads, num_pages, page_len, head_dim)
        self.keys, self.values = _zeros(shape, dtype), _zeros(shape, dtype)
        self.page_len = page_len

    def write(self, layer_idx: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v (T, G, D) to slots (T,) = page * page_len + offset. Values become finite: a page's next owner reads them
        with weight 0 until it has written its own, and 0 * NaN is NaN."""
        self.keys[layer_idx].flatten(1, 2).index_copy_(1, slots, k.transpose(0, 1))
        self.values[layer_idx].flatten(1, 2).index_copy_(1, slots, v.transpose(0, 1).nan_to_num())

    def write_pages(self, layer_idx: int, pages: tuple[int, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v (len(pages) * page_len, G, D), page after page."""
        for source, page in enumerate(pages):
            rows = slice(source * self.page_len, (source + 1) * self.page_len)
            self.keys[layer_idx, :, page].copy_(k[rows].transpose(0, 1))
            self.values[layer_idx, :, page].copy_(v[rows].transpose(0, 1))

    def copy_pages(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy whole pages (from, to) in every layer."""
        for source, target in pairs:
            self.keys[:, :, target].copy_(self.keys[:, :, source])
            self.values[:, :, target].copy_(self.values[:, :, source])


class PagesFirstStore:
    """`keys` and `values`: (layers, num_pages, page_len, G, D), as kernels for GPUs want them.

    With `has_scratch` there is one page more, the last: it is nobody's, and rows that pad a batch are written there.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        num_pages: int,
        page_len: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        has_scratch: bool = False,
    ) -> None:
        shape = (num_layers, num_pages + has_scratch, page_len, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.num_pages, self.page_len = num_pages, page_len
        # made once: a view costs as much of the host's time as a launch
        self.layers = list(zip(self.keys.unbind(), self.values.unbind(), strict=True))
        """(pages, page_len, G, D) of each layer."""
        self.slots = [(k.view(-1, 1, *k.shape[2:]), v.view(-1, 1, *v.shape[2:])) for k, v in self.layers]
        """The same as pages of one token: (slots, 1, G, D)."""

    def write_pages(self, layer_idx: int, pages: tuple[int, ...], k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v (len(pages) * page_len, G, D), page after page."""
        keys, values = self.layers[layer_idx]
        for source, page in enumerate(pages):
            rows = slice(source * self.page_len, (source + 1) * self.page_len)
            keys[page].copy_(k[rows])
            values[page].copy_(v[rows])

    def copy_pages(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy whole pages (from, to) in every layer."""
        for source, target in pairs:
            self.keys[:, target].copy_(self.keys[:, source])
            self.values[:, target].copy_(self.values[:, source])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory that the system hands out zeroed when first touched, in large pages where it can: torch.zeros would write
    all of it at start, half a second for each GB. Zeroed, since a page's tail is read (with weight 0) before it is
    written, and 0 * NaN is NaN."""
    size = torch.Size(shape).numel()
    memory = mmap.mmap(-1, max(1, size * dtype.itemsize))
    with contextlib.suppress(AttributeError, OSError):  # not on every system
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape) if size else torch.empty(shape, dtype=dtype)
