"""Rows in flashinfer's terms, against loops that build them one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.attention.base import CrossSpan
from lightvl.attention.cuda_plan import (
    PagedRows,
    cross_decode_rows,
    cross_rows,
    padded_decode_rows,
    self_rows,
    workspace_bytes,
)


def unpacked(rows: PagedRows, page_len: int) -> list[tuple[int, int, list[int], int]]:
    """(first query, end, pages, keys) of each row."""
    for array in (rows.q_indptr, rows.kv_indptr, rows.indices, rows.last_page_len):
        assert array.dtype == np.int32
    out = []
    for r, last in enumerate(rows.last_page_len.tolist()):
        pages = rows.indices[rows.kv_indptr[r] : rows.kv_indptr[r + 1]].tolist()
        kv_len = max(len(pages) - 1, 0) * page_len + last  # as flashinfer's get_seq_lens
        out.append((int(rows.q_indptr[r]), int(rows.q_indptr[r + 1]), pages, kv_len))
    assert rows.kv_indptr[-1] == len(rows.indices)
    return out


lens = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 70)), min_size=1, max_size=9)


@given(lens, st.sampled_from([1, 4, 16]), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_rows_of_any_length(given_lens: list[tuple[int, int]], page_len: int, more: int) -> None:
    q_lens = [q_len for q_len, _ in given_lens]
    kv_lens = [q_len + cached for q_len, cached in given_lens]
    num_pages = [-(-kv_len // page_len) for kv_len in kv_lens]
    table = np.arange(len(q_lens) * (max(num_pages) + more)).reshape(len(q_lens), -1) * 7
    starts = np.cumsum([0, *q_lens])
    want = [(starts[r], starts[r + 1], table[r, : num_pages[r]].tolist(), kv_lens[r]) for r in range(len(q_lens))]
    assert unpacked(self_rows(q_lens, kv_lens, table, page_len), page_len) == want


@given(st.lists(st.integers(1, 70), max_size=9), st.sampled_from([1, 4, 16]), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_decode_rows_are_padded_with_one_key_of_the_scratch_page(kv_lens: list[int], page_len: int, pad: int) -> None:
    num_rows = max(1, len(kv_lens) + pad)
    num_pages = [-(-kv_len // page_len) for kv_len in kv_lens]
    table = np.arange(len(kv_lens) * max([1, *num_pages])).reshape(len(kv_lens), max([1, *num_pages]))
    want = [(r, r + 1, table[r, : num_pages[r]].tolist(), kv_len) for r, kv_len in enumerate(kv_lens)]
    want += [(r, r + 1, [999], 1) for r in range(len(kv_lens), num_rows)]
    assert unpacked(padded_decode_rows(kv_lens, table, page_len, num_rows, 999), page_len) == want


def test_tokens_between_spans_are_rows_without_keys() -> None:
    spans = [CrossSpan(2, 6, (3,)), CrossSpan(6, 7, (5, 6)), CrossSpan(9, 15, (8, 0))]
    assert unpacked(cross_rows(spans, 17, 5), 5) == [
        (0, 2, [], 0),
        (2, 6, [3], 5),
        (6, 7, [5, 6], 10),
        (7, 9, [], 0),
        (9, 15, [8, 0], 10),
        (15, 17, [], 0),
    ]
    assert unpacked(cross_rows([CrossSpan(0, 4, (1,))], 4, 5), 5) == [(0, 4, [1], 5)]


def test_decode_rows_without_an_image_have_no_keys() -> None:
    spans = [CrossSpan(1, 2, (3, 4)), CrossSpan(2, 3, (3,))]
    got = unpacked(cross_decode_rows(spans, 5, 7), 7)
    assert got == [(0, 1, [], 0), (1, 2, [3, 4], 14), (2, 3, [3], 7), (3, 4, [], 0), (4, 5, [], 0)]
    assert unpacked(cross_decode_rows([], 2, 7), 7) == [(0, 1, [], 0), (1, 2, [], 0)]


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "rows", "megabytes"),
    [
        (28, 4, 256, 121.8),  # prefill: 7 times 17.3 MB
        (28, 4, 512, 168.7),  # a captured decode of Qwen2-VL-7B
        (32, 8, 256, 84.5),
    ],
)
def test_workspace_is_as_large_as_flashinfer_takes(
    num_heads: int, num_kv_heads: int, rows: int, megabytes: float
) -> None:
    """facts/flashinfer.md's numbers for 132 processors and heads of 128, and a little for the log-sum-exps."""
    got = workspace_bytes(num_heads, num_kv_heads, 128, 132, rows) / 1e6
    assert megabytes < got < megabytes * 1.02 + 2
