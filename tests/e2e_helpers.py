"""The real command in a process of its own, and how the tests talk to it."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from PIL import Image

READY = re.compile(r"LightVL serves (\S+) at (http://\S+) ")
START_LIMIT_S = 90  # on a busy machine; what a quiet one does is in tools/LOG.md


@dataclass
class Running:
    process: subprocess.Popen[str]
    url: str
    model: str
    greeting: str

    def metric(self, name: str) -> float:
        text = requests.get(f"{self.url}/metrics", timeout=10).text
        return float(re.search(rf"^lightvl:{name} (\S+)$", text, re.M)[1])  # type: ignore[index]


def launch(*flags: str) -> Running:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lightvl", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    said, deadline = "", time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        said += line
        found = READY.search(line)
        if found:
            while not said.endswith("\nEND\n"):
                said += process.stdout.readline()
            return Running(process, found[2], found[1], said)
        if process.poll() is not None:
            break
    process.kill()
    raise AssertionError(f"the server did not start: {said}")


def end(running: Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(timeout=40) == 0
    assert running.process.stdout is not None
    running.process.stdout.close()


def chat(running: Running, content: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    body = {"model": running.model, "messages": [{"role": "user", "content": content}], "max_tokens": 20, **fields}
    response = requests.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def image_part(source: str | Path | bytes | Image.Image) -> dict[str, Any]:
    """Of a URL or base64, a file, a file's content or pixels."""
    if isinstance(source, Image.Image):
        packed = io.BytesIO()
        source.save(packed, "PNG")
        source = packed.getvalue()
    elif isinstance(source, Path):
        source = source.read_bytes()
    if isinstance(source, bytes):
        source = base64.b64encode(source).decode()
    return {"type": "image_url", "image_url": {"url": source}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def says(running: Running, *content: dict[str, Any]) -> str:
    """The answer to one message, greedy."""
    text: str = chat(running, list(content), temperature=0, max_tokens=96)["choices"][0]["message"]["content"]
    return text
