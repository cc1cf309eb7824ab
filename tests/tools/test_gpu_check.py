"""The frame of tools/gpu_check.py: parts as processes that may crash, hang or lose their device; rows and tables.
What the parts check is run dry, on the CPU, by test_gpu_check_parts.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu import report, runner
from gpu.rows import Context, Row
from gpu.runner import BUDGETS_S, Run

ROOT = Path(__file__).parents[2]
FAKE = f"""
import argparse, os, signal, sys, time
sys.path.insert(0, {str(ROOT / "tools")!r})
import gpu.rows
from gpu.rows import Context, emit_line
parser = argparse.ArgumentParser()
for flag in ("--child", "--device", "--until", "--after"):
    parser.add_argument(flag)
parser.add_argument("--profile", action="store_true")
args = parser.parse_args()
gpu.rows.device_answers = lambda: False
context = Context(args.child, "cuda", float(args.until) - time.time(), emit_line, args.after)
def fails(row):
    raise ValueError("broken\\nsecond line")
def dies(row):
    print("last words")
    os.kill(os.getpid(), signal.SIGSEGV)
context.check("fine", lambda row: row.at_most(1, 2, "ms"))
if args.profile:
    context.check("profiled", lambda row: None)
    sys.exit()
if args.child == "kernels":
    context.check("device lost", fails)
    context.check("dies", dies)
    context.check("after that", lambda row: row.tell(3.5))
    context.check("too long", lambda row: None, seconds=1e6)
else:
    context.check("hangs", lambda row: time.sleep(60))
    context.check("never", lambda row: None)
