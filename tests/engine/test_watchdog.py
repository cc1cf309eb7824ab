"""A step that hangs: reported, told to clients and probes, and the end of the process; and no false alarm."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_fakes import collect, make_machine, make_prompt

from lightvl.core import SamplingParams
from lightvl.engine.device import DeviceLost, StepResult
from lightvl.engine.watchdog import EXIT_STATUS, Watchdog
from lightvl.errors import Overloaded
from lightvl.scheduling.plan import StepPlan

ROOT = Path(__file__).parents[2]


def make_watchdog(timeout_s: float) -> tuple[Watchdog, threading.Event]:
    ended = threading.Event()
    return Watchdog(timeout_s, grace_s=0.01, exit_process=ended.set, backstop=False), ended


async def test_a_step_that_hangs_is_told_and_ends_the_process(capfd: pytest.CaptureFixture[str]) -> None:
    watchdog, ended = make_watchdog(0.2)
    machine = make_machine(watchdog=watchdog)
    hung: list[asyncio.Future[StepResult]] = []

    def submit(plan: StepPlan) -> asyncio.Future[StepResult]:
        hung.append(asyncio.get_running_loop().create_future())
        return hung[-1]

    machine.device.submit = submit  # type: ignore[method-assign]
    machine.engine.start()
    assert machine.engine.healthy
    with pytest.raises(Overloaded, match="does not answer"):
        await collect(machine.engine, make_prompt([1, 2]), SamplingParams(max_tokens=5))
    assert not machine.engine.healthy
    assert await asyncio.to_thread(ended.wait, 5)
    assert "Thread 0x" in capfd.readouterr().err
    with pytest.raises(Overloaded):
        machine.engine.submit(make_prompt([1]), SamplingParams(max_tokens=1))
    await machine.engine.close()


async def test_a_lost_device_ends_the_process_at_once() -> None:
    watchdog, ended = make_watchdog(3600.0)
    machine = make_machine(watchdog=watchdog)

    def submit(plan: StepPlan) -> asyncio.Future[StepResult]:
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        future.set_exception(DeviceLost("an illegal memory access"))
        return future

    machine.device.submit = submit  # type: ignore[method-assign]
    machine.engine.start()
    with pytest.raises(Overloaded):
        await collect(machine.engine, make_prompt([1, 2]), SamplingParams(max_tokens=5))
    assert await asyncio.to_thread(ended.wait, 5) and not machine.engine.healthy
    await machine.engine.close()


def test_many_short_steps_and_idle_time_are_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: a busy machine must not fail this."""
    now = [100.0]
    monkeypatch.setattr("lightvl.engine.watchdog.time", SimpleNamespace(monotonic=lambda: now[0]))
    watchdog, _ = make_watchdog(10.0)
    assert not watchdog.is_overdue()
    for _ in range(9):
        watchdog.step_began()
        now[0] += 9.0
        assert not watchdog.is_overdue()
    watchdog.idle()
    now[0] += 1000.0
    assert not watchdog.is_overdue()
    watchdog.step_began()
    now[0] += 10.1
    assert watchdog.is_overdue()


def test_the_process_ends_with_its_own_status_and_all_stacks() -> None:
    code = (
        "import threading, time\n"
        "from lightvl.engine.watchdog import Watchdog\n"
        "def hang_on_the_device(): time.sleep(60)\n"
        "threading.Thread(target=hang_on_the_device).start()\n"  # no daemon: a plain exit would wait for it
        "watchdog = Watchdog(0.2, grace_s=0.1)\n"
        "watchdog.start(); watchdog.step_began(); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == EXIT_STATUS
    assert "hang_on_the_device" in done.stderr and "--watchdog-timeout" in done.stderr
