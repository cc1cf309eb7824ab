"""A plan's rows as tensors: the one place where token ids, positions, slots, page tables, cross spans and feature
rows of a step are built. Called on the lane thread by the runner; all index arithmetic is numpy on the host, and what
goes to the device goes there without waiting."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import CrossInputs, CrossSpan, FeatureRows, SelfInputs, StepInputs
from lightvl.attention.transfer import to_device
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


@dataclass(slots=True)
class HostInputs:
    """T tokens of R rows, in plan order, on the host. `samples` tells for each sampled sequence what the sampler must
    know, `sample_of` which of the L logits it is drawn from: choices of one request are drawn from the same."""

    q_lens: list[int]  # (R,)
    kv_lens: list[int]  # (R,)
    token_ids: Int64Array  # (T,); 0 where the host does not know it yet
    positions: Int64Array  # (T,), or (3, T) for M-RoPE
    slots: Int64Array  # (T,)
    pages: Int64Array  # (R, P)
    logits_idx: list[int]  # (L,) tokens
    unknown: Int64Array  # (2, U): tokens that the host does not know, and the slots whose last token they are
    spans: list[CrossSpan]
    features: list[FeatureRows]
    samples: list[SampleRow]  # (S,)
    sample_of: list[int]  # (S,)

    def to_device(self, last_tokens: torch.Tensor, dtype: torch.dtype) -> StepInputs:
        """`last_tokens` (max_running,) int64 on the device gives what the host does not know."""
        device = last_tokens.device
        logits_idx = np.array(self.logits_idx, dtype=np.int64)
        token_ids, positions, slots, wanted, unknown = _send(
            (self.token_ids, self.positions, self.slots, logits_idx, self.unknown), device
        )
        if self.unknown.size:
            token_ids.index_copy_(0, unknown[0], last_tokens.index_select(0, unknown[1]))
        cross = None
        if self.spans:
            sees_image = torch.zeros(len(slots), 1)
            for span in self.spans:
                sees_image[span.q_start : span.q_end] = 1
            cross = CrossInputs(spans=self.spans, sees_image=to_device(sees_image.to(dtype), device))
        pages = torch.from_numpy(self.pages)
        return StepInputs(
            token_ids=token_ids,
            positions=positions,
            self_attention=SelfInputs(q_lens=self.q_lens, kv_lens=self.kv_lens, slots=slots, page_table=pages),
            cross=cross,
            features=self.features,
            logits_idx=wanted if self.logits_idx else None,
            best_only=all(row.params.needs_best_only for row in self.samples),
        )


def build_inputs(
    rows: Seq[Row], *, page_table: PageTable, page_size: int, features: FeatureStore, multi_axis_positions: bool
) -> HostInputs:
    q_lens = [row.len for row in rows]
    kv_lens = [row.start + row.len for row in rows]
    starts = np.cumsum([0, *q_lens])
    unknown = [
        (end - 1, row.slot) for end, row in zip(starts[1:], rows, strict=True) if row.start + row.len > row.num_known
    ]
    logits_idx: list[int] = []
    samples: list[SampleRow] = []
    sample_of: list[int] = []
    for end, row in zip(starts[1:], rows, strict=True):
        if not row.samples:
            continue
        sample_of += [len(logits_idx)] * len(row.samples)
        samples += [_sample_row(sequence, row.start + row.len) for sequence in row.samples]
        logits_idx.append(int(end) - 1)
    tokens = _tokens_of_decodes if all(_is_decode(row) for row in rows) else _tokens_of_chunks
    token_ids, positions, slots = tokens(rows, page_size, multi_axis_positions)
    return HostInputs(
        q_lens=q_lens,
        kv_lens=kv_lens,
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        pages=page_table.rows(rows, [-(-kv_len // page_size) for kv_len in kv_lens]),
        logits_idx=logits_idx,
        unknown=np.array(unknown, dtype=np.int64).reshape(-1, 2).T,
        spans=_cross_spans(rows, starts),
        features=_feature_rows(rows, starts, features),
        samples=samples,
        sample_of=sample_of,
    )


def _send(arrays: Seq[Int64Array], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in their shapes, by one copy: a step has half a dozen small ones, and each copy costs
    as much as a kernel."""
    begins = [0, *np.cumsum([_aligned(array.size) for array in arrays])]
    whole = np.zeros(begins[-1], dtype=np.int64)
    for begin, array in zip(begins, arrays, strict=False):
        whole[begin : begin + array.size] = array.reshape(-1)
    sent = to_device(torch.from_numpy(whole), device)
    return [sent[begin : begin + array.size].view(array.shape) for begin, array in zip(begins, arrays, strict=False)]


def _aligned(size: int) -> int:
    """Up to whole cache lines of 128 bytes: kernels read in vectors."""
    return -(-size // 16) * 16


def _is_decode(row: Row) -> bool:
    return row.len == 1 and row.start >= len(row.sequence.prompt)


_Tokens = tuple[Int64Array, Int64Array, Int64Array]  # ids, positions and slots, as HostInputs has them


def _tokens_of_decodes(rows: Seq[Row], page_size: int, multi_axis: bool) -> _Tokens:
    """As below, for rows of one generated token each: without arrays per row inputs of 256 are built in a third of the
    time."""
    ids = np.array([_generated_id(row) for row in rows], dtype=np.int64)
    index = np.array([row.start for row in rows])
    positions = index
    if multi_axis:
        positions = np.broadcast_to(index + [row.sequence.prompt.rope_delta for row in rows], (3, len(rows)))
    pages = np.array([row.pages[row.start // page_size] for row in rows])
    return ids, positions, pages * page_size + index % page_size


def _generated_id(row: Row) -> int:
    """0 where the host does not know it yet."""
    output_ids, prompt_len = row.sequence.output_ids, len(row.sequence.prompt)
    return output_ids[row.start - prompt_len] if row.start < row.num_known else 0


def _tokens_of_chunks(rows: Seq[Row], page_size: int, multi_axis: bool) -> _Tokens:
    return (
        np.concatenate([_token_ids(row) for row in rows]),
        np.concatenate([_positions(row, multi_axis) for row in rows], axis=-1),
        np.concatenate([_slots(row, page_size) for row in rows]),
    )


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


def _cross_spans(rows: Seq[Row], starts: Int64Array) -> list[CrossSpan]:
    spans = []
    for offset, row in zip(starts, rows, strict=False):
        for view in row.cross:
            first = int(offset) + max(view.first_row, row.start) - row.start
            end = int(offset) + min(view.end_row, row.start + row.len) - row.start
            spans.append(CrossSpan(first, end, view.cross_pages))
    return spans


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
    if sequence.params.needs_history:
        seen = np.concatenate([sequence.prompt.token_ids, np.array(sequence.output_ids, dtype=np.int64)])
    return SampleRow(sequence.params, sequence.choice, position, seen, len(sequence.prompt), sequence.matcher)