"""


def of(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.check, row.verdict) for row in rows]


def test_flags_reach_the_part(tmp_path: Path) -> None:
    tool = tmp_path / "fake.py"
    tool.write_text(FAKE)
    run = Run(tool, ["kernels"], "cuda", tmp_path / "out", {"gpu": "none"}, flags=("--profile",))
    assert of(run.run()) == [("fine", "pass"), ("profiled", "pass")]


def test_a_part_goes_on_after_the_check_that_broke_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = tmp_path / "fake.py"
    tool.write_text(FAKE)
    budgets = dict.fromkeys(BUDGETS_S, 20.0) | {"attention": 1.5}
    run = Run(tool, ["attention"], "cuda", tmp_path / "out", {"gpu": "none"}, {**budgets})
    assert of(run.run()) == [("fine", "pass"), ("hangs", "fail")]
    assert run.rows[1].note == "killed: over its time"
    assert run.told["attention"]["ended"] == "incomplete"

    run = Run(tool, ["kernels"], "cuda", tmp_path / "out", {"gpu": "none"}, budgets)
    assert of(run.run()) == [
        ("fine", "pass"),
        ("device lost", "fail"),
        ("dies", "fail"),
        ("after that", "told"),
        ("too long", "skip"),
    ]
    assert run.rows[1].note == "ValueError: broken" and "SIGSEGV" in run.rows[2].note
    assert run.told["kernels"]["ended"] == "complete"
    log = (tmp_path / "out/gpu_check.log").read_text()
    assert "last words" in log and "second line" in log and log.count("== ") == 3
    written = report.read_rows(tmp_path / "out/gpu_check.json")
    assert of(written) == of(run.rows)
    assert "device lost" in capsys.readouterr().out


def test_patience_gives_each_part_as_many_times_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[float] = []

    class Done:
        def __init__(self, tool: Path, part: str, device: str, until: float, *rest: Any) -> None:
            ends.append(until)

        def wait(self, until: float) -> int:
            return 0

    monkeypatch.setattr(runner, "PartProcess", Done)
    for patience in (1.0, 2.5):
        Run(Path("tool"), ["kernels", "sampling"], "cuda", tmp_path, {}, patience=patience).run()
    assert ends[1] - ends[0] == pytest.approx(BUDGETS_S["sampling"])
    assert ends[3] - ends[2] == pytest.approx(2.5 * BUDGETS_S["sampling"])


def test_every_row_is_on_disk_before_the_next_check(tmp_path: Path) -> None:
    run = Run(Path("none"), [], "cuda", tmp_path, {"gpu": "some"})
    run._add(Row("kernels", "one", value=1 / 3))
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["machine"] == {"gpu": "some"} and content["rows"][0]["value"] == 0.3333


def test_bounds_and_their_verdicts() -> None:
    row = Row("speed", "x")
    row.at_least(0.7, 0.6)
    assert (row.verdict, row.goal) == ("pass", ">= 0.6")
    row.at_most(0.7, 0.6)
    assert (row.verdict, row.goal) == ("fail", "<= 0.6")
    row.at_most(float("nan"), 1)
    assert row.verdict == "fail"
    row.at_least(float("inf"), 1)
    assert row.verdict == "fail"


def test_what_a_body_raises_fails_its_row_only() -> None:
    told: list[dict[str, Any]] = []
    context = Context("speed", "cpu", 0.0, told.append)

    async def waits(row: Row) -> None:
        row.tell(2.0, "s")

    def fails(row: Row) -> None:
        row.at_most(0, 1)
        raise AssertionError

    context.check("waits", waits)
    context.check("fails", fails)
    assert [message["row"]["verdict"] for message in told if "row" in message] == ["told", "fail"]
    assert [message["begin"] for message in told if "begin" in message] == ["waits", "fails"]


def test_two_runs_side_by_side() -> None:
    old = [
        Row("speed", "a", value=2.0),
        Row("speed", "b", "fail", 1.0),
        Row("server", "gone", value=5),
        Row("x", "same"),
    ]
    new = [Row("speed", "a", value=3.0), Row("speed", "b", "pass", 0.0), Row("speed", "new"), Row("x", "same")]
    lines = [text.split() for text in report.compare(old, new).splitlines()[1:]]
    assert lines == [
        ["speed", "a", "2", "3", "1.500"],
        ["speed", "b", "1", "0", "0.000", "fail", "->", "pass"],
        ["speed", "new", "-", "->", "pass"],
        ["server", "gone", "5", "pass", "->", "-"],
    ]
    assert len(report.table(old).splitlines()) == 5


def test_many_passed_checks_become_one_line() -> None:
    rows = [Row("attention", f"case {i}", value=float(i % 25), seconds=0.5) for i in range(30)]
    rows += [Row("attention", "bad", "fail", 99.0), Row("speed", "fine", value=1.0)]
    told = report.condensed(rows)
    assert of(told) == [("bad", "fail"), ("30 more, the worst", "pass"), ("fine", "pass")]
    assert (told[1].value, told[1].note, told[1].seconds) == (24, "case 24", 15)
    assert report.condensed(rows[10:]) == rows[10:]


def test_all_parts_fit_into_eight_minutes() -> None:
    assert sum(BUDGETS_S.values()) <= 470
    for part in BUDGETS_S:
        assert (ROOT / f"tools/gpu/{part}.py").is_file()


def tool(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/gpu_check.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    try:
        gpu_check.find_gpu()
        pytest.skip("there is a GPU")
    except RuntimeError:
        pass
    done = tool("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "gpu_check: " in done.stderr and "--device cpu" in done.stderr
    assert not (tmp_path / "out").exists()
    done = tool("speeed")
    assert done.returncode == 2 and "no part speeed" in done.stderr


def test_a_dry_run_from_the_command_line(tmp_path: Path) -> None:
    done = tool("kernels", "--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch sees the device" in done.stdout and "all is well" in done.stdout
    rows = report.read_rows(tmp_path / "gpu_check.json")
    assert {row.part for row in rows} == {"kernels"}
    file = str(tmp_path / "gpu_check.json")
    done = tool("--compare", file, file)
    assert done.returncode == 0 and "before" in done.stdout
