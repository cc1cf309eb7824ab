"""CpuAttention and encoder_attention against dense attention over unpaged K,V."""

from __future__ import annotations

import random

import pytest
import torch

import lightvl.attention.cpu as cpu
from lightvl.attention.base import CrossInputs, CrossSpan, SelfInputs, StepInputs
from lightvl.attention.cpu import CpuAttention, encoder_attention
from lightvl.attention.store import KVShape

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The reference: q (n, H, D) over k, v (L, G, D), all at once in float32. Query i is key L - n + i."""
    size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(size, 1).float(), v.repeat_interleave(size, 1).float()
    scores = torch.einsum("nhd,lhd->hnl", q.float(), k) * q.shape[-1] ** -0.5
    if causal:
        num, length = q.shape[0], k.shape[0]
        visible = torch.arange(length)[None] <= torch.arange(length - num, length)[:, None]
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v)


class Dense:
    """Several sequences with their whole K,V per layer, and the same sequences in a CpuAttention."""

    def __init__(
        self, *, groups: int, kv_heads: int, dim: int, page_size: int, dtype: torch.dtype, seed: int, layers: int = 2
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.page_size = groups * kv_heads, kv_heads, dim, page_size
        self.dtype, self.layers = dtype, layers
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.num_pages = 400 // page_size + 16
        self.backend = CpuAttention(
            KVShape(layers, kv_heads, dim), num_pages=self.num_pages, page_size=page_size, dtype=dtype
        )
        # what earlier sequences left behind must not matter
        self.backend.pages.keys.normal_(std=30.0)
        self.backend.pages.values.normal_(std=30.0)
        self.free = self.random.sample(range(self.num_pages), self.num_pages)
        self.pages: dict[int, list[int]] = {}
        self.kv: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def check_step(self, rows: list[tuple[int, int]]) -> None:
        """rows: (sequence, number of new tokens)."""
        slots, kv_lens = [], []
        for seq, num in rows:
            start = len(self.kv[seq, 0][0]) if (seq, 0) in self.kv else 0
            pages = self.pages.setdefault(seq, [])
            while len(pages) * self.page_size < start + num:
                pages.append(self.free.pop())
            slots += [
                pages[i // self.page_size] * self.page_size + i % self.page_size for i in range(start, start + num)
            ]
            kv_lens.append(start + num)
        width = max(len(self.pages[seq]) for seq, _ in rows) + 1
        inputs = make_inputs(
            q_lens=[num for _, num in rows],
            kv_lens=kv_lens,
            slots=torch.tensor(slots),
            page_table=torch.tensor([self.pages[seq] + [0] * (width - len(self.pages[seq])) for seq, _ in rows]),
        )
        self.backend.prepare(inputs)
        total = sum(num for _, num in rows)
        for layer in range(self.layers):
            fused = torch.randn(total, self.heads + 2 * self.kv_heads, self.dim).to(self.dtype)
            q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], 1)  # strided, as in the decoder
            got = self.backend.attend(layer, q, k, v, inputs)
            assert got.shape == (total, self.heads * self.dim) and got.dtype == self.dtype
            start = 0
            for seq, num in rows:
                part = slice(start, start + num)
                old = self.kv.get((seq, layer), (k[:0], v[:0]))
                self.kv[seq, layer] = torch.cat((old[0], k[part])), torch.cat((old[1], v[part]))
                want = dense_attention(q[part], *self.kv[seq, layer], causal=True).flatten(1)
                torch.testing.assert_close(got[part].float(), want, rtol=0, atol=TOLERANCE[self.dtype])
                start += num


def make_inputs(**rows: object) -> StepInputs:
    nothing = torch.empty(0, dtype=torch.int64)
    return StepInputs(nothing, nothing, SelfInputs(**rows), cross=None)  # type: ignore[arg-type]


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
    heads, kv_heads, dim, page_len = 2 * groups, 2, 16, 5
    torch.manual_seed(groups)
    backend = CpuAttention(
        KVShape(1, kv_heads, dim, num_cross_layers=2),
        num_pages=8,
        page_size=4,
        dtype=dtype,
        num_cross_pages=9,
        cross_page_len=page_len,
    )
    images = [(3,), (5, 6, 7), (8, 0)]  # one tile, neighbours, scattered
    kv = {}
    for cross_idx in range(2):
        for pages in images:
            k, v = torch.randn(2, len(pages) * page_len, kv_heads, dim).to(dtype)
            backend.write_cross(cross_idx, k, v, pages)
            kv[cross_idx, pages] = k, v
    spans = [
        CrossSpan(2, 6, images[0]),
        CrossSpan(6, 7, images[1]),
        CrossSpan(7, 8, images[0]),  # another sequence with the same image
        CrossSpan(9, 15, images[2]),
        CrossSpan(15, 16, images[1] + images[0]),  # two images seen together
    ]
    inputs = make_inputs(
        q_lens=[7, 1, 9], kv_lens=[7, 1, 9], slots=torch.arange(17), page_table=torch.zeros(3, 3).long()
    )
    inputs.cross = CrossInputs(spans, torch.zeros(17, 1))
    backend.prepare(inputs)
    for cross_idx in range(2):
        q = torch.randn(17, heads, dim).to(dtype)
        got = backend.cross_attend(cross_idx, q, inputs).float()
        want = torch.zeros(17, heads * dim)
        for span in spans:
            seen = [kv[cross_idx, pages] for pages in images if set(pages) <= set(span.pages)]
            if span.pages == images[1] + images[0]:
                seen = [kv[cross_idx, images[1]], kv[cross_idx, images[0]]]
            k, v = (torch.cat(parts) for parts in zip(*seen, strict=True))
            rows = slice(span.q_start, span.q_end)
            want[rows] = dense_attention(q[rows], k, v, causal=False).flatten(1)
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])
        assert not got[[0, 1, 8, 16]].any(), "tokens in no span get exactly zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seg_lens", [[7], [4, 4, 4, 4], [300, 16, 16, 9, 16, 260], [1, 2, 3]])
def test_encoder_attention_stays_inside_segments(
    seg_lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(len(seg_lens))
    q, k, v = torch.randn(sum(seg_lens), 3, 3, 20).to(dtype).unbind(1)
    want = torch.cat(
        [dense_attention(*part, causal=False) for part in zip(*(x.split(seg_lens) for x in (q, k, v)), strict=True)]
    )
    for block in (cpu.SCORE_BLOCK, 2000):  # whole, and in pieces
        monkeypatch.setattr(cpu, "SCORE_BLOCK", block)
        got = encoder_attention(q, k, v, seg_lens)
        assert got.shape == q.shape and got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=0, atol=TOLERANCE[dtype])


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
