"""What a part of the check tells: one row per check, as soon as it is known. Used inside a part's own process.

A part is `run(context)`; it calls `context.check(name, body)` for each of its checks, in an order that never depends on
results, so that a part whose process died can be taken up after the check that killed it.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skip", "told"]
"""told: a number without a bound. skip: not checked, for the reason in `note`; it counts as not passed."""

MARK = "\x1e"
"""Begins the lines of a part's stdout that are meant for the parent: MARK + JSON."""
DEVICE_LOST = 75
"""Exit status of a part whose device answers no more."""


@dataclass
class Row:
    part: str
    check: str
    verdict: Verdict = "pass"
    value: float | None = None
    unit: str = ""
    goal: str = ""
    note: str = ""
    seconds: float = 0.0

    def at_most(self, value: float, bound: float, unit: str = "") -> None:
        self._bounded(value, value <= bound, f"<= {bound:.3g}", unit)

    def at_least(self, value: float, bound: float, unit: str = "") -> None:
        self._bounded(value, value >= bound, f">= {bound:.3g}", unit)

    def tell(self, value: float, unit: str = "") -> None:
        self.value, self.unit, self.verdict = value, unit, "told"

    def skip(self, why: str) -> None:
        self.verdict, self.note = "skip", why

    def _bounded(self, value: float, holds: bool, goal: str, unit: str) -> None:
        self.value, self.unit, self.goal = value, unit, goal
        self.verdict = "pass" if holds and math.isfinite(value) else "fail"


Body = Callable[[Row], Coroutine[Any, Any, None] | None]


class Context:
    """`device`: "cuda", or "cpu" for a dry run over tiny shapes. `emit` gets what the parent is told."""

    def __init__(
        self,
        part: str,
        device: str,
        seconds: float,
        emit: Callable[[dict[str, Any]], None],
        after: str | None = None,
        *,
        profiles: bool = False,
    ) -> None:
        """`after`: go on behind this check, which an earlier process of the part has begun. `profiles`: tell in the log
        what took the time."""
        self.part, self.device, self.profiles = part, device, profiles
        self._deadline = time.monotonic() + seconds
        self._emit = emit
        self._after = after

    @property
    def is_dry(self) -> bool:
        return self.device == "cpu"

    @property
    def seconds_left(self) -> float:
        return self._deadline - time.monotonic()

    def check(self, name: str, body: Body, *, seconds: float = 1.0) -> None:
        """Run `body`, which fills in the row (as it stands, it passes); what it raises fails the row only. Skipped
        when fewer than `seconds` are left. Ends the process where the device is lost."""
        if self._after is not None:
            self._after = None if name == self._after else self._after
            return
        row = Row(self.part, name)
        self._emit({"begin": name})
        started = time.monotonic()
        if self.seconds_left < seconds and not self.is_dry:
            row.skip("no time left")
        else:
            try:
                waiting = body(row)
                if waiting is not None:
                    asyncio.run(waiting)
            except Exception as error:
                traceback.print_exc()
                row.verdict, row.note = "fail", first_line(error)
        row.seconds = time.monotonic() - started
        self._emit({"row": asdict(row)})
        if row.verdict == "fail" and not self.is_dry and not device_answers():
            sys.exit(DEVICE_LOST)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]


def device_answers() -> bool:
    """An illegal access breaks the whole CUDA context: every later call fails with the same error."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def emit_line(message: dict[str, Any]) -> None:
    print(MARK + json.dumps(message), flush=True)
