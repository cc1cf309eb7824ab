"""Attention of decode rows from pages: against dense attention, whatever lies in the other pages."""

from __future__ import annotations

import pytest
import torch
from attention_helpers import dense_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.kernels.cpu import CpuKernels


def check(
    kernels: CpuKernels, kv_lens: list[int], *, heads: int, kv_heads: int, dim: int, page_len: int, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = max(-(-kv_len // page_len) for kv_len in kv_lens)
    num_pages = len(kv_lens) * most + 3
    shape = (kv_heads, num_pages, page_len, dim)
    keys, values = torch.full(shape, torch.nan).bfloat16(), torch.full(shape, torch.nan).bfloat16()
    pages = torch.randperm(num_pages, generator=generator)[: len(kv_lens) * most].view(len(kv_lens), most)
    # rows of the layer's heads, as rope leaves them: q is a part of each
    q = torch.randn(len(kv_lens), heads + 2 * kv_heads, dim, generator=generator).bfloat16()[:, :heads]
    wanted = []
    for row, kv_len in enumerate(kv_lens):
        k, v = (torch.randn(kv_len, kv_heads, dim, generator=generator).bfloat16() for _ in range(2))
        for token in range(kv_len):
            page, offset = pages[row, token // page_len], token % page_len
            keys[:, page, offset], values[:, page, offset] = k[token], v[token]
        wanted.append(dense_attention(q[row : row + 1], k, v, causal=True))
    got = kernels.decode_attention(q, keys, values, pages, torch.tensor(kv_lens), dim**-0.5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), torch.cat(wanted), rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
def test_every_group(kernels: CpuKernels, group: int) -> None:
    check(kernels, [1, 31, 32, 33, 100], heads=2 * group, kv_heads=2, dim=64, page_len=16)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_every_head_size(kernels: CpuKernels, dim: int) -> None:
    check(kernels, [70, 5], heads=4, kv_heads=2, dim=dim, page_len=16)


def test_long_contexts_are_put_together(kernels: CpuKernels) -> None:
    check(kernels, [1500, 511, 512, 513, 1024, 3], heads=6, kv_heads=1, dim=32, page_len=64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 140), min_size=1, max_size=5), st.sampled_from([1, 4, 16, 48, 64]), st.integers(0, 99))
def test_any_lengths_and_pages(kernels: CpuKernels, kv_lens: list[int], page_len: int, seed: int) -> None:
    check(kernels, kv_lens, heads=3, kv_heads=1, dim=32, page_len=page_len, seed=seed)


def test_scores_that_would_overflow_exp(kernels: CpuKernels) -> None:
    """One key far above the others takes all the weight, in whichever block or split it comes."""
    for best in (0, 40, 700):
        keys, values = torch.zeros(1, 50, 16, 32).bfloat16(), torch.zeros(1, 50, 16, 32).bfloat16()
        keys.view(-1, 32)[best] = 100.0
        values.view(-1, 32)[best] = 7.0
        pages, q = torch.arange(50)[None], torch.full((1, 1, 32), 100.0).bfloat16()
        assert kernels.decode_attention(q, keys, values, pages, torch.tensor([800]), 1.0).eq(7).all()


def test_not_a_number_stays_in_its_row(kernels: CpuKernels) -> None:
    keys, values = torch.ones(1, 4, 16, 32).bfloat16(), torch.ones(1, 4, 16, 32).bfloat16()
    keys[0, 2, 3] = torch.nan
    out = kernels.decode_attention(
        torch.ones(2, 1, 32).bfloat16(), keys, values, torch.tensor([[0, 1], [2, 3]]), torch.tensor([20, 20]), 0.1
    )
    assert out.isnan().any(-1).flatten().tolist() == [False, True]
