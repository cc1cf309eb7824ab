"""A step as the scheduler chose it: plain frozen data that the lane thread may read while the scheduler goes on.

Lists reachable from a row (`pages`, the sequence's `output_ids`) are append-only while a step may read them."""

from __future__ import annotations

from dataclasses import dataclass

from lightvl.core import PromptImage
from lightvl.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class EncodeWork:
    """Go on with the encode of one image. `cross_pages` is where its cross K,V go; empty for replacing features."""

    image: PromptImage
    cross_pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CrossView:
    """Rows `first_row <= row < end_row` of the row's sequence see the K,V in these cross pages."""

    first_row: int
    end_row: int
    cross_pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Compute `len` tokens of a sequence from index `start`; a decode row has len 1.

    `samples`: the sequences whose next token is drawn from the logits of the last of these tokens: none inside a
    prompt, the sequence itself at the end, all choices of a request after their common prefill (those that still wait
    for it have slot -1: their token goes to the host only).
    Token indices >= `num_known` are not known to the host yet: they are the last token sampled for
    `slot` and are read from the device.
    """

    sequence: Sequence
    start: int
    len: int
    pages: list[int]  # page i holds tokens [i * page_size, (i + 1) * page_size)
    num_known: int
    slot: int = -1  # the sequence's slot when this was planned (the sequence may lose its own while the step runs)
    samples: tuple[Sequence, ...] = ()
    images: tuple[PromptImage, ...] = ()  # replacing images that overlap these tokens; their features are ready
    cross: tuple[CrossView, ...] = ()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """In this order: drop, copy, encode (until the budget is spent; at least one unit), compute the rows, sample."""

    step_id: int
    rows: tuple[Row, ...] = ()
    encodes: tuple[EncodeWork, ...] = ()
    encode_budget_s: float = 0.0
    dropped_images: tuple[int, ...] = ()  # image keys whose features (or unfinished encodes) are forgotten
    page_copies: tuple[tuple[int, int], ...] = ()  # (from, to): a fork's partial last page

    @property
    def num_tokens(self) -> int:
        return sum(row.len for row in self.rows)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What the scheduler must know of a completed step. Sampled tokens go to the engine, which appends them."""

    encoded: tuple[int, ...] = ()  # image keys that became ready
    failed: tuple[int, ...] = ()  # image keys whose encode raised; the engine ends the sequences that need them
    encode_s: float = 0.0
    rows_s: float = 0.0
    rows_failed: bool = False  # the rows raised: nothing that they wrote counts; the engine ends their sequences
