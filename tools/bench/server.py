"""A server for the time of a measurement, or one that is running already."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    url: str
    start_s: float | None = None  # from the process's start to the first 200 of /health; None: it ran already
    pid: int | None = None


@contextmanager
def serving(url: str | None, launch: str | None, timeout_s: float = 600) -> Iterator[Server]:
    """The server at `url`, or one started by the command `launch` on a free port and stopped by SIGTERM at the end."""
    if launch is None:
        assert url is not None
        yield Server(url.rstrip("/"))
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = shlex.split(launch)
    if command[0] == "lightvl":
        command[:1] = [sys.executable, "-m", "lightvl"]
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=subprocess.STDOUT)
        try:
            while not is_healthy(url):
                if process.poll() is not None or time.perf_counter() - started > timeout_s:
                    output.seek(0)
                    raise RuntimeError(f"the server did not start:\n{output.read()[-4000:]}")
                time.sleep(0.02)
            yield Server(url, time.perf_counter() - started, process.pid)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
