"""What the HTTP tests hold in their hands: a running server and short ways to ask it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
from server_fakes import FakeService

from lightvl.server.service import Context


@dataclass
class Running:
    """A server on a free port with the fake service behind it."""

    service: FakeService
    context: Context
    port: int
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def post(self, path: str, body: Any = None, **kwargs: Any) -> tuple[int, Any]:
        if body is not None:
            kwargs["json"] = body
        async with self.session.post(self.url + path, **kwargs) as response:
            return response.status, await response.json()

    async def chat(self, text: str = "Hello", **fields: Any) -> tuple[int, Any]:
        return await self.post("/v1/chat/completions", chat_body(text, **fields))

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **kwargs) as response:
            return response.status, await response.json()

    async def events(self, path: str, body: Any) -> list[str]:
        """The payloads of a stream, as text."""
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        frames = text[:-2].split("\n\n")
        assert all(frame.startswith("data: ") for frame in frames)
        return [frame[len("data: ") :] for frame in frames]


def chat_body(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **fields}


Start = Callable[..., Awaitable[Running]]


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError
