"""Attention for CPUs: paged self-attention, cross attention, and full attention for vision towers.

Decode rows go to our own kernel where it runs (bfloat16). Everything else is torch's matrix products over blocks small
enough for the cache (facts: torch's SDPA is three to ten times slower here). There, scores are rounded to the model's
dtype once, after scaling; softmax computes in float32 inside. The engine calls `CpuAttention` on the lane
thread; the reference for it is dense attention in tests/attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightvl.attention.base import PagedRows, StepInputs
from lightvl.attention.store import KVShape, PageStore
from lightvl.kernels.cpu import cpu_kernels

SCORE_BLOCK = 1 << 21
"""Most scores computed at once, in elements: 4 MB in bfloat16."""
CAUSAL_ROWS = 128
"""Most queries in one causal block: the keys after a block's last query are not computed at all."""
EVEN_ROWS = 64
"""Queries come in multiples of this: matmuls by 262 rows take half as long again as by 256 or 512."""
GATHER_BYTES = 1 << 22
"""Most K (or V) bytes gathered at once for decode rows; fits the cache beside the scores."""
SHORT_SEGMENT = 256
"""Encoder segments up to this length (windows) are batched over heads and segments."""


@dataclass(slots=True)
class _DecodeRows:
    """All rows of one token, for the kernel."""

    token_idx: torch.Tensor | slice  # (n,) in the step; a slice where they follow each other
    pages: torch.Tensor  # (n, P)
    kv_lens: torch.Tensor  # (n,) int64


@dataclass(slots=True)
class _DecodeGroup:
    """Rows of one token each and of similar length, attended together by torch."""

    token_idx: torch.Tensor  # (n,) in the step
    pages: torch.Tensor  # (n * P,), rows padded to P pages
    beyond: torch.Tensor  # (n, 1, P * page_size) True at keys past the row's end


@dataclass(slots=True)
class _Chunk:
    """A row of several tokens."""

    start: int  # in the step
    len: int
    kv_len: int
    pages: torch.Tensor  # (P,)


@dataclass(slots=True)
class _CrossGroup:
    """All tokens of the step that see the same cross pages."""

    token_idx: torch.Tensor | slice
    pages: tuple[int, ...]


