"""Decode steps of a fixed number of rows, for CUDA graphs: `base.FixedDecode`.

Made by `CudaAttention.fixed_decode`; captured and replayed by `engine/graphs.py`. A captured launch reads its numbers
from tensors that `load` writes before each replay; its shape, and the memory that it uses, never change.
"""

from __future__ import annotations

import torch

from lightvl.attention.base import CrossInputs, SelfInputs, StepInputs
from lightvl.attention.cuda_kernels import INT_WORKSPACE_BYTES, FixedKernel, HeadLayout, SlotWriter
from lightvl.attention.cuda_plan import cross_decode_rows, padded_decode_rows
from lightvl.attention.store import PagesFirstStore


class FixedMemory:
    """What the decode steps of all batch sizes share, since one is loaded and run before the next is loaded. Self and
    cross attention of one step are planned at the same time, so each has its own."""

    def __init__(self, max_rows: int, max_row_pages: int, num_cross_pages: int, workspace: torch.Tensor) -> None:
        def ints(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int32, device=workspace.device)

        def int_workspace() -> torch.Tensor:
            return torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=workspace.device)

        self.workspace = workspace
        self.self_buffer, self.self_ints = ints(2 * max_rows + 1 + max_rows * max_row_pages), int_workspace()
        self.cross_buffer, self.cross_ints = ints(2 * max_rows + 1 + max_rows * num_cross_pages), int_workspace()


class CudaFixedDecode:
    def __init__(
        self,
        num_rows: int,
        heads: HeadLayout,
        pages: PagesFirstStore,
        cross_pages: PagesFirstStore | None,
        memory: FixedMemory,
        writer: SlotWriter,
        *,
        multi_axis_positions: bool,
    ) -> None:
        """`pages` have a scratch page. `cross_pages` None: without cross attention."""
        device = pages.keys.device

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.num_rows = num_rows
        self._pages, self._cross_pages, self._writer = pages, cross_pages, writer
        self._scratch_page = pages.num_pages
        self._scratch_slot = self._scratch_page * pages.page_len
        self._targets = writer.targets(ints(num_rows).fill_(self._scratch_slot))
        self._sees_image = torch.zeros(num_rows, 1, dtype=heads.dtype, device=device)
        self.inputs = StepInputs(
            token_ids=ints(num_rows),
            positions=ints(3, num_rows) if multi_axis_positions else ints(num_rows),
            self_attention=SelfInputs([], [], self._targets.slots, torch.empty(0, 0)),
            cross=None if cross_pages is None else CrossInputs([], self._sees_image),
            logits_idx=torch.arange(num_rows, device=device),
        )
        self._num_loaded = 0  # rows that are no padding
        self._self_kernel = FixedKernel(
            heads, pages.page_len, num_rows, memory.workspace, memory.self_ints, memory.self_buffer
        )
        self._cross_kernel: FixedKernel | None = None
        if cross_pages is not None:
            self._cross_kernel = FixedKernel(
                heads, cross_pages.page_len, num_rows, memory.workspace, memory.cross_ints, memory.cross_buffer
            )

    def load(self, inputs: StepInputs | None) -> None:
        rows = SelfInputs([], [], self._targets.slots[:0], torch.empty(0, 0))
        num_loaded = 0 if inputs is None else len(inputs.self_attention.kv_lens)
        assert num_loaded <= self.num_rows, "the step has more rows than this was made for"
        self._pad(num_loaded)
        if inputs is not None:
            rows = inputs.self_attention
            assert len(rows.slots) == num_loaded, "every row has one token"
            self.inputs.token_ids[:num_loaded].copy_(inputs.token_ids)
            self.inputs.positions[..., :num_loaded].copy_(inputs.positions)
            self._targets.slots[:num_loaded].copy_(rows.slots)  # to int32
        kv_lens, page_table, page_len = rows.kv_lens, rows.page_table.numpy(), self._pages.page_len
        self._self_kernel.plan(padded_decode_rows(kv_lens, page_table, page_len, self.num_rows, self._scratch_page))
        self._load_cross(None if inputs is None else inputs.cross)

    def _pad(self, num_loaded: int) -> None:
        """Rows that held a sequence before and do not now."""
        stale = slice(num_loaded, self._num_loaded)
        if num_loaded < self._num_loaded:
            self.inputs.token_ids[stale].zero_()
            self.inputs.positions[..., stale].zero_()
            self._targets.slots[stale].fill_(self._scratch_slot)
        self._num_loaded = num_loaded

    def _load_cross(self, cross: CrossInputs | None) -> None:
        if self._cross_kernel is None or self._cross_pages is None:
            assert cross is None, "made without cross attention"
            return
        self._sees_image.zero_()
        if cross is not None:
            self._sees_image[: len(cross.sees_image)].copy_(cross.sees_image)
        spans = [] if cross is None else cross.spans
        self._cross_kernel.plan(cross_decode_rows(spans, self.num_rows, self._cross_pages.page_len))

    def paged_rows(self, inputs: StepInputs) -> None:
        """Layers are not computed by one kernel."""

    def attend(
        self, layer_idx: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: StepInputs
    ) -> torch.Tensor:
        """`layer_idx` counts the self-attention layers only."""
        assert inputs is self.inputs
        self._writer.write(k, v, self._pages.slots[layer_idx], self._targets)
        return self._self_kernel.run(q, self._pages.layers[layer_idx]).flatten(1)

    def cross_attend(self, cross_idx: int, q: torch.Tensor, inputs: StepInputs) -> torch.Tensor:
        assert inputs is self.inputs and self._cross_kernel is not None and self._cross_pages is not None
        return self._cross_kernel.run(q, self._cross_pages.layers[cross_idx]).flatten(1)
