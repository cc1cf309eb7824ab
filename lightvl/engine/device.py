"""The device seam: where steps run. The loop submits a plan and awaits its result; it never polls and never blocks.

`CpuDevice` owns the one lane thread, and with it all torch work. Tests put a fake device here that delays completions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from lightvl.core import TokenLogprob
from lightvl.scheduling.plan import StepOutcome, StepPlan
from lightvl.scheduling.sequence import Sequence


@dataclass(slots=True)
class StepResult:
    """What a step did. `tokens` follows the plan's rows and their samples in order."""

    outcome: StepOutcome
    tokens: list[tuple[Sequence, int, TokenLogprob | None]] = field(default_factory=list)
    encode_errors: dict[int, Exception] = field(default_factory=dict)  # by image key
    rows_error: Exception | None = None  # the rows were not computed; their sequences cannot go on


class Device(Protocol):
    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Run the plan after all plans submitted before it. Called on the loop."""
        ...

    def close(self) -> None:
        """Wait for the step that is running and end the lane."""
        ...


class CpuDevice:
    """Runs steps one after the other on a thread of its own (inference mode and thread count are per thread)."""

    def __init__(self, run: Callable[[StepPlan], StepResult]) -> None:
        self._run = run
        self._lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lightvl-lane")

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        return asyncio.get_running_loop().run_in_executor(self._lane, self._run, plan)

    def close(self) -> None:
        self._lane.shutdown(wait=True, cancel_futures=True)
