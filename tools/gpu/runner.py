"""Runs the parts, each in a process of its own, so that what breaks the device, hangs or crashes takes down its own
check only. Every row is written as soon as it is known."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gpu.report import line, write_json
from gpu.rows import DEVICE_LOST, MARK, Row

BUDGETS_S = {
    "kernels": 15,
    "sampling": 10,
    "attention": 50,
    "families": 80,
    "graphs": 70,
    "speed": 120,
    "memory": 45,
    "server": 80,
}
"""Of each part; what one leaves over, later ones may use. Together under 8 minutes."""
DRY_FACTOR = 6  # a CPU is slow, and nobody pays for it by the minute
MAX_DEATHS = 3  # of one part; then it is given up


@dataclass
class Run:
    """`parts` in the order of BUDGETS_S; `tool` is the script that runs one part when called with --child."""

    tool: Path
    parts: list[str]
    device: str
    out: Path
    machine: dict[str, Any]
    budgets_s: dict[str, float] = field(default_factory=lambda: dict(BUDGETS_S))
    patience: float = 1.0  # times the budgets
    flags: tuple[str, ...] = ()  # for the tool, beside --child and what goes with it
    rows: list[Row] = field(default_factory=list)
    told: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each part: seconds, and how it ended

    def run(self) -> list[Row]:
        self.out.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        until = started
        with (self.out / "gpu_check.log").open("w") as log:
            for part in self.parts:
                until += self.budgets_s[part] * self.patience * (DRY_FACTOR if self.device == "cpu" else 1)
                began = time.monotonic()
                ended = self._part(part, until, log)
                self.told[part] = {"seconds": time.monotonic() - began, "ended": ended}
                self._save()
        return self.rows

    def _part(self, part: str, until: float, log: IO[str]) -> str:
        after: str | None = None
        for _ in range(MAX_DEATHS):
            process = PartProcess(self.tool, part, self.device, until, after, self.flags, log, self._add)
            code = process.wait(until)
            if code == 0:
                return "complete"
            if process.running is not None:  # it died within a check
                why = "killed: over its time" if code is None else f"the process died ({_told(code)})"
                self._add(Row(part, process.running, "fail", note=why))
            elif code != DEVICE_LOST:
                self._add(Row(part, "the part itself", "fail", note=f"ended early ({_told(code)}); see the log"))
            if code is None or process.last is None or process.last == after:
                break
            after = process.last
        return "incomplete"

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        self._save()

    def _save(self) -> None:
        write_json(self.out / "gpu_check.json", self.machine, self.told, self.rows)


class PartProcess:
    """One process; its rows go to `add` as they come, everything else to the log."""

    def __init__(
        self,
        tool: Path,
        part: str,
        device: str,
        until: float,
        after: str | None,
        flags: tuple[str, ...],
        log: IO[str],
        add: Callable[[Row], None],
    ) -> None:
        self.running: str | None = None  # the check that has begun and not ended
        self.last: str | None = None  # the last one that has begun
        self._log, self._add = log, add
        # a clock that the child reads too: what it takes to load torch is part of its time
        until_epoch = time.time() + until - time.monotonic()
        command = [
            sys.executable,
            str(tool),
            "--child",
            part,
            "--device",
            device,
            "--until",
            f"{until_epoch:.1f}",
            *flags,
        ]
        if after is not None:
            command += ["--after", after]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        log.write(f"== {' '.join(command)}\n")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # so that its children die with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            self._lines.put(text)
        self._lines.put(None)

    def wait(self, until: float) -> int | None:
        """Until it has ended: its exit status. None: it was killed, because its time was up."""
        try:
            while (text := self._lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                self._take(text)
            code: int | None = self._process.wait(timeout=max(1.0, until - time.monotonic()))
        except (queue.Empty, subprocess.TimeoutExpired):
            code = None
        self._kill()
        while not self._lines.empty():  # what it said before it was killed
            text = self._lines.get()
            if text is not None:
                self._take(text)
        return code

    def _take(self, text: str) -> None:
        if not text.startswith(MARK):
            self._log.write(text)
            self._log.flush()
            return
        message = json.loads(text[len(MARK) :])
        if "begin" in message:
            self.running = self.last = message["begin"]
        else:
            self.running = None
            self._add(Row(**message["row"]))

    def _kill(self) -> None:
        """The process and all that it started and left."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()


def _told(code: int | None) -> str:
    if code is None:
        return "over its time"
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
