"""Takes long strings (base64 images) out of a JSON body before it is parsed, and puts them into the parsed struct.

Why: a JSON parser looks at every byte and holds the GIL meanwhile, so that a 10 MB image would stall the event loop
for 10 ms or more even from a thread. Looking for the next quote is a memchr, fifty times as fast.

Only called by body.py. Strings are left where they are unless they are plain ASCII without escapes; those that are
taken out are not checked for raw control characters, which the parser would refuse."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec

LONG_BYTES = 64 << 10
_BETWEEN = frozenset(b" \t\r\n,:]}")
"""What may follow a closing quote. After a quote and one of these stands structure, not a string."""


def take_out(data: bytes) -> tuple[bytes, dict[str, str]]:
    """The body with a placeholder for each long string, and the strings by placeholder. Placeholders are random, so
    that no client can name one."""
    nonce = secrets.token_hex(16)
    view = memoryview(data)
    texts: dict[str, str] = {}
    pieces: list[memoryview | bytes] = []
    kept = 0
    quote = data.find(b'"')
    while quote >= 0:
        end = data.find(b'"', quote + 1)
        if end - quote > LONG_BYTES and _is_plain_string(data, quote, end):
            placeholder = f"{nonce}-{len(texts)}"
            texts[placeholder] = str(view[quote + 1 : end], "ascii")
            pieces += [view[kept : quote + 1], placeholder.encode()]
            kept = end
        quote = end
    return b"".join([*pieces, view[kept:]]), texts


def put_back(value: Any, texts: dict[str, str]) -> Any:
    """`value` with its placeholders replaced; structs, lists and dicts are changed in place."""
    if isinstance(value, str):
        return texts.get(value, value)
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            setattr(value, name, put_back(getattr(value, name), texts))
    elif isinstance(value, list):
        value[:] = [put_back(item, texts) for item in value]
    elif isinstance(value, dict):
        for key in value:
            value[key] = put_back(value[key], texts)
    return value


def _is_plain_string(data: bytes, quote: int, end: int) -> bool:
    return (
        data[quote + 1] not in _BETWEEN
        and data[quote - 1 : quote] != b"\\"  # an escaped quote in the middle of a string
        and data.find(b"\\", quote, end) < 0
        and data[quote:end].isascii()
    )
