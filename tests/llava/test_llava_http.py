"""LLaVA checkpoints over HTTP, with plain OpenAI messages: the same answer as the engine's (which test_llava_parity.py
holds against HF), streaming and not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from llava_helpers import LlavaOracle, Turns
from parity_helpers import ask, assert_same, data_url, noise_image, serving
from tiny_llava import ROWS

from lightvl.config import ServerConfig
from lightvl.metrics import Metrics
from lightvl.server.app import bind, make_runner
from lightvl.server.service import Context

GetOracle = Callable[[str], LlavaOracle]
TURNS: Turns = [("user", ["First:", (57, 43, 1), "second:", (40, 130, 2), "third:", (200, 31, 3), "Compare."])]


def content(turns: Turns) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(noise_image(*part))}}
        for part in turns[0][1]
    ]


async def check_over_http(oracle: LlavaOracle) -> None:
    body = {"messages": [{"role": "user", "content": content(TURNS)}], "max_tokens": 12, "temperature": 0}
    async with serving(oracle, chunked_prefill_size=37) as service:
        want = (await ask(service, TURNS))[0]
        assert_same(oracle, TURNS, want)
        runner = make_runner(Context(service, ServerConfig(), Metrics()))
        await runner.setup()
        (sock,) = bind("127.0.0.1", 0)
        await web.SockSite(runner, sock).start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/v1/chat/completions"
        try:
            async with aiohttp.ClientSession() as session:
                async with session.post(url, json=body | {"logprobs": True}) as response:
                    assert response.status == 200, await response.text()
                    reply = await response.json()
                async with session.post(url, json=body | {"stream": True}) as response:
                    events = (await response.text()).strip().split("\n\n")
        finally:
            await runner.cleanup()
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == want.text
    assert want.finish is not None and reply["usage"]["prompt_tokens"] == want.finish.prompt_tokens
    told = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert told == pytest.approx([entry.logprob for entry in want.logprobs], abs=1e-4)
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces) == want.text


@pytest.mark.parametrize("name", ROWS)
async def test_every_row_over_http(oracle_of: GetOracle, name: str) -> None:
    await check_over_http(oracle_of(name))
