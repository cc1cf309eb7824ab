"""Runs a plan on the lane thread: drop, copy, encode, compute rows, sample, read back. Knows no requests and no stops;
an error is returned with the part that it belongs to, so that one image or step cannot take others down."""

from __future__ import annotations

import time

import torch

from lightvl.attention.base import AttentionBackend
from lightvl.core import TokenLogprob
from lightvl.engine.device import StepResult
from lightvl.engine.features import FeatureStore
from lightvl.engine.inputs import PageTable, build_inputs
from lightvl.engine.sampler import sample, to_host
from lightvl.models.model import Model
from lightvl.scheduling.plan import Row, StepOutcome, StepPlan
from lightvl.scheduling.sequence import Sequence


class Runner:
    def __init__(
        self, model: Model, attention: AttentionBackend, features: FeatureStore, page_table: PageTable, page_size: int
    ) -> None:
        self._model = model
        self._attention = attention
        self._features = features
        self._page_table = page_table
        self._page_size = page_size
        self._last_tokens = torch.zeros(page_table.max_running, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        self._features.drop(plan.dropped_images)
        begin = time.perf_counter()
        encoded, encode_errors = self._features.advance(plan.encodes, plan.encode_budget_s)
        encode_end = time.perf_counter()
        tokens: list[tuple[Sequence, int, TokenLogprob | None]] = []
        rows_error: Exception | None = None
        try:
            if plan.page_copies:
                self._attention.copy_pages(plan.page_copies)
            if plan.rows:
                tokens = self._compute(plan.rows)
        except Exception as error:
            rows_error = error
        outcome = StepOutcome(
            encoded=tuple(encoded),
            failed=tuple(encode_errors),
            rows_failed=rows_error is not None,
            encode_s=encode_end - begin,
            rows_s=time.perf_counter() - encode_end,
        )
        return StepResult(outcome, tokens, encode_errors, rows_error)

    def _compute(self, rows: tuple[Row, ...]) -> list[tuple[Sequence, int, TokenLogprob | None]]:
        inputs, sample_rows = build_inputs(
            rows,
            page_table=self._page_table,
            page_size=self._page_size,
            features=self._features,
            last_tokens=self._last_tokens,
            multi_axis_positions=self._model.config.mrope_section is not None,
            dtype=self._model.dtype,
        )
        logits = self._model.forward(inputs, self._attention)
        if logits is None:
            return []
        sampled = sample(logits.float(), sample_rows)
        self._remember_last_tokens(rows, sampled.token_ids)
        results = to_host(sampled, sample_rows)
        sequences = [sequence for row in rows for sequence in row.samples]
        return [(sequence, *result) for sequence, result in zip(sequences, results, strict=True)]

    def _remember_last_tokens(self, rows: tuple[Row, ...], token_ids: torch.Tensor) -> None:
        """For the next step in flight, which is launched before these tokens are read back."""
        slots, sampled_idx, idx = [], [], 0
        for row in rows:
            if row.sequence in row.samples:
                slots.append(row.slot)
                sampled_idx.append(idx + row.samples.index(row.sequence))
            idx += len(row.samples)
        if slots:
            self._last_tokens[slots] = token_ids[sampled_idx]
