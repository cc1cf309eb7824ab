"""Whether the server takes new work, and how many requests are being answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from lightvl.errors import Overloaded


class Lifecycle:
    def __init__(self) -> None:
        self.draining = False
        self.num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request that makes the engine work. Raises Overloaded once draining has begun."""
        if self.draining:
            raise Overloaded("The server is shutting down and takes no new requests.", code="shutting_down")
        self.num_requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_requests -= 1
            if not self.num_requests:
                self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()
