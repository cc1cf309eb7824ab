"""Which graph takes which step, and in which order they are captured; a decoder that adds, in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightvl.attention.base import CrossInputs, CrossSpan, FeatureRows, SelfInputs, StepInputs
from lightvl.engine.graphs import DecodeGraphs, batch_sizes

VOCAB = 5


class Fixed:
    def __init__(self, num_rows: int, with_cross: bool) -> None:
        self.num_rows, self.with_cross = num_rows, with_cross
        self.inputs = steps([0] * num_rows)
        self.loaded: list[int | None] = []

    def load(self, inputs: StepInputs | None) -> None:
        self.loaded.append(None if inputs is None else len(inputs.token_ids))
        self.inputs.token_ids.zero_()
        if inputs is not None:
            self.inputs.token_ids[: len(inputs.token_ids)] = inputs.token_ids


def steps(token_ids: list[int], cross: bool = False, **changes: Any) -> StepInputs:
    num = len(token_ids)
    given: dict[str, Any] = {
        "token_ids": torch.tensor(token_ids),
        "positions": torch.zeros(num, dtype=torch.int64),
        "self_attention": SelfInputs([1] * num, [1] * num, torch.zeros(num, dtype=torch.int64), torch.zeros(num, 1)),
        "cross": CrossInputs([CrossSpan(0, 1, (0,))], torch.ones(num, 1)) if cross else None,
        "logits_idx": torch.arange(num),
    }
    return StepInputs(**given | changes)


class Recorder:
    """Made for one pool; the graphs know when they were captured, and computing under capture is seen."""

    def __init__(self) -> None:
        self.fixed: list[Fixed] = []
        self.replayed: list[int] = []
        self.num_forwards = 0
        self.is_capturing = False

    def fixed_decode(self, num_rows: int, *, with_cross: bool, multi_axis_positions: bool) -> Fixed:
        self.fixed.append(Fixed(num_rows, with_cross))
        return self.fixed[-1]

    def forward(self, inputs: StepInputs, attention: Any) -> torch.Tensor:
        self.num_forwards += 1
        return (inputs.token_ids[:, None] + torch.arange(VOCAB)).float()

    def make_graph(self) -> Any:
        number = len(self.fixed) - 1
        recorded: list[Callable[[], None]] = []

        def replay() -> None:
            self.replayed.append(number)
            recorded[0]()

        return SimpleNamespace(capture=recorded.append, replay=replay)


def make_graphs(sizes: list[int], cross_layers: tuple[int, ...] = ()) -> tuple[DecodeGraphs, Recorder]:
    recorder = Recorder()
    config = SimpleNamespace(vocab_size=VOCAB, cross_layers=cross_layers, mrope_section=None)
    model: Any = SimpleNamespace(config=config, dtype=torch.float32, device=torch.device("cpu"), decoder=recorder)
    attention: Any = recorder
    return DecodeGraphs(model, attention, sizes, recorder.make_graph, lambda: 0), recorder


def test_largest_first_each_warmed_up_by_padding_before_it_is_captured() -> None:
    graphs, recorder = make_graphs([1, 2, 4], cross_layers=(3,))
    assert [(fixed.num_rows, fixed.with_cross) for fixed in recorder.fixed] == [
        (4, True),
        (4, False),
        (2, True),
        (2, False),
        (1, True),
        (1, False),
    ]
    assert graphs.num_captured == 6 and recorder.num_forwards == 6
    assert all(fixed.loaded == [None] for fixed in recorder.fixed)


@pytest.mark.parametrize("num_rows, size", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
@pytest.mark.parametrize("cross", [False, True])
def test_the_smallest_that_holds_a_step_takes_it(num_rows: int, size: int, cross: bool) -> None:
    graphs, recorder = make_graphs([1, 2, 4, 8], cross_layers=(3,))
    inputs = steps(list(range(10, 10 + num_rows)), cross)
    assert graphs.takes(inputs)
    logits = graphs.forward(inputs)
    assert logits.tolist() == [[10.0 + i + j for j in range(VOCAB)] for i in range(num_rows)]
    used = recorder.fixed[recorder.replayed[-1]]
    assert (used.num_rows, used.with_cross, used.loaded) == (size, cross, [None, num_rows])


def test_steps_that_are_no_decode_are_left_alone() -> None:
    graphs, _ = make_graphs([1, 2, 4])
    assert not graphs.takes(steps([1] * 5))
    assert not graphs.takes(steps([1, 2], logits_idx=None))
    assert not graphs.takes(steps([1, 2], logits_idx=torch.tensor([1])))
    assert not graphs.takes(steps([1, 2], features=[FeatureRows(0, torch.ones(1, 4))]))
    two_tokens = SelfInputs([2], [2], torch.zeros(2, dtype=torch.int64), torch.zeros(1, 1))
    assert not graphs.takes(steps([1, 2], self_attention=two_tokens))


@given(most=st.integers(1, 1024))
def test_batch_sizes_are_close_where_a_row_costs_most(most: int) -> None:
    sizes = batch_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    assert all(after <= max(2 * before, 8) and after - before <= 64 for before, after in pairwise(sizes))
    assert len(sizes) <= 32
