"""Encodes on the lane: unfinished ones as generators, finished features as tensors, by image key.

Which images are held, and when they are dropped, is the scheduler's decision (`ImageStore`); this is only the storage.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from lightvl.attention.base import AttentionBackend, EncoderAttention
from lightvl.models.model import Model
from lightvl.scheduling.plan import EncodeWork


class FeatureStore:
    def __init__(self, model: Model, attention: AttentionBackend, encoder_attention: EncoderAttention) -> None:
        self._model = model
        self._attention = attention
        self._encoder_attention = encoder_attention
        self._jobs: dict[int, Iterator[torch.Tensor | None]] = {}
        self._ready: dict[int, torch.Tensor] = {}

    def __getitem__(self, image_key: int) -> torch.Tensor:
        """(num_tokens, hidden) features that replace rows."""
        return self._ready[image_key]

    def drop(self, image_keys: Sequence[int]) -> None:
        for key in image_keys:
            self._ready.pop(key, None)
            self._jobs.pop(key, None)

    def advance(self, works: Sequence[EncodeWork], budget_s: float) -> tuple[list[int], dict[int, Exception]]:
        """Work through `works` in order until the budget is spent, at least one piece. Returns the keys of the encodes
        that ended well and the errors of those that did not."""
        ended: list[int] = []
        errors: dict[int, Exception] = {}
        deadline = time.perf_counter() + budget_s
        for work in works:
            try:
                features = self._advance_one(work, deadline)
            except Exception as error:
                self._jobs.pop(work.image.key, None)
                errors[work.image.key] = error
                continue
            if features is None:
                break
            del self._jobs[work.image.key]
            if work.cross_pages:
                self._model.decoder.write_cross(features, work.cross_pages, self._attention)
            else:
                self._ready[work.image.key] = features
            ended.append(work.image.key)
            if time.perf_counter() >= deadline:
                break
        return ended, errors

    def _advance_one(self, work: EncodeWork, deadline: float) -> torch.Tensor | None:
        job = self._jobs.get(work.image.key)
        if job is None:
            media = work.image.media
            job = self._model.family.encode(media.pixels(), media.layout, self._encoder_attention)
            self._jobs[work.image.key] = job
        for features in job:
            if features is not None:
                if not bool(features.isfinite().all()):  # sync: once per image
                    raise ArithmeticError("the features of an image are not finite")
                return features
            if time.perf_counter() >= deadline:
                return None
        raise RuntimeError("an encode ended without features")
