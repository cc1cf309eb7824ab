"""Bytes of a request to a schema struct, and what is wrong with them told by the field's name.

Called by the endpoints; knows no endpoint. null counts as absent everywhere, for unknown fields too."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from lightvl.errors import BadRequest, PayloadTooLarge
from lightvl.server.large_strings import put_back, take_out

MAX_BODY_BYTES = 128 << 20
INLINE_BYTES = 1 << 20
"""Larger bodies are taken apart in a thread: a megabyte takes about a millisecond of the loop."""

T = TypeVar("T", bound=msgspec.Struct)

_PATH = re.compile(r"(?P<what>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?\Z", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`\Z", re.DOTALL)


async def read_body(request: web.Request, type: type[T]) -> T:
    """The body as JSON, whatever its Content-Type says. Raises BadRequest, PayloadTooLarge."""
    if (request.content_length or 0) > MAX_BODY_BYTES:  # refused before it is received
        raise _too_large()
    chunks, num_bytes = [], 0
    try:
        async for chunk in request.content.iter_any():
            num_bytes += len(chunk)
            if num_bytes > MAX_BODY_BYTES:
                raise _too_large()
            chunks.append(chunk)
    except web.RequestPayloadError as error:
        raise BadRequest(f"The body could not be received: {error}", code="invalid_body") from None
    if num_bytes <= INLINE_BYTES:
        return decode(b"".join(chunks), type)
    return await asyncio.to_thread(_decode_large, chunks, type)


def _too_large() -> PayloadTooLarge:
    return PayloadTooLarge(f"The body has more than the limit of {MAX_BODY_BYTES} bytes.")


def _decode_large(chunks: list[bytes], type: type[T]) -> T:
    data, texts = take_out(b"".join(chunks))  # a join this large lets go of the GIL
    wire = decode(data, type)
    put_back(wire, texts)
    return wire


def decode(data: bytes, type: type[T]) -> T:
    if not data.strip():
        raise BadRequest("The request body is empty; a JSON object is expected.", code="invalid_json")
    try:
        return _decode(data, type)
    except msgspec.ValidationError as error:
        raise _validation_error(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"We could not parse the JSON body of your request: {error}", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("The JSON body of your request is nested too deeply.", code="invalid_json") from None


def _decode(data: bytes, type: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=type)
    except msgspec.ValidationError as error:
        if "unknown field" not in str(error):
            raise
    # Unknown fields that are null are let pass. Only a request that has unknown fields pays for this second look.
    return msgspec.convert(_without_nulls(msgspec.json.decode(data)), type=type, str_keys=True)


def refuse_unserved(fields: msgspec.Struct, neutral: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Refuse fields that have a meaning which is not served, unless their value changes nothing."""
    for name, values in neutral.items():
        value = getattr(fields, name)
        if value is not None and value not in values:
            raise BadRequest(
                f"'{prefix}{name}' is not supported by this server with this value; leave it out.",
                param=prefix + name,
                code="unsupported_parameter",
            )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _validation_error(error: msgspec.ValidationError) -> BadRequest:
    match = _PATH.match(str(error))
    assert match is not None
    what, path = match["what"], match["path"] or ""
    if unknown := _UNKNOWN.match(what):
        param = _join(path, unknown[1])
        return BadRequest(f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if missing := _MISSING.match(what):
        param = _join(path, missing[1])
        return BadRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if not path:
        return BadRequest(f"The request body is not as expected: {what}.", code="invalid_type")
    return BadRequest(f"Invalid value for '{path}': {what}.", param=path, code="invalid_type")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
