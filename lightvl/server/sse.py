"""Server-sent events: the one place that frames them. Payloads come in as encoded JSON; what they mean is not known.

A client that reads slowly makes `send` wait (its socket's buffer is bounded); only that request's handler waits, and
the engine goes on and joins what it makes in the meantime into fewer, larger deltas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from lightvl.server.middleware import ID_HEADER, REQUEST_ID, error_body

PREFIX = b"data: "
END = b"\n\n"
DONE = b"data: [DONE]\n\n"

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would hold the stream back
}


def frame(payload: bytes) -> bytes:
    """One event. `payload` is JSON on one line, as msgspec encodes it."""
    return PREFIX + payload + END


async def stream(request: web.Request, frames: AsyncGenerator[bytes, None]) -> web.StreamResponse:
    """Answer with these framed events, then `[DONE]`. An error after the first byte becomes a last event, without
    `[DONE]`. When the client is gone `frames` is closed where it stands."""
    response = web.StreamResponse(headers={**_HEADERS, ID_HEADER: REQUEST_ID.get()})
    async with aclosing(frames):
        try:
            await response.prepare(request)
            await response.write(await _written(response, frames))
            await response.write_eof()
        except ConnectionError:
            pass  # the client left between two writes
    return response


async def _written(response: web.StreamResponse, frames: AsyncGenerator[bytes, None]) -> bytes:
    """Write all frames; what must follow them."""
    try:
        async for data in frames:
            await response.write(data)
    except ConnectionError:
        raise
    except Exception as error:
        return frame(msgspec.json.encode(error_body(error, REQUEST_ID.get())[1]))
    return DONE
