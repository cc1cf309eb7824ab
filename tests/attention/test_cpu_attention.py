"""CpuAttention and encoder_attention against dense attention over unpaged K,V."""

from __future__ import annotations

import random

import pytest
import torch
from attention_helpers import Dense, assert_pairs_close, cross_pairs, encoder_pair, make_inputs

import lightvl.attention.cpu as cpu
from lightvl.attention.cpu import CpuAttention, encoder_attention
from lightvl.attention.store import KVShape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "kv_heads", "dim"), [(1, 3, 16), (2, 2, 32), (4, 1, 64), (7, 2, 16)])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_mixed_steps_equal_dense_attention(
    groups: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype
) -> None:
    dense = Dense(groups=groups, kv_heads=kv_heads, dim=dim, page_size=page_size, dtype=dtype, seed=groups + page_size)
    lengths = [1, 2, 5, 17, 33]
    for _ in range(6):
        seqs = dense.random.sample(range(5), dense.random.randint(1, 5))
        dense.check_step([(seq, dense.random.choice([1, 1, *lengths])) for seq in seqs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_blocks_equal_dense_attention(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With budgets so small that queries, heads and decode rows are all split."""
    monkeypatch.setattr(cpu, "SCORE_BLOCK", 300)
    monkeypatch.setattr(cpu, "GATHER_BYTES", 64 * 16 * dtype.itemsize)
    dense = Dense(groups=3, kv_heads=4, dim=16, page_size=4, dtype=dtype, seed=1)
    dense.check_step([(0, 37), (1, 20), (2, 5), (3, 3), (4, 60)])
    dense.check_step([(seq, 1) for seq in range(5)])
    dense.check_step([(4, 1), (0, 21), (2, 1)])


@pytest.mark.full
@pytest.mark.parametrize("seed", range(40))
def test_random_grids_equal_dense_attention(seed: int) -> None:
    choose = random.Random(seed).choice
    dense = Dense(
        groups=choose([1, 2, 4, 7]),
        kv_heads=choose([1, 2, 3]),
        dim=choose([16, 32, 64, 80]),
        page_size=choose([1, 4, 16]),
        dtype=choose([torch.float32, torch.bfloat16]),
        seed=seed,
    )
    for _ in range(8):
        seqs = dense.random.sample(range(6), dense.random.randint(1, 6))
        dense.check_step([(seq, dense.random.choice([1, 1, 1, 2, 3, 4, 9])) for seq in seqs])


def test_copied_pages_hold_the_same_keys() -> None:
    dense = Dense(groups=2, kv_heads=2, dim=16, page_size=4, dtype=torch.float32, seed=3)
    dense.check_step([(0, 11)])
    copy = [dense.free.pop() for _ in dense.pages[0]]
    dense.backend.copy_pages(tuple(zip(dense.pages[0], copy, strict=True)))
    dense.pages[1] = copy
    for layer in range(dense.layers):
        dense.kv[1, layer] = dense.kv[0, layer]
    dense.check_step([(0, 3), (1, 1)])
    dense.check_step([(0, 1), (1, 5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 4])
def test_cross_spans_equal_dense_attention(groups: int, dtype: torch.dtype) -> None:
    assert_pairs_close(cross_pairs(groups=groups, dim=16, page_len=5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seg_lens", [[7], [4, 4, 4, 4], [300, 16, 16, 9, 16, 260], [1, 2, 3]])
def test_encoder_attention_stays_inside_segments(
    seg_lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for block in (cpu.SCORE_BLOCK, 2000):  # whole, and in pieces
        monkeypatch.setattr(cpu, "SCORE_BLOCK", block)
        assert_pairs_close([encoder_pair(encoder_attention, seg_lens, heads=3, dim=20, dtype=dtype)])
        kv_lens = [length + 3 for length in seg_lens]
        assert_pairs_close([encoder_pair(encoder_attention, seg_lens, kv_lens, heads=3, dim=20, dtype=dtype)])
        empty = [0, *seg_lens, 0]  # segments without queries
        assert_pairs_close([encoder_pair(encoder_attention, empty, [5, *kv_lens, 300], heads=3, dim=20, dtype=dtype)])


def test_a_step_must_be_prepared() -> None:
    dense = Dense(groups=1, kv_heads=1, dim=16, page_size=4, dtype=torch.float32, seed=0)
    dense.check_step([(0, 3)])
    other = make_inputs(q_lens=[1], kv_lens=[4], slots=torch.tensor([0]), page_table=torch.zeros(1, 1).long())
    x = torch.zeros(1, 1, 16)
    with pytest.raises(AssertionError, match="prepare"):
        dense.backend.attend(0, x, x, x, other)


def test_bytes_are_those_of_the_tensors() -> None:
    shape = KVShape(num_layers=3, num_kv_heads=2, head_dim=16, num_cross_layers=2)
    backend = CpuAttention(shape, num_pages=5, page_size=4, dtype=torch.bfloat16, num_cross_pages=6, cross_page_len=7)
    assert 2 * backend.pages.keys.nbytes == 5 * 4 * shape.bytes_per_token(torch.bfloat16)
    assert 2 * backend.cross_pages.keys.nbytes == 6 * shape.bytes_per_cross_page(7, torch.bfloat16)


def test_a_broken_sequence_leaves_nothing_in_its_pages() -> None:
    """The next owner reads a page's unwritten tail with weight 0, and 0 * NaN is NaN."""
    backend = CpuAttention(KVShape(1, 1, 8), num_pages=2, page_size=4, dtype=torch.float32)
    broken = torch.full((8, 1, 8), torch.nan)
    for num_tokens, k, v in ((8, broken, broken), (1, torch.ones(1, 1, 8), torch.ones(1, 1, 8))):
        inputs = make_inputs(
            q_lens=[num_tokens], kv_lens=[num_tokens], slots=torch.arange(num_tokens), page_table=torch.tensor([[0, 1]])
        )
        backend.prepare(inputs)
        out = backend.attend(0, torch.ones(num_tokens, 2, 8), k, v, inputs)
    assert torch.equal(out, torch.ones(1, 16))
