"""Part 8: the HTTP server on this device, as a client sees it: how fast under `tools/bench_serve.py`, and the embedded
model's answers under `tools/eval_demo.py`, as many of them right as from a server on this machine's CPU.

The tools run as processes of their own, as a user starts them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.server import Server, serving

from gpu.rows import Context, Row

ROOT = Path(__file__).parents[2]
LAUNCH = "lightvl --dtype bfloat16 --device {device} --log-level warning"
NUM_CASES, DRY_CASES = 400, 6
FIRST_CASE = 100_000  # eval_demo's default: held out, and never looked at
POINTS = 1.0
WORKLOADS: tuple[tuple[str, ...], ...] = (("text", "1"), ("text", "8"), ("text", "64"), ("image", "1"), ("image", "16"))


def run(context: Context) -> None:
    # started from the checkout, so that it need not be installed
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with ExitStack() as ends:
        servers = Servers(context, ends)
        context.check("start", servers.start, seconds=10)
        for workload, clients in WORKLOADS[:1] if context.is_dry else WORKLOADS:
            context.check(
                f"{workload}, {clients} at a time",
                lambda row, workload=workload, clients=clients: _bench(
                    context, servers.of(context.device), workload, clients, row
                ),
                seconds=6,
            )
        context.check("answers are as right as a CPU's", lambda row: _evaluate(context, servers, row), seconds=15)


class Servers:
    """One per device, started when first needed and ended with the part."""

    def __init__(self, context: Context, ends: ExitStack) -> None:
        self._context, self._ends = context, ends
        self._servers: dict[str, Server] = {}

    def of(self, device: str) -> Server:
        if device not in self._servers:
            launch = LAUNCH.format(device=device)
            timeout_s = 120 if self._context.is_dry else max(5.0, self._context.seconds_left)
            self._servers[device] = self._ends.enter_context(serving(None, launch, timeout_s))
        return self._servers[device]

    def start(self, row: Row) -> None:
        server = self.of(self._context.device)
        assert server.start_s is not None
        row.tell(server.start_s, "s")


def _bench(context: Context, server: Server, workload: str, clients: str, row: Row) -> None:
    command = ["bench_serve.py", "--url", server.url, "--workloads", workload, "--concurrency", clients]
    command += ["--input-len", "128", "--output-len", "8" if context.is_dry else "128"]
    # the embedded model shrinks images to 336 x 336
    numbers = _tool(context, *command, "--image-size", "336x336")["rows"][0]
    row.tell(numbers["output_tok_s"], "tokens/s")
    row.note = (
        f"first token {numbers['ttft_ms_p50']:.0f} ms, p99 {numbers['ttft_ms_p99']:.0f}; "
        f"then {numbers['itl_ms_p50']:.1f}, p99 {numbers['itl_ms_p99']:.1f}"
    )


def _evaluate(context: Context, servers: Servers, row: Row) -> None:
    """How many points of a hundred lie between this device and the CPU, over the same questions."""
    if context.is_dry:  # one server and few questions: the code runs, the number is nought
        percents = [_percent(context, servers.of("cpu"))] * 2
    else:
        percents = [_percent(context, servers.of(device)) for device in (context.device, "cpu")]
    row.at_most(abs(percents[0] - percents[1]), POINTS, "points")
    row.note = f"{percents[0]:.1f}% of {NUM_CASES} here, {percents[1]:.1f}% on the CPU"


def _percent(context: Context, server: Server) -> float:
    cases = str(DRY_CASES if context.is_dry else NUM_CASES)
    command = ["eval_demo.py", "--url", server.url, "--cases", cases, "--first", str(FIRST_CASE), "--concurrency", "16"]
    numbers = _tool(context, *command, "--photographs", "0", "--goal", "0", "--decline-goal", "0")
    assert numbers["errors"] == 0, f"{numbers['errors']} requests failed"
    return float(numbers["percent"])


def _tool(context: Context, name: str, *args: str) -> dict[str, Any]:
    """The JSON of a tool's last line. What it says goes to the log."""
    command = [sys.executable, str(ROOT / "tools" / name), *args]
    limit = 300 if context.is_dry else max(1.0, context.seconds_left)
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    print(f"-- {' '.join(command)}\n{done.stdout}{done.stderr}", flush=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with status {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
    numbers: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return numbers
