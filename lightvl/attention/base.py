"""The attention seam: what a step's tensors are, and what a backend must do with them.

Built once per step by `engine/inputs.py`; read by the decoder's layers and by every backend. T tokens, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(slots=True)
class SelfInputs:
    """Causal self-attention over pages: token t of row r attends to that row's keys up to its own index."""

    q_lens: list[int]  # (R,) host; tokens of each row in this step, in order; sum = T
    kv_lens: list[int]  # (R,) host; keys of each row, this step's included
    slots: torch.Tensor  # (T,) int64, device; where each token's K,V is written
    page_table: torch.Tensor  # (R, max pages) int64, host; entries past a row's own pages are any page


@dataclass(frozen=True, slots=True)
class CrossSpan:
    """Tokens q_start <= t < q_end of the step attend to all K,V in these cross pages (every page is full)."""

    q_start: int
    q_end: int
    pages: tuple[int, ...]


@dataclass(slots=True)
class CrossInputs:
    """Spans are disjoint and ascending; tokens in no span see no image and are gated to zero."""

    spans: list[CrossSpan]
    sees_image: torch.Tensor  # (T, 1) in the model's dtype: 1 where the token is in a span, else 0


@dataclass(slots=True)
class FeatureRows:
    """`rows` (len, hidden) replace the embeddings of tokens start <= t < start + len of the step."""

    start: int
    rows: torch.Tensor


@dataclass(slots=True)
class StepInputs:
    token_ids: torch.Tensor  # (T,) int64, device
    positions: torch.Tensor  # (T,) int64, or (3, T) for M-RoPE, device
    self_attention: SelfInputs
    cross: CrossInputs | None  # None: no token of this step sees an image, so cross layers are skipped (identity)
    features: list[FeatureRows] = field(default_factory=list)
    logits_idx: torch.Tensor | None = None  # (S,) int64, device; tokens whose logits are wanted; None: none at all
    best_only: bool = False  # logits less than their row's greatest may be minus infinity


@dataclass(frozen=True, slots=True)
class PagedRows:
    """A step of R rows of one token each, for kernels that compute whole layers: they write K,V as each row's last, and
    attend."""

    keys: torch.Tensor  # (self-attention layers, G, num_pages, page_len, D)
    values: torch.Tensor  # the same
    pages: torch.Tensor  # (R, P) int64
    kv_lens: torch.Tensor  # (R,) int64


class StepAttention(Protocol):
    """What a decoder's layers call, in a step that is prepared. H query heads, G K,V heads (H a multiple of G), D head
    size. Scale is D ** -0.5 everywhere."""

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """Write k, v (T, G, D) at `slots`, then attend q (T, H, D) causally. Returns (T, H * D)."""
        ...

    def paged_rows(self, inputs: StepInputs) -> PagedRows | None:
        """None where there are no such kernels, or the step is none for them: then `attend` is called."""
        ...

    def cross_attend(self, cross_idx: int, q: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        """Attend q (T, H, D) to the cross pages of each span. Returns (T, H * D), zero outside the spans."""
        ...


class AttentionBackend(StepAttention, Protocol):
    """Owns the K,V store of self pages and of cross pages. Called on the lane thread only, in inference mode."""

    def prepare(self, inputs: StepInputs) -> None:
        """Once per step, before the layers."""
        ...

    def write_cross(self, cross_idx: int, k: torch.Tensor, v: torch.Tensor, pages: tuple[int, ...]) -> None:
        """Write k, v (len(pages) * cross_page_len, G, D) of the cross_idx-th cross layer, page after page."""
        ...

    def copy_pages(self, pairs: tuple[tuple[int, int], ...]) -> None:
        """Copy self pages (from, to) in every layer."""
        ...


class FixedDecode(StepAttention, Protocol):
    """A decode step of exactly `num_rows` rows whose tensors never move and whose launches never change, so that a CUDA
    graph can be captured over it. `CudaAttention.fixed_decode` makes one for each batch size, with cross attention and
    without; all share workspaces, so each `load` is followed by its run, on the same stream, before the next `load`.

        fixed = attention.fixed_decode(64, with_cross=False, multi_axis_positions=False)
        fixed.load(None)                                       # 64 rows of padding
        logits = decoder.forward(fixed.inputs, fixed)          # first as it is, to warm up; then again under capture
        fixed.load(inputs); graph.replay()                     # then logits[: rows of inputs] are the step's
    """

    num_rows: int
    inputs: StepInputs  # `logits_idx` is every row; `cross` is None without cross attention; host fields are unused

    def load(self, inputs: StepInputs | None) -> None:
        """Copy a step of 1 to `num_rows` decode rows into the fixed tensors, pad it with rows that no sequence owns,
        plan its attention; None: padding only. On the current stream, before each run or replay, never under capture.
        `inputs.cross` must be None without cross attention; it may be None with it."""
        ...


class EncoderAttention(Protocol):
    """Full (non-causal) attention inside each of several consecutive segments, for vision towers."""

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seg_lens: list[int],
        kv_lens: list[int] | None = None,
    ) -> torch.Tensor:
        """q (N, H, D), N = sum(seg_lens); k, v (M, H, D), M = sum(kv_lens): the queries of a segment attend to its own
        keys. `kv_lens` None: as `seg_lens`; else a segment may have no queries. Returns (N, H, D). Scale D ** -0.5."""
        ...
