"""A device without a model: tokens are a hash of (prompt, choice, position), completions are late and out of order."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightvl.core import Delta, Finish, Prompt, PromptImage, SamplingParams
from lightvl.engine.device import StepResult
from lightvl.engine.engine import Engine
from lightvl.engine.watchdog import Watchdog
from lightvl.metrics import Metrics
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.plan import StepOutcome, StepPlan
from lightvl.scheduling.radix_cache import RadixCache
from lightvl.scheduling.scheduler import Scheduler
from lightvl.scheduling.sequence import Sequence

VOCAB = 50
PAGE_SIZE = 4


def expected_token(sequence: Sequence, position: int) -> int:
    return hash((tuple(sequence.prompt.cache_key), sequence.choice, position)) % VOCAB


class FakeDevice:
    """Two encode steps per image. `break_rows(plan)` and `break_encode(image)` may return an error."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self.plans: list[StepPlan] = []
        self.closed = False
        self.break_rows: Any = lambda plan: None
        self.break_encode: Any = lambda image: None
        self._encode_calls: dict[int, int] = {}
        self._running: list[tuple[StepPlan, asyncio.Future[StepResult]]] = []

    def submit(self, plan: StepPlan) -> asyncio.Future[StepResult]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[StepResult] = loop.create_future()
        self.plans.append(plan)
        self._check_pages(plan)
        self._running.append((plan, future))
        result = self._result(plan)
        loop.call_later(self._random.choice([0.0, 0.0005, 0.002]), lambda: future.done() or future.set_result(result))
        return future

    def _check_pages(self, plan: StepPlan) -> None:
        """No page that a step in flight may still write belongs to another request now."""
        self._running = [(earlier, future) for earlier, future in self._running if not future.done()]
        written = {
            page: row.sequence.prompt
            for earlier, _ in self._running
            for row in earlier.rows
            for page in row.pages[row.start // PAGE_SIZE : (row.start + row.len - 1) // PAGE_SIZE + 1]
        }
        for row in plan.rows:
            for page in row.pages[: (row.start + row.len - 1) // PAGE_SIZE + 1]:
                assert written.get(page, row.sequence.prompt) is row.sequence.prompt, f"page {page} was given out"

    def _result(self, plan: StepPlan) -> StepResult:
        for key in plan.dropped_images:
            self._encode_calls.pop(key, None)
        encoded, errors = [], {}
        for work in plan.encodes:
            error = self.break_encode(work.image)
            if error is not None:
                errors[work.image.key] = error
                continue
            calls = self._encode_calls[work.image.key] = self._encode_calls.get(work.image.key, 0) + 1
            if calls == 2:
                encoded.append(work.image.key)
        rows_error = self.break_rows(plan)
        outcome = StepOutcome(tuple(encoded), tuple(errors), rows_failed=rows_error is not None, rows_s=0.001)
        tokens = []
        if rows_error is None:
            tokens = [
                (sequence, expected_token(sequence, row.start + row.len), None)
                for row in plan.rows
                for sequence in row.samples
            ]
        return StepResult(outcome, tokens, errors, rows_error)

    def close(self) -> None:
        self.closed = True


class LetterDetokenizer:
    """Token t is the letter chr(97 + t % 26), without holding anything back but a whole stop string's length."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._held = ""
        self.matched: str | None = None

    def push(self, token_id: int) -> str:
        self._held += chr(97 + token_id % 26)
        for stop in self._stop:
            if stop in self._held:
                self.matched = stop
                return self._held[: self._held.index(stop)]
        keep = max((len(stop) for stop in self._stop), default=1) - 1
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def make_prompt(token_ids: list[int], images: tuple[PromptImage, ...] = ()) -> Prompt:
    key = list(token_ids)
    for image in images:
        if image.size and image.end_row - image.first_row == image.size:
            key[image.first_row : image.end_row] = [(1 << 128) | image.key] * image.size
    return Prompt(np.array(token_ids, dtype=np.int64), key, images)


@dataclass
class Machine:
    engine: Engine
    device: FakeDevice
    scheduler: Scheduler
    pages: PagePool


def make_machine(
    *,
    num_pages: int = 64,
    max_steps_in_flight: int = 1,
    max_running: int = 8,
    seed: int = 0,
    watchdog: Watchdog | None = None,
) -> Machine:
    pages = PagePool(num_pages)
    limits = SchedulerLimits(
        page_size=PAGE_SIZE,
        max_running=max_running,
        chunk_tokens=16,
        context_len=200,
        step_budget_s=1.0,
        encode_budget_s=0.1,
        max_steps_in_flight=max_steps_in_flight,
    )
    scheduler = Scheduler(limits, pages, RadixCache(PAGE_SIZE, pages), ImageStore(64))
    device = FakeDevice(seed)
    watchdog = watchdog or Watchdog(60.0, backstop=False)
    engine = Engine(scheduler, device, lambda params: LetterDetokenizer(params.stop), Metrics(), watchdog)  # type: ignore[arg-type,return-value]
    return Machine(engine, device, scheduler, pages)


@dataclass
class Collected:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def take(self, delta: Delta) -> None:
        assert self.finish is None, "a delta after the last one"
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.finish = delta.finish


async def collect(engine: Engine, prompt: Prompt, params: SamplingParams) -> list[Collected]:
    choices = [Collected() for _ in range(params.n)]
    async for delta in engine.submit(prompt, params):
        choices[delta.choice].take(delta)
    return choices
