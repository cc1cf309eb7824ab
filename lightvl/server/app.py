"""Routes, start, drain and end of the server. `run_server` is all that the CLI calls; tests use `make_app`.

Order of life: bind (before the model is loaded, so that a busy port is told at once), start the service, listen, say
so, wait for a signal, drain, close the service (which ends what still runs), close the connections."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from lightvl.config import ServerConfig
from lightvl.errors import ConfigError
from lightvl.metrics import Metrics
from lightvl.server import admin, tokens
from lightvl.server.chat import chat_completions
from lightvl.server.completions import completions
from lightvl.server.generate import generate
from lightvl.server.greeting import greeting
from lightvl.server.middleware import make_middleware
from lightvl.server.service import Context, Service

log = logging.getLogger(__name__)

DRAIN_S = 30.0
"""How long running requests may go on after the first signal."""
CLOSE_S = 2.0
"""How long handlers may take to write their last bytes after the service has ended their requests."""
KEEPALIVE_S = 75.0
BACKLOG = 1024

Endpoint = Callable[[Context, web.Request], Awaitable[web.StreamResponse]]

_WORK: dict[str, Endpoint] = {
    "/v1/chat/completions": chat_completions,
    "/v1/chat/completions/render": tokens.render,
    "/v1/completions": completions,
    "/v1/tokenize": tokens.tokenize,
    "/v1/detokenize": tokens.detokenize,
    "/generate": generate,
}
_ADMIN: dict[str, Endpoint] = {
    "/health": admin.health,
    "/v1/models": admin.models,
    "/v1/models/{model:.+}": admin.model,
    "/get_model_info": admin.get_model_info,
    "/metrics": admin.metrics,
}


def make_app(context: Context) -> web.Application:
    app = web.Application(middlewares=[make_middleware(context.config.api_key)])
    for path, endpoint in _WORK.items():
        app.router.add_post(path, _work_handler(context, endpoint))
    for path, endpoint in _ADMIN.items():
        app.router.add_get(path, _admin_handler(context, endpoint))
    context.metrics.gauge("num_requests", lambda: context.lifecycle.num_requests)
    return app


def make_runner(context: Context) -> web.AppRunner:
    logging.getLogger("aiohttp.server").addFilter(_is_our_fault)
    # handler_cancellation: a client that leaves cancels its handler, whose Run then aborts the generation.
    return web.AppRunner(
        make_app(context),
        handler_cancellation=True,
        access_log=None,
        keepalive_timeout=KEEPALIVE_S,
        shutdown_timeout=CLOSE_S,
    )


def _is_our_fault(record: logging.LogRecord) -> bool:
    """aiohttp logs a trace for every port scanner that does not speak HTTP; those have been answered with 400."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError | web.RequestPayloadError)


def _work_handler(context: Context, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        with context.lifecycle.request():
            return await endpoint(context, request)

    return handler


def _admin_handler(context: Context, endpoint: Endpoint) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await endpoint(context, request)

    return handler


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to every address of `host`, not listening yet: until then clients are told that nobody is there.
    Port 0 takes a free one. Raises ConfigError."""
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror or error}") from None
    for family, kind, proto, _, address in dict.fromkeys(found):
        try:
            sock = socket.socket(family, kind, proto)
        except OSError as error:  # a kernel without IPv6 still resolves to ::1
            problem = error
            continue
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if port == 0 and sockets:  # all addresses of one host on one port
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        try:
            sock.bind(address)
        except OSError as error:
            sock.close()
            problem = error
            if error.errno == errno.EADDRNOTAVAIL:
                continue
            break
        sockets.append(sock)
    if not sockets or (problem is not None and problem.errno == errno.EADDRINUSE):
        for sock in sockets:
            sock.close()
        assert problem is not None
        raise _bind_error(host, port, problem)
    return sockets


def _bind_error(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use by another program; choose another with --port")
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}")


async def run_server(
    config: ServerConfig,
    service: Service,
    metrics: Metrics,
    sockets: Sequence[socket.socket],
    *,
    started: float | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT. `started`: `time.monotonic()` of the program's start, for the greeting."""
    context = Context(service, config, metrics)
    await service.start()
    runner = make_runner(context)
    try:
        await runner.setup()
        for sock in sockets:
            try:
                await web.SockSite(runner, sock, backlog=BACKLOG).start()
            except OSError as error:
                raise _bind_error(config.host, config.port, error) from None
        signals = _Signals()
        for line in service.report:
            log.info("%s", line)
        if started is not None:
            log.info("ready after %.1f s", time.monotonic() - started)
        print(greeting(service.info, config.host, sockets[0].getsockname()[1], config.api_key is not None), flush=True)
        await signals.first.wait()
        await _drain(context, signals.second)
    finally:
        try:
            await service.close()
        finally:
            await runner.cleanup()
    log.info("stopped")


class _Signals:
    """The first signal asks for a drain, the second for an end at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


async def _drain(context: Context, hurry: asyncio.Event) -> None:
    """Let running requests finish, for `DRAIN_S` or until `hurry`."""
    lifecycle = context.lifecycle
    lifecycle.draining = True
    log.info("stopping: %d requests may finish within %.0f s", lifecycle.num_requests, DRAIN_S)

    async def finish() -> None:
        await lifecycle.wait_idle()
        await context.service.drain(DRAIN_S)

    finishing, hurrying = asyncio.create_task(finish()), asyncio.create_task(hurry.wait())
    try:
        await asyncio.wait((finishing, hurrying), timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
        if finishing.done():
            await finishing  # raise what it raised
        else:
            log.warning("%d requests are cut off", lifecycle.num_requests)
    finally:
        finishing.cancel()
        hurrying.cancel()
