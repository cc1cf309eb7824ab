"""A step's rows in flashinfer's terms: which queries, which pages, how much of the last one. Index arithmetic on the
host, in numpy, without loops over rows; no device and no kernels, so that all of it is tested on a CPU.

Called by `cuda.py` and `cuda_graph.py` once per step. R rows, N pages of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from lightvl.attention.base import CrossSpan

Ints = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Row r holds queries q_indptr[r] <= t < q_indptr[r + 1] of the step, and attends to its pages
    indices[kv_indptr[r] : kv_indptr[r + 1]]: all of each, but only `last_page_len` keys of the last one. A row that
    attends to nothing has no pages and a last_page_len of 0 (flashinfer adds it even where there is no page); its
    output is zero.
    """

    q_indptr: Ints  # (R + 1,)
    kv_indptr: Ints  # (R + 1,)
    indices: Ints  # (N,)
    last_page_len: Ints  # (R,)


def self_rows(q_lens: Sequence[int], kv_lens: Sequence[int], page_table: Any, page_len: int) -> PagedRows:
    """`page_table` (R, at least the pages of the longest row) of any integers."""
    kv = np.asarray(kv_lens, dtype=np.int32)
    num_pages = -(-kv // page_len)
    return PagedRows(indptr(q_lens), indptr(num_pages), _pages_of(page_table, num_pages), _last(kv, page_len))


def padded_decode_rows(
    kv_lens: Sequence[int], page_table: Any, page_len: int, num_rows: int, scratch_page: int
) -> PagedRows:
    """One query each, filled up to `num_rows` with rows of one key in the scratch page."""
    kv = np.ones(num_rows, dtype=np.int32)
    kv[: len(kv_lens)] = kv_lens
    num_pages = -(-kv // page_len)
    indices = np.full(num_pages.sum(), scratch_page, dtype=np.int32)
    if len(kv_lens):
        owned = _pages_of(page_table, num_pages[: len(kv_lens)])
        indices[: len(owned)] = owned
    return PagedRows(np.arange(num_rows + 1, dtype=np.int32), indptr(num_pages), indices, _last(kv, page_len))


def cross_rows(spans: Sequence[CrossSpan], num_tokens: int, page_len: int) -> PagedRows:
    """One row per span, and one that attends to nothing for the tokens before, between and after spans. Spans are
    disjoint and ascending."""
    borders, num_pages = [0], []
    for span in spans:  # few: a chunk sees a handful of images
        if span.q_start > borders[-1]:
            borders.append(span.q_start)
            num_pages.append(0)
        borders.append(span.q_end)
        num_pages.append(len(span.pages))
    if num_tokens > borders[-1]:
        borders.append(num_tokens)
        num_pages.append(0)
    return _full_pages(np.array(borders, dtype=np.int32), np.array(num_pages, dtype=np.int32), spans, page_len)


def cross_decode_rows(spans: Sequence[CrossSpan], num_rows: int, page_len: int) -> PagedRows:
    """One query each; rows without a span, padding among them, attend to nothing."""
    num_pages = np.zeros(num_rows, dtype=np.int32)
    starts = np.fromiter((span.q_start for span in spans), dtype=np.int64, count=len(spans))
    num_pages[starts] = np.fromiter((len(span.pages) for span in spans), dtype=np.int32, count=len(spans))
    return _full_pages(np.arange(num_rows + 1, dtype=np.int32), num_pages, spans, page_len)


def workspace_bytes(num_heads: int, num_kv_heads: int, head_dim: int, num_sms: int, max_decode_rows: int) -> int:
    """Most that flashinfer keeps of partial results (float32, with their log-sum-exps) when it splits keys: of up to
    two blocks per processor and K,V head, 128 queries each in prefill; in a captured decode of at least one tile of
    16 (packed) queries per row."""
    group = num_heads // num_kv_heads
    num_split = -(-2 * num_sms // num_kv_heads)
    decode_tile = 16 if group <= 16 else 64 if group <= 64 else 128
    decode_tiles = max(num_split, -(-max_decode_rows * group // decode_tile) + max_decode_rows)
    # the kernel for few query heads per K,V head has smaller blocks, but never more than 16 on a processor
    num_partial = max(128 * num_split, decode_tile * decode_tiles, -(-16 * num_sms // num_kv_heads))
    return num_heads * num_partial * (head_dim + 1) * 4 + (1 << 20)


def _full_pages(q_indptr: Ints, num_pages: Ints, spans: Sequence[CrossSpan], page_len: int) -> PagedRows:
    indices = np.fromiter(chain.from_iterable(span.pages for span in spans), dtype=np.int32, count=num_pages.sum())
    return PagedRows(q_indptr, indptr(num_pages), indices, np.where(num_pages > 0, page_len, 0).astype(np.int32))


def indptr(lens: Sequence[int] | Ints) -> Ints:
    """(0, lens[0], lens[0] + lens[1], ...)."""
    ends = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, dtype=np.int32, out=ends[1:])
    return ends


def _pages_of(page_table: Any, num_pages: Ints) -> Ints:
    """The first num_pages[r] entries of each row r, one row after the other."""
    table = np.asarray(page_table)[:, : num_pages.max()]
    pages: Ints = table[np.arange(table.shape[1]) < num_pages[:, None]].astype(np.int32)
    return pages


def _last(kv_lens: Ints, page_len: int) -> Ints:
    last: Ints = (kv_lens - 1) % page_len + 1
    return last
