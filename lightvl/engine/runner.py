"""Runs a plan on the lane thread: drop, copy, encode, compute rows, sample; and reads its results back when the device
has come so far. Knows no requests and no stops; an error is returned with the part that it belongs to, so that one
image or step cannot take others down.

`launch` never waits for the device: on CUDA the next step is launched before this one's tokens are read back.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import AttentionBackend, EncoderAttention
from lightvl.attention.transfer import to_device
from lightvl.core import TokenLogprob
from lightvl.engine.device import DeviceLost, StepResult
from lightvl.engine.features import FeatureStore
from lightvl.engine.graphs import DecodeGraphs
from lightvl.engine.inputs import HostInputs, PageTable, build_inputs
from lightvl.engine.sampler import Sampled, SampleRow, fetch, sample, to_host
from lightvl.engine.stream import Stream
from lightvl.errors import Overloaded
from lightvl.models.model import Model
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.plan import Row, StepOutcome, StepPlan
from lightvl.scheduling.sequence import Sequence


@dataclass(slots=True)
class LaunchedStep:
    """What `read_back` needs. Tensors are on the host, and hold their values once `end` has been waited for."""

    plan: StepPlan
    begin: Any
    encode_end: Any = None
    end: Any = None
    encoded: list[int] = field(default_factory=list)  # image keys
    is_finite: torch.Tensor | None = None  # (len(encoded),) bool
    encode_errors: dict[int, Exception] = field(default_factory=dict)
    sampled: list[tuple[Sampled, list[SampleRow]]] = field(default_factory=list)
    rows_error: Exception | None = None


class Runner:
    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        features: FeatureStore,
        page_table: PageTable,
        page_size: int,
        stream: Stream,
        graphs: DecodeGraphs | None = None,
    ) -> None:
        self._model = model
        self._attention = attention
        self._features = features
        self._page_table = page_table
        self._page_size = page_size
        self._stream = stream
        self._graphs = graphs
        self._last_tokens = torch.zeros(page_table.max_running, dtype=torch.int64, device=model.device)

    def run(self, plan: StepPlan) -> StepResult:
        return self.read_back(self.launch(plan))

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Raises DeviceLost."""
        stream = self._stream
        self._features.drop(plan.dropped_images)
        step = LaunchedStep(plan, begin=stream.mark())
        if plan.encodes:
            self._encode(plan, step)
        step.encode_end = stream.mark()
        try:
            if plan.page_copies:
                self._attention.copy_pages(plan.page_copies)
            if plan.rows:
                self._compute(plan.rows, step)
        except DeviceLost:
            raise
        except Exception as error:
            step.rows_error, step.sampled = _told(error), []
        step.end = stream.mark()
        return step

    @torch.inference_mode()
    def read_back(self, step: LaunchedStep) -> StepResult:
        """Waits for the device. May be called on another thread, while later steps are launched. Raises DeviceLost."""
        self._stream.wait(step.end)
        errors = dict(step.encode_errors)
        if step.is_finite is not None:
            for key, is_finite in zip(step.encoded, step.is_finite.tolist(), strict=True):  # sync: none, on the host
                if not is_finite:
                    errors[key] = ArithmeticError("the features of an image are not finite")
        outcome = StepOutcome(
            encoded=tuple(key for key in step.encoded if key not in errors),
            failed=tuple(errors),
            rows_failed=step.rows_error is not None,
            encode_s=self._stream.seconds(step.begin, step.encode_end),
            rows_s=self._stream.seconds(step.encode_end, step.end),
        )
        results = [result for sampled, samples in step.sampled for result in to_host(sampled, samples)]
        tokens: list[tuple[Sequence, int, TokenLogprob | None]] = []
        if step.rows_error is None:
            sequences = [sequence for row in step.plan.rows for sequence in row.samples]
            tokens = [(sequence, *result) for sequence, result in zip(sequences, results, strict=True)]
        return StepResult(outcome, tokens, errors, step.rows_error)

    def _encode(self, plan: StepPlan, step: LaunchedStep) -> None:
        try:
            advanced = self._features.advance(plan.encodes, plan.encode_budget_s)
            step.encode_errors = {key: _told(error) for key, error in advanced.errors.items()}
            if advanced.ended:
                step.is_finite = self._stream.to_host(torch.stack(list(advanced.ended.values())))
                step.encoded = list(advanced.ended)
        except Exception as error:  # no image's own: all of the step's are given up
            step.encode_errors = dict.fromkeys((work.image.key for work in plan.encodes), _told(error))

    def _compute(self, rows: tuple[Row, ...], step: LaunchedStep) -> None:
        host = build_inputs(
            rows,
            page_table=self._page_table,
            page_size=self._page_size,
            features=self._features,
            multi_axis_positions=self._model.config.mrope_section is not None,
        )
        inputs = host.to_device(self._last_tokens, self._model.dtype)
        logits: torch.Tensor | None
        if self._graphs is not None and self._graphs.takes(inputs):
            logits = self._graphs.forward(inputs)
        else:
            logits = self._model.forward(inputs, self._attention)
        if logits is None:
            return
        blocks = self._sample(logits, host)
        self._remember_last_tokens(rows, [sampled for sampled, _ in blocks])
        step.sampled = [(fetch(sampled, self._stream), samples) for sampled, samples in blocks]

    def _sample(self, logits: torch.Tensor, host: HostInputs) -> list[tuple[Sampled, list[SampleRow]]]:
        """Choices of one request share their logits. They are drawn in blocks, so that any number of them takes no more
        memory than the most rows that a step can have."""
        samples = host.samples
        if len(samples) == len(logits):
            return [(sample(logits.float(), samples), samples)]
        blocks = []
        for start in range(0, len(samples), self._page_table.max_running):
            block = slice(start, start + self._page_table.max_running)
            idx = to_device(torch.tensor(host.sample_of[block]), logits.device)
            blocks.append((sample(logits.index_select(0, idx).float(), samples[block]), samples[block]))
        return blocks

    def _remember_last_tokens(self, rows: tuple[Row, ...], sampled: list[Sampled]) -> None:
        """For the next step in flight, which is launched before these tokens are read back."""
        slots, sampled_idx, idx = [], [], 0
        for row in rows:
            if row.sequence in row.samples:
                slots.append(row.slot)
                sampled_idx.append(idx + row.samples.index(row.sequence))
            idx += len(row.samples)
        if not slots:
            return
        token_ids = sampled[0].token_ids if len(sampled) == 1 else torch.cat([part.token_ids for part in sampled])
        at, which = to_device(torch.from_numpy(np.array([slots, sampled_idx])), token_ids.device)
        # a broken row's sequence ends; until that is known, its next step must get an id that exists
        self._last_tokens.index_copy_(0, at, token_ids.index_select(0, which).clamp_min_(0))


def make_runner(
    model: Model,
    attention: AttentionBackend,
    encoder_attention: EncoderAttention,
    limits: SchedulerLimits,
    stream: Stream,
    graphs: DecodeGraphs | None = None,
) -> Runner:
    features = FeatureStore(model, attention, encoder_attention)
    page_table = PageTable(limits.max_running, -(-limits.context_len // limits.page_size))
    return Runner(model, attention, features, page_table, limits.page_size, stream, graphs)


def _told(error: Exception) -> Exception:
    """Out of memory is told as trouble that passes. What was being computed then is let go at once: the error outlives
    the step in logs, and the frames in its trace hold tensors."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "DefaultCPUAllocator" not in str(error):
        return error
    traceback.clear_frames(error.__traceback__)
    told = Overloaded("The device has run out of memory on this request; try again later, or send less at once.")
    told.__cause__ = error
    return told