class CpuAttention:
    """`base.AttentionBackend` over two `PageStore`s. Owns scratch memory, so one instance serves one thread."""

    def __init__(
        self,
        shape: KVShape,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        num_cross_pages: int = 0,
        cross_page_len: int = 0,
    ) -> None:
        heads, dim = shape.num_kv_heads, shape.head_dim
        self.pages = PageStore(shape.num_layers, heads, num_pages, page_size, dim, dtype)
        self.cross_pages = PageStore(shape.num_cross_layers, heads, num_cross_pages, cross_page_len, dim, dtype)
        self._kernels = cpu_kernels() if dtype == torch.bfloat16 and dim % 32 == 0 else None
        self._scale = dim**-0.5
        self._scratch = torch.empty(0, dtype=dtype)
        self._prepared_for: StepInputs | None = None
        self._decode_rows: _DecodeRows | None = None
        self._groups: list[_DecodeGroup] = []
        self._chunks: list[_Chunk] = []
        self._cross: list[_CrossGroup] = []

    def prepare(self, inputs: StepInputs) -> None:
        """Sort the step's rows into chunks and groups of decode rows; every layer uses the same."""
        rows = inputs.self_attention
        page_size = self.pages.page_len
        self._chunks, decode = [], []
        start = 0
        for row_idx, (q_len, kv_len) in enumerate(zip(rows.q_lens, rows.kv_lens, strict=True)):
            num_pages = -(-kv_len // page_size)
            if q_len == 1:
                decode.append((num_pages, kv_len, start, row_idx))
            else:
                self._chunks.append(_Chunk(start, q_len, kv_len, rows.page_table[row_idx, :num_pages]))
            start += q_len
        self._decode_rows, self._groups = None, []
        if decode and self._kernels is not None:
            self._decode_rows = _decode_rows(decode, rows.page_table)
        else:
            self._groups = [self._decode_group(group, rows.page_table) for group in self._similar(decode)]
        self._cross = [] if inputs.cross is None else _cross_groups(inputs)
        self._prepared_for = inputs

    def _similar(self, decode: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
        """Split (pages, keys, token, row) into groups that waste at most half of their gathering on padding and whose
        keys of one head fit the gathering budget."""
        _, _, _, page_len, dim = self.pages.keys.shape
        budget = GATHER_BYTES // (page_len * dim * self.pages.keys.element_size())
        groups: list[list[tuple[int, int, int, int]]] = []
        for item in sorted(decode, reverse=True):
            longest = groups[-1][0][0] if groups else 0
            if groups and 2 * item[0] >= longest and (len(groups[-1]) + 1) * longest <= budget:
                groups[-1].append(item)
            else:
                groups.append([item])
        return groups

    def _decode_group(self, group: list[tuple[int, int, int, int]], page_table: torch.Tensor) -> _DecodeGroup:
        num_pages = group[0][0]
        _, kv_lens, tokens, row_idx = (torch.tensor(column) for column in zip(*group, strict=True))
        key_idx = torch.arange(num_pages * self.pages.page_len)
        return _DecodeGroup(
            token_idx=tokens,
            pages=page_table[row_idx, :num_pages].flatten(),
            beyond=(key_idx >= kv_lens[:, None])[:, None],
        )

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """`layer_idx` counts the self-attention layers only."""
        assert self._prepared_for is inputs, "prepare() was not called for this step"
        self.pages.write(layer_idx, inputs.self_attention.slots, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        keys, values = self.pages.keys[layer_idx].flatten(2), self.pages.values[layer_idx].flatten(2)  # (G, pages, -1)
        for chunk in self._chunks:
            rows = slice(chunk.start, chunk.start + chunk.len)
            out[rows] = self._attend_chunk(q[rows], keys, values, chunk)
        if self._kernels is not None and self._decode_rows is not None:
            decode, store = self._decode_rows, self.pages
            paged = store.keys[layer_idx], store.values[layer_idx], decode.pages, decode.kv_lens
            out[decode.token_idx] = self._kernels.decode_attention(q[decode.token_idx], *paged, self._scale)
        for group in self._groups:
            out.index_copy_(0, group.token_idx, self._attend_decode(q[group.token_idx], keys, values, group))
        return out.flatten(1)

    def paged_rows(self, inputs: StepInputs) -> PagedRows | None:
        assert self._prepared_for is inputs, "prepare() was not called for this step"
        if self._decode_rows is None or self._chunks:
            return None
        return PagedRows(self.pages.keys, self.pages.values, self._decode_rows.pages, self._decode_rows.kv_lens)

    def _attend_chunk(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chunk: _Chunk) -> torch.Tensor:
        dim = q.shape[-1]

        def head_kv(head: int) -> tuple[torch.Tensor, torch.Tensor]:
            k = keys[head].index_select(0, chunk.pages).view(-1, dim)
            return k[: chunk.kv_len], values[head].index_select(0, chunk.pages).view(-1, dim)[: chunk.kv_len]

        return _by_head(q, keys.shape[0], head_kv, self._scale, causal=True)

    def _attend_decode(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, group: _DecodeGroup
    ) -> torch.Tensor:
        """q (n, H, D) to the same: as many K,V heads at a time as fit the gathering budget."""
        num_rows, num_heads, dim = q.shape
        num_kv_heads, width = keys.shape[0], keys.shape[2]
        size = num_heads // num_kv_heads
        by_head = q.view(num_rows, num_kv_heads, size, dim).transpose(0, 1)  # (G, n, H / G, D)
        out = q.new_empty(num_kv_heads, num_rows, size, dim)
        head_bytes = len(group.pages) * width * q.element_size()
        step = max(1, min(num_kv_heads, GATHER_BYTES // head_bytes))
        for first in range(0, num_kv_heads, step):
            part = slice(first, min(first + step, num_kv_heads))
            num_parts = part.stop - first
            flat_q = by_head[part].reshape(num_parts * num_rows, size, dim)
            k = self._gather(keys[part], group.pages).view(num_parts * num_rows, -1, dim)
            scores = torch.baddbmm(q.new_empty(1), flat_q, k.transpose(1, 2), beta=0, alpha=self._scale)
            scores.view(num_parts, num_rows, size, -1).masked_fill_(group.beyond, -torch.inf)
            weights = _softmax_(scores)
            v = self._gather(values[part], group.pages).view(num_parts * num_rows, -1, dim)
            out[part] = torch.bmm(weights, v).view(num_parts, num_rows, size, dim)
        return out.transpose(0, 1).reshape(num_rows, num_heads, dim)

    def _gather(self, source: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """source (g, pages, width) to (g, len(pages), width), in the scratch memory: K is done with when V comes.
        Fresh memory for each gathering would cost more in page faults than the copy itself."""
        heads, _, width = source.shape
        size = heads * len(pages) * width
        if len(self._scratch) < size:
            self._scratch = torch.empty(size, dtype=source.dtype)
        out = self._scratch[:size].view(heads, len(pages), width)
        return torch.index_select(source, 1, pages, out=out)

    def write_cross(self, cross_idx: int, k: torch.Tensor, v: torch.Tensor, pages: tuple[int, ...]) -> None:
        self.cross_pages.write_pages(cross_idx, pages, k, v)

    def cross_attend(self, cross_idx: int, q: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        assert self._prepared_for is inputs, "prepare() was not called for this step"
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        keys, values = self.cross_pages.keys[cross_idx], self.cross_pages.values[cross_idx]
        for group in self._cross:

            def head_kv(head: int, pages: tuple[int, ...] = group.pages) -> tuple[torch.Tensor, torch.Tensor]:
                return _rows_of(keys[head], pages), _rows_of(values[head], pages)

            out[group.token_idx] = _by_head(q[group.token_idx], keys.shape[0], head_kv, self._scale, causal=False)
        return out.flatten(1)

    def copy_pages(self, pairs: tuple[tuple[int, int], ...]) -> None:
        self.pages.copy_pages(pairs)


def _decode_rows(decode: list[tuple[int, int, int, int]], page_table: torch.Tensor) -> _DecodeRows:
    """From (pages, keys, token, row) of each."""
    _, kv_lens, tokens, row_idx = zip(*decode, strict=True)
    first, last = tokens[0], tokens[-1] + 1
    follow = last - first == len(tokens)
    return _DecodeRows(
        token_idx=slice(first, last) if follow else torch.tensor(tokens),
        pages=page_table if len(tokens) == len(page_table) else page_table[list(row_idx)],
        kv_lens=torch.tensor(kv_lens),
    )


def _cross_groups(inputs: StepInputs) -> list[_CrossGroup]:
    """Tokens of several spans over the same pages (many questions about one image) become one group: its K,V are the
    largest thing read."""
    assert inputs.cross is not None
    spans: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for span in inputs.cross.spans:
        spans.setdefault(span.pages, []).append((span.q_start, span.q_end))
    groups = []
    for pages, ranges in spans.items():
        if len(ranges) == 1:
            groups.append(_CrossGroup(slice(*ranges[0]), pages))
        else:
            tokens = torch.cat([torch.arange(start, end) for start, end in ranges])
            groups.append(_CrossGroup(tokens, pages))
    return groups


def _rows_of(paged: torch.Tensor, pages: tuple[int, ...]) -> torch.Tensor:
    """paged (num_pages, page_len, D) to (len(pages) * page_len, D): a view where the pages follow each other."""
    if pages == tuple(range(pages[0], pages[0] + len(pages))):
        return paged[pages[0] : pages[0] + len(pages)].flatten(0, 1)
    return paged[list(pages)].flatten(0, 1)


def _by_head(
    q: torch.Tensor,
    num_kv_heads: int,
    head_kv: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attend q (n, H, D) to each K,V head's (L, D) matrices in turn, in blocks of queries. Returns (n, H, D).

    Causal: query i is key L - n + i, and sees the keys up to itself.
    """
    num_rows, num_heads, dim = q.shape
    size = num_heads // num_kv_heads
    by_head = q.view(num_rows, num_kv_heads, size, dim).transpose(0, 1).contiguous()  # (G, n, H / G, D)
    out = torch.empty_like(by_head)
    for head in range(num_kv_heads):
        k, v = head_kv(head)
        step = max(1, min(SCORE_BLOCK // (size * len(k)), CAUSAL_ROWS if causal else num_rows))
        step -= step % EVEN_ROWS if step > EVEN_ROWS else 0
        for start in range(0, num_rows, step):
            end = min(start + step, num_rows)
            num_keys = len(k) - num_rows + end if causal else len(k)
            block = by_head[head, start:end].view(-1, dim)
            scores = torch.addmm(q.new_empty(1), block, k[:num_keys].T, beta=0, alpha=scale)
            if causal and end - start > 1:
                # | keys that all of the block's queries see | a triangle |
                corner = scores.view(end - start, size, num_keys)[:, :, num_keys - (end - start) :]
                corner.masked_fill_(_later(end - start), -torch.inf)
            torch.mm(_softmax_(scores), v[:num_keys], out=out[head, start:end].view(-1, dim))
    return out.transpose(0, 1).reshape(num_rows, num_heads, dim)


def _softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Over the last dimension of dense scores, which may be overwritten."""
    kernels = cpu_kernels() if scores.dtype == torch.bfloat16 else None
    return torch.softmax(scores, -1) if kernels is None else kernels.softmax_(scores)


@functools.lru_cache(maxsize=16)
def _later(num: int) -> torch.Tensor:
    """(num, 1, num): True where the key comes after the query."""
    return torch.ones(num, num, dtype=torch.bool).triu_(1)[:, None]


def encoder_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seg_lens: list[int], kv_lens: list[int] | None = None
) -> torch.Tensor:
    """`base.EncoderAttention`: long segments head by head, runs of equal short ones together."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    scale = q.shape[-1] ** -0.5
    sizes = list(zip(seg_lens, seg_lens if kv_lens is None else kv_lens, strict=True))
    row = key = run_start = 0
    while run_start < len(sizes):
        seg_len, kv_len = size = sizes[run_start]
        run_end, is_short = run_start + 1, max(size) <= SHORT_SEGMENT
        if is_short:
            most = max(1, SCORE_BLOCK // max(1, seg_len * kv_len * q.shape[1]))
            while run_end < len(sizes) and sizes[run_end] == size and run_end - run_start < most:
                run_end += 1
        num_segs = run_end - run_start
        rows, keys = slice(row, row + num_segs * seg_len), slice(key, key + num_segs * kv_len)
        if is_short and seg_len:
            out[rows] = _attend_windows(q[rows], k[keys], v[keys], num_segs, scale)
        elif seg_len:
            out[rows] = _attend_segment(q[rows], k[keys], v[keys], scale)
        row, key, run_start = rows.stop, keys.stop, run_end
    assert (row, key) == (len(q), len(k))
    return out


def _attend_windows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_segs: int, scale: float) -> torch.Tensor:
    num_rows, num_heads, dim = q.shape

    def by_window(x: torch.Tensor) -> torch.Tensor:
        seg_len = len(x) // num_segs
        return x.view(num_segs, seg_len, num_heads, dim).transpose(1, 2).reshape(-1, seg_len, dim)

    scores = torch.baddbmm(q.new_empty(1), by_window(q), by_window(k).transpose(1, 2), beta=0, alpha=scale)
    out = torch.bmm(_softmax_(scores), by_window(v))
    return out.view(num_segs, num_heads, num_rows // num_segs, dim).transpose(1, 2).reshape(num_rows, num_heads, dim)


def _attend_segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    # one copy per tensor: a matmul over rows that lie H * D apart would copy them for every block
    k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
    return _by_head(q, q.shape[1], lambda head: (k[head], v[head]), scale, causal=False)
