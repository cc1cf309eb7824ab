"""Does a stream ever stall? Sixteen streams run while a long prompt prefills and while a large image is encoded.

    python tools/check_pauses.py --launch lightvl
    python tools/check_pauses.py --url http://127.0.0.1:30000 --max-pause 1.5

Three phases: quiet (streams only), prompt, image. For each: the longest pause between two tokens of any stream, and how
/health answers meanwhile. Prints JSON; exits 1 over a limit, `--max-pause` seconds or `--max-health-ms` (p99).
The streams ask for logprobs, so that a token shows even while its text is held back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from bench.client import ask, open_session, words_per_token
from bench.server import serving
from bench.summary import percentile, rounded
from bench.workload import chat_body, random_jpeg, random_words
from tqdm import tqdm


class Stream:
    """One client that always has a request running; `times` are those of its tokens, None where a new request began."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.times: list[float | None] = []

    async def run(self, session: aiohttp.ClientSession, url: str, max_tokens: int) -> None:
        turn = 0
        while True:
            text = random_words(8, f"stream {time.time_ns()} {self.number} {turn}")
            body = chat_body(text, max_tokens=max_tokens, logprobs=True)
            await ask(session, url, body, on_piece=self.times.append)
            self.times.append(None)
            turn += 1

    def longest_pause(self, begin: float, end: float) -> float:
        """Of the pauses that touch begin..end; the last token so far counts as followed by one at the end."""
        longest = 0.0
        for earlier, later in zip(self.times, [*self.times[1:], end], strict=True):
            if earlier is not None and later is not None and later > begin and earlier < end:
                longest = max(longest, later - earlier)
        return longest


async def poll_health(session: aiohttp.ClientSession, url: str, latencies: list[float]) -> None:
    while True:
        start = time.perf_counter()
        async with session.get(f"{url}/health") as response:
            await response.read()
            if response.status != 200:
                raise RuntimeError(f"/health answered {response.status}")
        latencies.append(1e3 * (time.perf_counter() - start))
        await asyncio.sleep(0.01)


@asynccontextmanager
async def background(*work: Awaitable[None]) -> AsyncIterator[list[asyncio.Task[None]]]:
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    async with open_session() as session:
        words = await words_per_token(session, url)
        long_prompt = random_words(round(args.prompt_len * words), f"prompt {time.time_ns()}")
        jpeg = random_jpeg(*args.image_size, f"image {time.time_ns()}")
        streams = [Stream(number) for number in range(args.streams)]
        async with background(*(stream.run(session, url, args.stream_len) for stream in streams)) as tasks:
            while not all(len(stream.times) > 4 for stream in streams):
                await asyncio.sleep(0.05)
                _raise_failed(tasks)
            phases: dict[str, Any] = {}
            for name, body in (
                ("quiet", None),
                ("prompt", chat_body(long_prompt, max_tokens=1)),
                ("image", chat_body("What is this?", max_tokens=1, jpeg=jpeg)),
            ):
                phases[name] = await phase(session, url, streams, body, args.health_calls)
                _raise_failed(tasks)
    return phases


async def phase(
    session: aiohttp.ClientSession, url: str, streams: list[Stream], body: dict[str, Any] | None, health_calls: int
) -> dict[str, Any]:
    """Send the body, then wait for its answer and for enough calls of /health."""
    latencies: list[float] = []
    begin = time.perf_counter()
    async with background(poll_health(session, url, latencies)) as tasks:
        answer = await ask(session, url, body) if body is not None else None
        answered = time.perf_counter()
        while len(latencies) < health_calls:
            await asyncio.sleep(0.02)
            _raise_failed(tasks)
    end = answered if body is not None else time.perf_counter()
    pauses = [stream.longest_pause(begin, end) for stream in streams]
    tokens = sum(begin < at <= end for stream in streams for at in stream.times if at is not None)
    return {
        "seconds": end - begin,
        "prompt_tokens": answer.prompt_tokens if answer is not None else None,
        "max_pause_s": max(pauses),
        "pauses_s": sorted(pauses),
        "stream_tok_s": tokens / (end - begin),
        "health_calls": len(latencies),
        "health_ms_p50": percentile(latencies, 50),
        "health_ms_p99": percentile(latencies, 99),
        "health_ms_max": max(latencies),
    }


def _raise_failed(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a running server")
    where.add_argument("--launch", help='command that starts a server, such as "lightvl --model-path DIR"')
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--stream-len", type=int, default=2000, help="tokens of a stream before it asks anew")
    parser.add_argument("--prompt-len", type=int, default=8000, help="tokens of the long prompt, about")
    parser.add_argument("--image-size", default="4000x3000", metavar="WxH")
    parser.add_argument("--health-calls", type=int, default=200, help="in each phase, at least")
    parser.add_argument("--max-pause", type=float, default=0.3, help="seconds")
    parser.add_argument("--max-health-ms", type=float, default=20)
    args = parser.parse_args()
    width, height = args.image_size.lower().split("x")
    args.image_size = (int(width), int(height))
    with serving(args.url, args.launch) as server, tqdm(total=1, desc="measuring") as bar:
        phases = asyncio.run(measure(server.url, args))
        bar.update()
    too_long = [name for name, numbers in phases.items() if numbers["max_pause_s"] > args.max_pause]
    too_slow = [name for name, numbers in phases.items() if numbers["health_ms_p99"] > args.max_health_ms]
    verdict = {"ok": not too_long and not too_slow, "paused_too_long": too_long, "health_too_slow": too_slow}
    print(json.dumps(rounded({**verdict, "phases": phases})))
    return 0 if verdict["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
