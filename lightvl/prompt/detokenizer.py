"""Sampled token ids to text, as soon as it is sure: one `Detokenizer` per sequence, called by the engine per token.

Its whole output equals the tokenizer's decoding of all ids at once, up to the first stop string. What may still change
is held back: half of a character, and an end that may be the start of a stop string. Knows nothing of requests."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lightvl.prompt.tokenizer import Tokenizer
    from lightvl.prompt.vocabulary import Vocabulary

_UTF8 = codecs.getincrementaldecoder("utf-8")


class _Speller(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Detokenizer:
    __slots__ = ("_held", "_max_stop_len", "_speller", "_starts", "_stops", "matched")

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), skip_special: bool = True) -> None:
        self.matched: str | None = None  # the stop string that ended the text
        self._speller = _make_speller(tokenizer, skip_special)
        self._stops = tuple(text for text in stop if text)
        self._starts = frozenset(text[0] for text in self._stops)
        self._max_stop_len = max((len(text) for text in self._stops), default=0)
        self._held = ""

    def push(self, token_id: int) -> str:
        """The text that became sure with this token; "" once a stop string has matched."""
        if self.matched is not None:
            return ""
        text = self._speller.push(token_id)
        return self._before_stop(text) if self._stops and text else text

    def flush(self) -> str:
        """What was held back, after the last token. May still set `matched`."""
        if self.matched is not None:
            return ""
        text = self._speller.flush()
        if self._stops:
            text = self._before_stop(text)
            if self.matched is None:
                text += self._held
            self._held = ""
        return text

    def _before_stop(self, new: str) -> str:
        text = self._held + new
        best: tuple[int, int] | None = None  # the match that ends first, of those the longest: so tokens' borders
        for stop in self._stops:  # within the text never matter
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
                self.matched = stop
        if best is not None:
            self._held = ""
            return text[: best[1]]
        sure = self._sure_len(text)
        self._held = text[sure:]
        return text[:sure]

    def _sure_len(self, text: str) -> int:
        """Length of the text before the first place where a stop string may have started."""
        for start in range(max(0, len(text) - self._max_stop_len + 1), len(text)):
            if text[start] in self._starts:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return start
        return len(text)


def _make_speller(tokenizer: Tokenizer, skip_special: bool) -> _Speller:
    vocabulary = tokenizer.vocabulary
    if vocabulary.kind == "bytes":
        return _ByteSpeller(vocabulary.plain_bytes if skip_special else vocabulary.token_bytes)
    if vocabulary.kind == "sentencepiece":
        return _SentencePieceSpeller(vocabulary, skip_special)
    return _WindowSpeller(tokenizer, skip_special)


class _ByteSpeller:
    """Byte-level tokens: their bytes one after another are the text's UTF-8."""

    __slots__ = ("_bytes", "_decode")

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._bytes = token_bytes
        self._decode = _UTF8(errors="replace").decode

    def push(self, token_id: int) -> str:
        if token_id >= len(self._bytes):
            return ""
        return self._decode(self._bytes[token_id])

    def flush(self) -> str:
        return self._decode(b"", True)


class _SentencePieceSpeller:
    """Words with their space before them, and runs of byte tokens. A run that is not UTF-8 as a whole becomes one
    replacement character per byte, as in the tokenizers library, so it is held back until it ends."""

    __slots__ = ("_at_start", "_run", "_skipped", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special else frozenset()
        self._run = bytearray()
        self._at_start = vocabulary.strips_first_space

    def push(self, token_id: int) -> str:
        vocabulary = self._vocabulary
        if token_id in self._skipped or token_id >= len(vocabulary.texts):
            return ""
        byte = vocabulary.byte_values.get(token_id)
        if byte is not None:
            self._run.append(byte)
            return ""
        text = vocabulary.texts[token_id]
        return self._after_run(text) if self._run or self._at_start else text

    def flush(self) -> str:
        return self._after_run("")

    def _after_run(self, text: str) -> str:
        if self._run:
            try:
                text = self._run.decode() + text
            except UnicodeDecodeError:
                text = "\ufffd" * len(self._run) + text
            self._run.clear()
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        return text


class _WindowSpeller:
    """Any other decoder: decodes the last few ids with and without the new ones, and takes the difference."""

    __slots__ = ("_ids", "_num_spelled", "_skip_special", "_tokenizer", "_window_start")

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids: list[int] = []
        self._window_start = 0
        self._num_spelled = 0  # ids whose text is out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        return self._new_text(is_last=False)

    def flush(self) -> str:
        return self._new_text(is_last=True)

    def _new_text(self, *, is_last: bool) -> str:
        before = self._decode(self._ids[self._window_start : self._num_spelled])
        text = self._decode(self._ids[self._window_start :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not is_last):
            return ""
        self._window_start, self._num_spelled = self._num_spelled, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)
