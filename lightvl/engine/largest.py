"""The largest steps that clients can cause, as plans, so that a run at start tells what memory they take: an encode as
large as a job can be, and a prefill of as many tokens and sampled rows as a step can hold. Called by `measured.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightvl.core import Prompt, PromptImage, SamplingParams
from lightvl.models.family import Family, ImageLayout
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.plan import CrossView, EncodeWork, Row, StepPlan
from lightvl.scheduling.sequence import Sequence

PROBE_SIZES = ((16384, 16384), (16384, 8192), (8192, 16384), (16384, 1024), (1024, 16384))
SMALL_SIZES = ((512, 512),)


class AnyText:
    """A grammar, and its matcher, that every token may follow."""

    def start(self) -> AnyText:
        return self

    def allow(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        mask.fill(-1)

    def push(self, token_id: int) -> bool:
        return True


COSTLIEST = SamplingParams(max_tokens=1, top_p=0.9, repetition_penalty=1.1, grammar=AnyText(), top_logprobs=20)


def probe_layouts(family: Family, sizes: tuple[tuple[int, int], ...] = PROBE_SIZES) -> list[ImageLayout]:
    """Of images of several (width, height), large ones if not said; none for a text-only model."""
    if family.image_token_id is None:
        return []
    return [family.plan_image(width, height, num_images=1) for width, height in sizes]


@dataclass(frozen=True, slots=True)
class _Black:
    """A `Media` without a file."""

    image: torch.Tensor
    layout: ImageLayout

    def pixels(self) -> torch.Tensor:
        return self.image

    @property
    def num_patches(self) -> int:
        return self.image.shape[:-1].numel()


def largest_encodes(family: Family, job_patches: int) -> list[StepPlan]:
    """As many images as are encoded together, at least one: of the largest first, then of small ones, of which a tower
    that pads each image to full size computes more. None for a text-only model."""
    made = []
    for layout in dict.fromkeys([*probe_layouts(family), *probe_layouts(family, SMALL_SIZES)]):
        black = np.zeros((layout.height, layout.width, 3), dtype=np.uint8)
        made.append(_Black(family.preprocess(black, layout), layout))
    by_patches = sorted(made, key=lambda black: black.num_patches)
    return [_encode(media, max(1, job_patches // media.num_patches)) for media in (by_patches[-1:] + by_patches[:1])]


def _encode(media: _Black, num_images: int) -> StepPlan:
    num_pages = media.layout.num_cross_pages
    size = num_pages or media.layout.num_tokens
    # all write the same cross pages: what is in them does not matter
    works = [EncodeWork(PromptImage(key, 0, size, size, media), tuple(range(num_pages))) for key in range(num_images)]
    return StepPlan(0, encodes=tuple(works), encode_budget_s=float("inf"))


def largest_rows(limits: SchedulerLimits, num_cross_pages: int) -> StepPlan:
    """A chunk of all tokens that a step may have, by as many sequences as may run, each sampled in the costliest way,
    one of them for two choices. All of them write page 0."""
    num_tokens = min(limits.chunk_tokens, limits.context_len)
    num_rows = min(limits.max_running, num_tokens)
    rows = []
    for slot, row_len in enumerate([num_tokens - num_rows + 1] + [1] * (num_rows - 1)):
        prompt = Prompt(np.zeros(row_len, dtype=np.int64), [0] * row_len)
        sequence = Sequence(slot, prompt, COSTLIEST)
        pages = [0] * -(-row_len // limits.page_size)
        cross = (CrossView(0, row_len, tuple(range(num_cross_pages))),) if num_cross_pages else ()
        samples = (sequence,) if slot else (sequence, Sequence(num_rows, prompt, COSTLIEST, choice=1))
        rows.append(Row(sequence, 0, row_len, pages, row_len, slot, samples=samples, cross=cross))
    return StepPlan(0, rows=tuple(rows))
