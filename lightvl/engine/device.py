"""The device seam: where steps run. The loop submits a plan and awaits its result; it never polls and never blocks.

A device owns the one lane thread, and with it all torch work. Knows neither torch nor what a step does: `Runner` brings
that. Tests put a fake device here that delays and reorders completions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from lightvl.core import TokenLogprob
from lightvl.scheduling.plan import StepOutcome, StepPlan
from lightvl.scheduling.sequence import Sequence

Launched = TypeVar("Launched")
Result = TypeVar("Result")


@dataclass(slots=True)
class StepResult:
    """What a step did. `tokens` follows the plan's rows and their samples in order."""

    outcome: StepOutcome
    tokens: list[tuple[Sequence, int, TokenLogprob | None]] = field(default_factory=list)
    encode_errors: dict[int, Exception] = field(default_factory=dict)  # by image key
    rows_error: Exception | None = None  # the rows were not computed; their sequences cannot go on


class DeviceLost(Exception):
    """The device answers no more: every later step would fail too, so the process must be started again."""


class Device(Protocol):
    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        """Run the plan after all plans submitted before it. Called on the loop. The future raises `DeviceLost`, or what
        broke this step alone."""
        ...

    def close(self) -> None:
        """Wait for the steps that are running and end the lane."""
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


class CudaDevice(Generic[Launched]):
    """Two threads: the lane launches, which does not wait for the device; the other sleeps until a launched step has
    completed and reads it back, so that the lane can launch the next one meanwhile. Both take steps in order.

    `enter` runs first on the lane (the current device and stream are per thread). `launch` and `read_back` are given by
    `connect`, since the lane must have measured the memory before there is a runner.
    """

    def __init__(self, enter: Callable[[], None]) -> None:
        self._lane = ThreadPoolExecutor(1, thread_name_prefix="lightvl-lane", initializer=enter)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lightvl-reader", initializer=enter)
        self._launch: Callable[[StepPlan], Launched] | None = None
        self._read_back: Callable[[Launched], StepResult] | None = None

    def connect(self, launch: Callable[[StepPlan], Launched], read_back: Callable[[Launched], StepResult]) -> None:
        self._launch, self._read_back = launch, read_back

    def call(self, work: Callable[[], Result]) -> Result:
        """Run `work` on the lane and wait for it: for the start, before there is a loop."""
        return self._lane.submit(work).result()

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        assert self._launch is not None, "connect() comes first"
        launched = self._lane.submit(self._launch, plan)
        # Queued now, in the order of submission; the reader waits first for the launch, then for the device.
        return asyncio.get_running_loop().run_in_executor(self._reader, self._complete, launched)

    def _complete(self, launched: Future[Launched]) -> StepResult:
        assert self._read_back is not None
        return self._read_back(launched.result())

    def close(self) -> None:
        self._lane.shutdown(wait=True)  # what was submitted is read back below, so it must be launched
        self._reader.shutdown(wait=True, cancel_futures=True)
