from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from server_fakes import FakeService
from server_helpers import Running, Start

from lightvl.config import ServerConfig
from lightvl.metrics import Metrics
from lightvl.server.app import bind, make_runner
from lightvl.server.service import Context


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts servers with the given flags (and `info` of the fake model)."""
    runners: list[web.AppRunner] = []
    sessions: list[aiohttp.ClientSession] = []

    async def start_one(info: dict[str, Any] | None = None, **flags: Any) -> Running:
        service = FakeService(**(info or {}))
        context = Context(service, ServerConfig(**flags), Metrics())
        runner = make_runner(context)
        await runner.setup()
        (sock,) = bind("127.0.0.1", 0)
        await web.SockSite(runner, sock).start()
        session = aiohttp.ClientSession()
        runners.append(runner)
        sessions.append(session)
        return Running(service, context, sock.getsockname()[1], session)

    yield start_one
    for session in sessions:
        await session.close()
    for runner in runners:
        await runner.cleanup()


@pytest.fixture
async def server(start: Start) -> Running:
    return await start()
