"""A streaming client that notes when each piece of an answer came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    """Times are of time.perf_counter(). A piece is one event with new text or logprobs: one token, or a few."""

    sent: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.times[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]

    @property
    def seconds_per_token(self) -> float:
        """After the first one."""
        return (self.times[-1] - self.times[0]) / max(1, self.completion_tokens - 1)


def open_session() -> aiohttp.ClientSession:
    """Any number of connections, no limit on time but the caller's own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        read_bufsize=1 << 20,
    )


async def ask(
    session: aiohttp.ClientSession,
    url: str,
    body: dict[str, Any],
    on_piece: Callable[[float], None] | None = None,
) -> Answer:
    """Stream one chat completion. RuntimeError with the server's words if it fails. `on_piece` is told each time."""
    data = json.dumps(body).encode()
    answer = Answer(sent=time.perf_counter())
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/chat/completions", data=data, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                return answer
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if event.get("usage"):
                answer.prompt_tokens = event["usage"]["prompt_tokens"]
                answer.completion_tokens = event["usage"]["completion_tokens"]
                answer.cached_tokens = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            for choice in event["choices"]:
                text = choice["delta"].get("content")
                # An answer of control tokens only has no text; its end is then its one piece.
                if text or choice.get("logprobs") or (choice.get("finish_reason") and not answer.times):
                    answer.text += text or ""
                    answer.times.append(now)
                    if on_piece is not None:
                        on_piece(now)
    raise RuntimeError("the stream ended without [DONE]")


async def ask_all(
    session: aiohttp.ClientSession,
    url: str,
    bodies: Iterable[Callable[[], dict[str, Any]]],
    concurrency: int,
    on_answer: Callable[[Answer], None] = lambda answer: None,
) -> list[Answer]:
    """`concurrency` requests at a time until all are answered. Bodies are made ahead of their turn, in a thread, so
    that encoding an image is not measured."""
    queue = iter(bodies)
    answers: list[Answer] = []

    async def worker() -> None:
        upcoming = _prepare(queue)
        while (body := await upcoming) is not None:
            upcoming = _prepare(queue)
            answer = await ask(session, url, body)
            answers.append(answer)
            on_answer(answer)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(worker())
    return answers


def _prepare(queue: Any) -> Awaitable[dict[str, Any] | None]:
    make = next(queue, None)
    return asyncio.get_running_loop().run_in_executor(None, make if make is not None else lambda: None)


async def words_per_token(session: aiohttp.ClientSession, url: str) -> float:
    """How many words of `workload.random_words` make one token of the served model."""
    from bench.workload import chat_body, random_words

    short, long = [
        (await ask(session, url, chat_body(random_words(n, f"calibrate {n}"), max_tokens=1))).prompt_tokens
        for n in (20, 220)
    ]
    return 200 / max(1, long - short)
