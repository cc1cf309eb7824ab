"""Around every request: its id, the key check, one ladder from exceptions to OpenAI's error bodies, the access line.

Once a stream has begun, errors are its own business (sse.EventStream); this never sees them."""

from __future__ import annotations

import hmac
import logging
import time
import uuid
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from lightvl.errors import LightVLError, NotAuthorized, NotFound

log = logging.getLogger(__name__)

REQUEST_ID: ContextVar[str] = ContextVar("request_id")
"""Of the request that the current task answers."""
ID_HEADER = "x-request-id"
_OPEN_PATHS = frozenset({"/health"})  # answered without a key
_QUIET_PATHS = frozenset({"/health", "/metrics"})  # asked for all day long: not in the access log


def error_body(error: BaseException, request_id: str) -> tuple[int, dict[str, Any]]:
    """Status and body for any exception; those that are not for clients are logged here, with their trace."""
    if isinstance(error, LightVLError):
        detail = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
        return error.status, {"error": detail}
    log.error("request %s failed", request_id, exc_info=error)
    message = f"The server had an error while processing your request (request id {request_id})."
    return 500, {"error": {"message": message, "type": "server_error", "param": None, "code": "internal_error"}}


def error_reply(error: BaseException, request_id: str) -> web.Response:
    status, body = error_body(error, request_id)
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return json_reply(body, status=status, headers=headers)


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, headers=headers, content_type="application/json", charset="utf-8"
    )


def make_middleware(api_key: str | None) -> Middleware:
    expected = None if api_key is None else api_key.encode()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = "req-" + uuid.uuid4().hex
        REQUEST_ID.set(request_id)
        started = time.monotonic()
        status = 499  # what the access line says when the client left
        try:
            response = await _answer(request, handler, expected, request_id)
            status = response.status
        finally:
            level = logging.DEBUG if request.path in _QUIET_PATHS else logging.INFO
            if log.isEnabledFor(level):
                seconds = time.monotonic() - started
                log.log(
                    level,
                    '%s - "%s %s" %d (%.3f s)',
                    _peer(request),
                    request.method,
                    request.rel_url.raw_path,
                    status,
                    seconds,
                )
        if not response.prepared:
            response.headers[ID_HEADER] = request_id
        return response

    return middleware


async def _answer(request: web.Request, handler: Handler, api_key: bytes | None, request_id: str) -> web.StreamResponse:
    try:
        if api_key is not None and request.path not in _OPEN_PATHS:
            _authorize(request.headers.get(hdrs.AUTHORIZATION), api_key)
        return await handler(request)
    except web.HTTPException as error:
        return _http_error(request, error, request_id)
    except Exception as error:
        return error_reply(error, request_id)


def _authorize(header: str | None, api_key: bytes) -> None:
    if header is None:
        raise NotAuthorized("You didn't provide an API key. Send it as an 'Authorization: Bearer KEY' header.")
    scheme, _, given = header.partition(" ")
    # surrogateescape: a header may hold any byte, and compare_digest takes only ASCII as str.
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), api_key):
        raise NotAuthorized("Incorrect API key provided.")


def _http_error(request: web.Request, error: web.HTTPException, request_id: str) -> web.StreamResponse:
    """aiohttp's own answers (no such route, wrong method...) in OpenAI's shape."""
    if error.status < 400:
        return error
    if error.status == 404:
        return error_reply(NotFound(f"Invalid URL ({request.method} {request.path})"), request_id)
    message = f"{error.reason} ({request.method} {request.path})"
    if error.status == 405:
        message = f"Not allowed to {request.method} on {request.path}"
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    code = HTTPStatus(error.status).name.lower()
    reply = json_reply({"error": {"message": message, "type": kind, "param": None, "code": code}}, error.status)
    if hdrs.ALLOW in error.headers:
        reply.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
    return reply


def _peer(request: web.Request) -> str:
    transport = request.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    return f"{peer[0]}:{peer[1]}" if peer else "-"
