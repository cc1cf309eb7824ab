"""Decode steps as CUDA graphs: one per batch size, with cross attention and without, captured at start.

Called by the runner on the lane thread. A step takes the smallest captured size that holds it, padded; a larger one is
launched kernel by kernel. What a captured step reads and writes is the backend's `FixedDecode`; a test's graph object
needs no GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from tqdm import tqdm

from lightvl.attention.base import AttentionBackend, FixedDecode, StepInputs
from lightvl.models.model import Model


class Graph(Protocol):
    def capture(self, run: Callable[[], None]) -> None:
        """Record what `run` launches. It computes nothing."""
        ...

    def replay(self) -> None:
        """Launch it again, on the current stream."""
        ...


class GraphAttention(AttentionBackend, Protocol):
    def fixed_decode(self, num_rows: int, *, with_cross: bool, multi_axis_positions: bool) -> FixedDecode: ...


@dataclass(frozen=True, slots=True)
class _Captured:
    fixed: FixedDecode
    graph: Graph


def batch_sizes(most: int) -> list[int]:
    """Ascending: close together where a row more costs most, and `most` itself."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 257, 32), *range(320, most, 64)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """`sizes`: rows of the steps to capture; `free_bytes`: told in the progress bar."""

    def __init__(
        self,
        model: Model,
        attention: GraphAttention,
        sizes: Sequence[int],
        make_graph: Callable[[], Graph],
        free_bytes: Callable[[], int],
    ) -> None:
        self._sizes = sorted(sizes)
        self._model, self._attention, self._make_graph = model, attention, make_graph
        # One for all, since a step's logits are read before the next step is launched: 80 MB for 256 rows of Qwen2-VL.
        self._logits = torch.empty(self._sizes[-1], model.config.vocab_size, dtype=model.dtype, device=model.device)
        self._captured: dict[tuple[int, bool], _Captured] = {}
        variants = (True, False) if model.config.cross_layers else (False,)
        with tqdm(total=len(sizes) * len(variants), desc="CUDA graphs", unit="graph", leave=False) as bar:
            for num_rows in reversed(self._sizes):  # largest first: the smaller ones fit into its memory
                for with_cross in variants:
                    bar.set_postfix_str(f"{num_rows} rows, {free_bytes() / 2**30:.1f} GiB free")
                    self._captured[num_rows, with_cross] = self._capture(num_rows, with_cross)
                    bar.update()

    @property
    def num_captured(self) -> int:
        return len(self._captured)

    def takes(self, inputs: StepInputs) -> bool:
        """One token per row, each with its logits, and not too many of them."""
        num_rows = len(inputs.self_attention.q_lens)
        if inputs.features or inputs.logits_idx is None or num_rows > self._sizes[-1]:
            return False
        return len(inputs.token_ids) == len(inputs.logits_idx) == num_rows

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits (rows, vocab_size), valid until the next step is launched."""
        num_rows = len(inputs.token_ids)
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        captured = self._captured[size, inputs.cross is not None]
        captured.fixed.load(inputs)
        captured.graph.replay()
        return self._logits[:num_rows]

    def _capture(self, num_rows: int, with_cross: bool) -> _Captured:
        multi_axis = self._model.config.mrope_section is not None
        fixed = self._attention.fixed_decode(num_rows, with_cross=with_cross, multi_axis_positions=multi_axis)

        def run() -> None:
            logits = self._model.decoder.forward(fixed.inputs, fixed)
            assert logits is not None
            self._logits[:num_rows].copy_(logits)

        fixed.load(None)
        run()  # what is made at the first run (kernels loaded, workspaces) must not be made under capture
        graph = self._make_graph()
        graph.capture(run)
        return _Captured(fixed, graph)
