"""What each token id spells: the tables that detokenizing reads instead of calling the tokenizer for every token.

Made once per tokenizer by tokenizer.py, read by detokenizer.py and for logprobs. Two kinds of decoders have tables,
byte-level (GPT-2, Llama-3, Qwen) and SentencePiece with byte fallback (Llama, Vicuna, Mistral); any other has none."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

Kind = Literal["bytes", "sentencepiece", "other"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Lists are indexed by token id; ids beyond them spell nothing."""

    kind: Kind
    token_bytes: list[bytes]
    special_ids: frozenset[int]
    plain_bytes: list[bytes]  # token_bytes, with nothing for special tokens
    byte_values: dict[int, int]  # sentencepiece: tokens that stand for one byte
    texts: list[str]  # sentencepiece: the others' text
    strips_first_space: bool  # sentencepiece: one space at the start of all text is not part of it

    @staticmethod
    def of(backend: Backend) -> Vocabulary:
        kind, strips = _kind(backend)
        added = backend.get_added_tokens_decoder()
        special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        ids = backend.get_vocab(with_added_tokens=True)
        names = [""] * (max(ids.values(), default=-1) + 1)
        for name, token_id in ids.items():
            names[token_id] = name
        byte_values: dict[int, int] = {}
        texts: list[str] = []
        if kind == "bytes":
            table = _byte_level_table()
            token_bytes = [_byte_level_bytes(name, table) for name in names]
        elif kind == "sentencepiece":
            matches = {token_id: _BYTE_TOKEN.match(name) for token_id, name in enumerate(names)}
            byte_values = {token_id: int(match[1], 16) for token_id, match in matches.items() if match}
            texts = [name.replace("\u2581", " ") for name in names]
            token_bytes = [
                bytes([byte_values[token_id]]) if token_id in byte_values else text.encode()
                for token_id, text in enumerate(texts)
            ]
        else:
            token_bytes = [
                backend.decode([token_id], skip_special_tokens=False).encode() if name else b""
                for token_id, name in enumerate(names)
            ]
        plain = [b"" if token_id in special_ids else spelled for token_id, spelled in enumerate(token_bytes)]
        return Vocabulary(kind, token_bytes, special_ids, plain, byte_values, texts, strips)


def _kind(backend: Backend) -> tuple[Kind, bool]:
    if backend.decoder is None:
        return "other", False
    decoder: dict[str, Any] = json.loads(backend.decoder.__getstate__())  # how it stands in tokenizer.json
    if decoder["type"] == "ByteLevel":
        return "bytes", False
    if decoder["type"] == "Sequence":
        steps = decoder["decoders"]
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        usual = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]
        if steps[:3] == usual and steps[3:] in ([], [strip]):
            return "sentencepiece", len(steps) == 4
    return "other", False


def _byte_level_table() -> dict[int, int]:
    """GPT-2's way to write any byte as a visible character, for `str.translate`: printable ones as they are, the rest
    from U+0100 on. What is not used to write bytes goes past Latin-1."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: 0x100 for byte in others} | {0x100 + i: byte for i, byte in enumerate(others)}


def _byte_level_bytes(name: str, table: dict[int, int]) -> bytes:
    """An added token that is not written in that way, one with a space in it, say, spells itself."""
    try:
        return name.translate(table).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()
