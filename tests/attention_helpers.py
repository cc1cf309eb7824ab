"""Dense attention over unpaged K,V, and sequences that live both there and in a paged backend: the reference of every
attention backend. Used by tests/attention on a CPU and by tools/gpu_check.py on a GPU.

    Dense(make=...).step(rows)     one step over any mixture of rows: (got, wanted) of each row and layer
    cross_pairs(make=...)          spans over cross pages: (got, wanted), zero where no image is seen
    encoder_pair(attention, ...)   segments of a vision tower
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from lightvl.attention.base import CrossInputs, CrossSpan, EncoderAttention, SelfInputs, StepInputs
from lightvl.attention.cpu import CpuAttention
from lightvl.attention.store import KVShape

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}

Pair = tuple[torch.Tensor, torch.Tensor]
"""What a backend gave, in its dtype, and what was wanted, in float32; on the same device."""


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """The reference: q (n, H, D) over k, v (L, G, D), all at once in float32. Query i is key L - n + i."""
    size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(size, 1).float(), v.repeat_interleave(size, 1).float()
    scores = torch.einsum("nhd,lhd->hnl", q.float(), k) * q.shape[-1] ** -0.5
    if causal:
        num, length = q.shape[0], k.shape[0]
        visible = torch.arange(length)[None] <= torch.arange(length - num, length)[:, None]
        scores = scores.masked_fill(~visible.to(q.device), -torch.inf)
    return torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v)


def assert_pairs_close(pairs: list[Pair]) -> None:
    for got, want in pairs:
        torch.testing.assert_close(got.float(), want, rtol=0, atol=TOLERANCE[got.dtype])


def fill_with_garbage(backend: Any) -> None:
    """What earlier sequences left behind must not matter."""
    for store in (backend.pages, backend.cross_pages):
        store.keys.normal_(std=30.0)
        store.values.normal_(std=30.0)


class Dense:
    """Several sequences with their whole K,V per layer, and the same sequences in a paged backend. `make` takes
    CpuAttention's arguments."""

    def __init__(
        self,
        *,
        groups: int,
        kv_heads: int,
        dim: int,
        page_size: int,
        dtype: torch.dtype,
        seed: int,
        layers: int = 2,
        num_tokens: int = 400,
        make: Callable[..., Any] = CpuAttention,
        device: str = "cpu",
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.page_size = groups * kv_heads, kv_heads, dim, page_size
        self.dtype, self.layers, self.device = dtype, layers, device
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.num_pages = num_tokens // page_size + 16
        shape = KVShape(layers, kv_heads, dim, num_heads=self.heads)
        self.backend = make(shape, num_pages=self.num_pages, page_size=page_size, dtype=dtype)
        fill_with_garbage(self.backend)
        self.free = self.random.sample(range(self.num_pages), self.num_pages)
        self.pages: dict[int, list[int]] = {}
        self.kv: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def check_step(self, rows: list[tuple[int, int]]) -> None:
        """rows: (sequence, number of new tokens)."""
        assert_pairs_close(self.step(rows))

    def step(self, rows: list[tuple[int, int]]) -> list[Pair]:
        """rows: (sequence, number of new tokens)."""
        inputs = self._inputs(rows)
        self.backend.prepare(inputs)
        total = sum(num for _, num in rows)
        pairs = []
        for layer in range(self.layers):
            fused = torch.randn(total, self.heads + 2 * self.kv_heads, self.dim).to(self.device, self.dtype)
            q, k, v = fused.split([self.heads, self.kv_heads, self.kv_heads], 1)  # strided, as in the decoder
            got = self.backend.attend(layer, q, k, v, inputs)
            assert got.shape == (total, self.heads * self.dim) and got.dtype == self.dtype
            start = 0
            for seq, num in rows:
                part = slice(start, start + num)
                old = self.kv.get((seq, layer), (k[:0], v[:0]))
                self.kv[seq, layer] = torch.cat((old[0], k[part])), torch.cat((old[1], v[part]))
                pairs.append((got[part], dense_attention(q[part], *self.kv[seq, layer], causal=True).flatten(1)))
                start += num
        return pairs

    def _inputs(self, rows: list[tuple[int, int]]) -> StepInputs:
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
        table = [self.pages[seq] + [0] * (width - len(self.pages[seq])) for seq, _ in rows]
        return make_inputs(
            q_lens=[num for _, num in rows],
            kv_lens=kv_lens,
            slots=torch.tensor(slots, device=self.device),
            page_table=torch.tensor(table),
        )


def make_inputs(**rows: Any) -> StepInputs:
    nothing = torch.empty(0, dtype=torch.int64)
    return StepInputs(nothing, nothing, SelfInputs(**rows), cross=None)


def cross_pairs(
    *,
    groups: int,
    dim: int,
    page_len: int,
    dtype: torch.dtype,
    make: Callable[..., Any] = CpuAttention,
    device: str = "cpu",
) -> list[Pair]:
    """17 tokens in spans over images of one tile, of neighbouring and of scattered tiles, and over two images at once;
    two cross layers, 2 K,V heads. Asserts that tokens in no span get exactly zero."""
    heads, kv_heads = 2 * groups, 2
    torch.manual_seed(groups)
    backend = make(
        KVShape(1, kv_heads, dim, num_cross_layers=2, num_heads=heads),
        num_pages=8,
        page_size=4,
        dtype=dtype,
        num_cross_pages=9,
        cross_page_len=page_len,
    )
    fill_with_garbage(backend)
    images = [(3,), (5, 6, 7), (8, 0)]
    kv = {}
    for cross_idx in range(2):
        for pages in images:
            k, v = torch.randn(2, len(pages) * page_len, kv_heads, dim).to(device, dtype)
            backend.write_cross(cross_idx, k, v, pages)
            kv[cross_idx, pages] = k, v
    both = images[1] + images[0]
    spans = [
        CrossSpan(2, 6, images[0]),
        CrossSpan(6, 7, images[1]),
        CrossSpan(7, 8, images[0]),  # another sequence with the same image
        CrossSpan(9, 15, images[2]),
        CrossSpan(15, 16, both),
    ]
    inputs = make_inputs(
        q_lens=[7, 1, 9],
        kv_lens=[7, 1, 9],
        slots=torch.arange(17, device=device),
        page_table=torch.arange(9).view(3, 3) % 8,
    )
    inputs.cross = CrossInputs(spans, torch.zeros(17, 1, device=device))
    backend.prepare(inputs)
    pairs = []
    for cross_idx in range(2):
        q = torch.randn(17, heads, dim).to(device, dtype)
        got = backend.cross_attend(cross_idx, q, inputs)
        want = torch.zeros(17, heads * dim, device=device)
        for span in spans:
            seen = [images[1], images[0]] if span.pages == both else [span.pages]
            k, v = (torch.cat(parts) for parts in zip(*(kv[cross_idx, pages] for pages in seen), strict=True))
            rows = slice(span.q_start, span.q_end)
            want[rows] = dense_attention(q[rows], k, v, causal=False).flatten(1)
        assert not got[[0, 1, 8, 16]].any(), "tokens in no span get exactly zero"
        pairs.append((got, want))
    return pairs


def encoder_pair(
    attention: EncoderAttention,
    seg_lens: list[int],
    kv_lens: list[int] | None = None,
    *,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> Pair:
    torch.manual_seed(len(seg_lens))
    if kv_lens is None:
        q, k, v = torch.randn(sum(seg_lens), 3, heads, dim).to(device, dtype).unbind(1)  # strided, as in the towers
    else:
        q = torch.randn(sum(seg_lens), heads, dim).to(device, dtype)
        k, v = torch.randn(2, sum(kv_lens), heads, dim).to(device, dtype)
    key_lens = seg_lens if kv_lens is None else kv_lens
    parts = zip(q.split(seg_lens), k.split(key_lens), v.split(key_lens), strict=True)
    want = torch.cat([dense_attention(*part, causal=False) for part in parts])
    got = attention(q, k, v, seg_lens, kv_lens)
    assert got.shape == q.shape and got.dtype == dtype
    return got, want
