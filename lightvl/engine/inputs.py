"""A plan's rows as tensors: the one place where token ids, positions, slots, page tables, cross spans and feature
rows of a step are built. Called on the lane thread by the runner; all index arithmetic is numpy on the host."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import CrossInputs, CrossSpan, FeatureRows, SelfInputs, StepInputs
from lightvl.engine.features import FeatureStore
from lightvl.engine.sampler import SampleRow
from lightvl.scheduling.plan import Row
from lightvl.scheduling.sequence import Sequence

Int64Array = np.ndarray[Any, np.dtype[np.int64]]


class PageTable:
    """The pages of every running sequence as one host array, (max_running, max_pages) int64, brought up to date by
    the pages that are new since the last step, so that a decode step does not walk all pages again."""

    def __init__(self, max_running: int, max_pages: int) -> None:
        self.max_running = max_running
        self._table = np.zeros((max_running, max_pages), dtype=np.int64)
        self._owners: list[list[int] | None] = [None] * max_running  # the list itself: its identity tells a new owner
        self._filled = [0] * max_running

    def rows(self, rows: Seq[Row], num_pages: Seq[int]) -> Int64Array:
        """(R, max(num_pages)) int64. Entries past a row's own pages are stale but in range."""
        slots = np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            slot = slots[i] = row.slot
            if self._owners[slot] is not row.pages:
                self._owners[slot], self._filled[slot] = row.pages, 0
            filled, wanted = self._filled[slot], num_pages[i]
            if wanted > filled:
                self._table[slot, filled:wanted] = row.pages[filled:wanted]
                self._filled[slot] = wanted
        return self._table[slots, : max(num_pages)]


def build_inputs(
    rows: Seq[Row],
    *,
    page_table: PageTable,
    page_size: int,
    features: FeatureStore,
    last_tokens: torch.Tensor,
    multi_axis_positions: bool,
    dtype: torch.dtype,
) -> tuple[StepInputs, list[SampleRow]]:
    """Rows in plan order. `last_tokens` (max_running,) int64 on the device gives tokens that the host does not know
    yet. The SampleRows match `logits_idx`."""
    device = last_tokens.device
    q_lens = [row.len for row in rows]
    kv_lens = [row.start + row.len for row in rows]
    token_ids = np.concatenate([_token_ids(row) for row in rows])
    positions = np.concatenate([_positions(row, multi_axis_positions) for row in rows], axis=-1)
    slots = np.concatenate([_slots(row, page_size) for row in rows])
    pages = page_table.rows(rows, [-(-kv_len // page_size) for kv_len in kv_lens])
    starts = np.cumsum([0, *q_lens])

    ids = torch.from_numpy(token_ids).to(device)
    unknown = [
        (i, row.slot) for i, row in zip(starts[1:] - 1, rows, strict=True) if row.start + row.len > row.num_known
    ]
    if unknown:
        at, slot = torch.tensor(unknown, dtype=torch.int64, device=device).T
        ids[at] = last_tokens[slot]

    logits_idx: list[int] = []
    sample_rows: list[SampleRow] = []
    for end, row in zip(starts[1:], rows, strict=True):
        for sequence in row.samples:
            logits_idx.append(int(end) - 1)
            sample_rows.append(_sample_row(sequence, row.start + row.len))

    inputs = StepInputs(
        token_ids=ids,
        positions=torch.from_numpy(positions).to(device),
        self_attention=SelfInputs(
            q_lens=q_lens,
            kv_lens=kv_lens,
            slots=torch.from_numpy(slots).to(device),
            page_table=torch.from_numpy(pages).to(device),
        ),
        cross=_cross_inputs(rows, starts, device, dtype),
        features=_feature_rows(rows, starts, features),
        logits_idx=torch.tensor(logits_idx, dtype=torch.int64, device=device) if logits_idx else None,
    )
    return inputs, sample_rows


def _token_ids(row: Row) -> Int64Array:
    prompt_ids = row.sequence.prompt.token_ids
    end = row.start + row.len
    if end <= len(prompt_ids):
        return prompt_ids[row.start : end]
    output_ids = row.sequence.output_ids
    outputs = output_ids[max(0, row.start - len(prompt_ids)) : min(end, row.num_known) - len(prompt_ids)]
    ids = np.zeros(row.len, dtype=np.int64)  # a token not known yet stays 0 and is put in on the device
    num_prompt = max(0, len(prompt_ids) - row.start)
    ids[:num_prompt] = prompt_ids[row.start :]
    ids[num_prompt : num_prompt + len(outputs)] = outputs
    return ids


def _positions(row: Row, multi_axis: bool) -> Int64Array:
    prompt = row.sequence.prompt
    index = np.arange(row.start, row.start + row.len)
    if not multi_axis:
        return index
    positions = np.broadcast_to(index + prompt.rope_delta, (3, row.len))
    if prompt.positions is None or row.start >= len(prompt):
        return positions
    num_prompt = min(row.len, len(prompt) - row.start)
    return np.concatenate([prompt.positions[:, row.start : row.start + num_prompt], positions[:, num_prompt:]], axis=1)


def _slots(row: Row, page_size: int) -> Int64Array:
    first_page = row.start // page_size
    if row.len == 1:
        return np.array([row.pages[first_page] * page_size + row.start % page_size])
    index = np.arange(row.start, row.start + row.len)
    pages = np.array(row.pages[first_page : (row.start + row.len - 1) // page_size + 1])
    slots: Int64Array = pages[index // page_size - first_page] * page_size + index % page_size
    return slots


def _cross_inputs(rows: Seq[Row], starts: Int64Array, device: torch.device, dtype: torch.dtype) -> CrossInputs | None:
    spans = []
    sees_image = np.zeros((int(starts[-1]), 1), dtype=np.float32)
    for offset, row in zip(starts, rows, strict=False):
        for view in row.cross:
            first = int(offset) + max(view.first_row, row.start) - row.start
            end = int(offset) + min(view.end_row, row.start + row.len) - row.start
            spans.append(CrossSpan(first, end, view.cross_pages))
            sees_image[first:end] = 1
    if not spans:
        return None
    return CrossInputs(spans=spans, sees_image=torch.from_numpy(sees_image).to(device, dtype))


def _feature_rows(rows: Seq[Row], starts: Int64Array, features: FeatureStore) -> list[FeatureRows]:
    placed = []
    for offset, row in zip(starts, rows, strict=False):
        for image in row.images:
            first = max(image.first_row, row.start)
            end = min(image.end_row, row.start + row.len)
            image_rows = features[image.key][first - image.first_row : end - image.first_row]
            placed.append(FeatureRows(start=int(offset) + first - row.start, rows=image_rows))
    return placed


def _sample_row(sequence: Sequence, position: int) -> SampleRow:
    seen = None
    if sequence.params.repetition_penalty != 1.0:
        seen = np.concatenate([sequence.prompt.token_ids, np.array(sequence.output_ids, dtype=np.int64)])
    return SampleRow(params=sequence.params, choice=sequence.choice, position=position, seen=seen)
