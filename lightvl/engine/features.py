"""Encodes on the lane: images that wait together are encoded together, as jobs; finished features, by image key.

Which images are held, and when they are dropped, is the scheduler's decision (`ImageStore`); this is only the storage,
and the choice of who shares a job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lightvl.attention.base import AttentionBackend, EncoderAttention
from lightvl.attention.transfer import to_device
from lightvl.models.family import Encoding
from lightvl.models.model import Model
from lightvl.scheduling.plan import EncodeWork

logger = logging.getLogger(__name__)

JOB_PATCHES = {"cpu": 256, "cuda": 16384}
"""Most patches of a job of several images. On a CPU a real tower gains nothing beyond (tools/LOG.md: 8 images of 16
patches are 1.8 times faster together, of 64 1.2 times, of 256 not at all), and the first image would wait for the last.
"""


@dataclass(slots=True)
class Advanced:
    """What a step did, by image key. `ended`: () bool each, whether the features are finite: only the device knows
    until the step has completed."""

    ended: dict[int, torch.Tensor] = field(default_factory=dict)
    errors: dict[int, Exception] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Job:
    """One run of the tower. `waiting`: the images that it still has to give, by their place in it."""

    encoding: Encoding
    waiting: dict[int, EncodeWork]
    is_shared: bool


class FeatureStore:
    def __init__(self, model: Model, attention: AttentionBackend, encoder_attention: EncoderAttention) -> None:
        self._model = model
        self._attention = attention
        self._encoder_attention = encoder_attention
        self._job_patches = JOB_PATCHES[model.device.type]
        # On a GPU a job's pieces are launched faster than they run: a pause would only keep its memory.
        self._pauses = model.device.type == "cpu"
        self._pixels: dict[int, torch.Tensor] = {}  # of images that are in no job yet
        self._jobs: dict[int, _Job] = {}  # by the key of each image that waits in it
        self._alone: set[int] = set()  # images of a broken job: one of them broke it, so they share none
        self._ended: set[int] = set()  # well or not; a step planned before it was known may name them again
        self._ready: dict[int, torch.Tensor] = {}

    def __getitem__(self, image_key: int) -> torch.Tensor:
        """(num_tokens, hidden) features that replace rows."""
        return self._ready[image_key]

    def drop(self, image_keys: Sequence[int]) -> None:
        """Forget these images; others of their jobs go on."""
        for key in image_keys:
            self._ready.pop(key, None)
            self._pixels.pop(key, None)
            self._ended.discard(key)
            self._alone.discard(key)
            job = self._jobs.pop(key, None)
            if job is not None:
                job.waiting = {idx: work for idx, work in job.waiting.items() if work.image.key != key}

    def advance(self, works: Sequence[EncodeWork], budget_s: float) -> Advanced:
        """Work through `works` in order until the budget is spent, at least one piece."""
        advanced = Advanced()
        deadline = time.perf_counter() + budget_s
        for work in works:
            while work.image.key not in self._ended:
                job = self._jobs.get(work.image.key) or self._begin(work, works, deadline, advanced.errors)
                if job is not None:
                    self._continue(job, deadline, advanced)
                if time.perf_counter() >= deadline:
                    return advanced
        return advanced

    def _begin(
        self, first: EncodeWork, works: Sequence[EncodeWork], deadline: float, errors: dict[int, Exception]
    ) -> _Job | None:
        """A job of the `first` image and of those behind it that are in none, as far as they fit. None where the
        deadline came before their pixels, or where no pixels could be made."""
        chosen: list[EncodeWork] = []
        num_patches = 0
        for work in works[works.index(first) :]:
            key = work.image.key
            if key in self._ended or key in self._jobs:
                continue
            if chosen and (key in self._alone or chosen[0].image.key in self._alone):
                break
            if key not in self._pixels:
                try:
                    self._pixels[key] = work.image.media.pixels()
                except Exception as error:
                    self._ended.add(key)
                    errors[key] = error
                    continue
                if time.perf_counter() >= deadline:
                    return None
            num_patches += self._pixels[key].shape[:-1].numel()
            if chosen and num_patches > self._job_patches:
                break
            chosen.append(work)
        if not chosen:
            return None
        device = self._model.device
        images = [(to_device(self._pixels.pop(work.image.key), device), work.image.media.layout) for work in chosen]
        encoding = self._model.family.encode(images, self._encoder_attention)
        job = _Job(encoding, dict(enumerate(chosen)), is_shared=len(chosen) > 1)
        self._jobs.update((work.image.key, job) for work in chosen)
        return job

    def _continue(self, job: _Job, deadline: float, advanced: Advanced) -> None:
        """Until it has given all that is waited for, or the deadline."""
        try:
            for done in job.encoding:
                if done:
                    self._take(job, done, advanced)
                if not job.waiting or (self._pauses and time.perf_counter() >= deadline):
                    return
            raise RuntimeError("an encode ended without features")
        except Exception as error:
            keys = [work.image.key for work in job.waiting.values()]
            for key in keys:
                del self._jobs[key]
            if job.is_shared:
                logger.warning("encoding %d images together failed; each is tried alone", len(keys), exc_info=error)
                self._alone.update(keys)
            else:
                self._ended.update(keys)
                advanced.errors.update(dict.fromkeys(keys, error))

    def _take(self, job: _Job, done: dict[int, torch.Tensor], advanced: Advanced) -> None:
        """Keep the features of images that were not dropped meanwhile. A bad image fails alone."""
        for idx, features in done.items():
            work = job.waiting.pop(idx, None)
            if work is None:
                continue
            key = work.image.key
            del self._jobs[key]
            self._ended.add(key)
            try:
                if work.cross_pages:
                    self._model.decoder.write_cross(features, work.cross_pages, self._attention)
                else:
                    # a part of a shared tensor would keep the whole alive
                    is_part = features.untyped_storage().nbytes() > features.nbytes
                    self._ready[key] = features.clone() if is_part else features
                advanced.ended[key] = features.isfinite().all()
            except Exception as error:
                advanced.errors[key] = error
