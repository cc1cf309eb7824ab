"""Grammars that an answer must match: JSON schemas, regular expressions and GBNF, compiled by llguidance for the tokens
of this model. Called in threads by build.py; what comes out is asked for masks on the lane thread, by the sampler."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import gbnf_to_lark

from lightvl.core import GrammarKind
from lightvl.errors import BadRequest
from lightvl.prompt.template import ClientText
from lightvl.prompt.tokenizer import Tokenizer

MAX_KEPT = 64  # compiled grammars
# Of JSON, at once: a line's end with the next one's indent, or some spaces. Without an end, a small model may write
# nothing else any more.
WHITESPACE = r"\n[ \t]{0,40}|[ \t]{1,4}"
_MAX_REASON_CHARS = 300


class Grammars:
    """Compiles what clients ask for, and keeps it. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Collection[int]) -> None:
        """`vocab_size`: ids that have a logit. `stop_token_ids`: what may end an answer that is whole."""
        self._has_no_table = tokenizer.vocabulary.kind == "other"
        self._stop_token_ids = sorted(token_id for token_id in stop_token_ids if token_id < vocab_size)
        self._tokenizer = lru_cache(1)(
            lambda: LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, vocab_size, self._stop_token_ids[0])))
        )
        self._compiled = lru_cache(MAX_KEPT)(self._compile)

    def compile(self, kind: GrammarKind, source: str, *, param: str) -> CompiledGrammar:
        """From the text of a JSON schema, of a regular expression (Rust's syntax) or of llama.cpp's GBNF. Raises
        BadRequest, naming the field `param`."""
        try:
            return self._compiled(kind, source)
        except ValueError as error:
            reason = str(error).strip()[:_MAX_REASON_CHARS]
            raise BadRequest(f"Invalid value for '{param}': {reason}", param=param, code="invalid_value") from None

    def _compile(self, kind: GrammarKind, source: str) -> CompiledGrammar:
        if not self._stop_token_ids or self._has_no_table:
            raise ValueError("this model's tokenizer does not tell what each token spells, or which ends an answer")
        matcher = LLMatcher(self._tokenizer(), _to_llguidance(kind, source), log_level=0)
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # here and not in a step: the first mask of a costly grammar takes most of a second
        if probe.is_error():
            raise ValueError(probe.get_error())
        return CompiledGrammar(matcher, self._stop_token_ids)


class CompiledGrammar:
    """Implements `core.Grammar`."""

    def __init__(self, start: LLMatcher, stop_token_ids: list[int]) -> None:
        self._start = start
        self._stop_token_ids = stop_token_ids

    def start(self) -> GrammarMatcher:
        return GrammarMatcher(self._start.deep_copy(), self._stop_token_ids)


class GrammarMatcher:
    """Implements `core.Matcher`. llguidance knows one stop token, the first of these."""

    __slots__ = ("_matcher", "_stop_token_ids")

    def __init__(self, matcher: LLMatcher, stop_token_ids: list[int]) -> None:
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids

    def allow(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        words = mask.view(np.uint32)
        first, *others = self._stop_token_ids
        if words[first // 32] >> (first % 32) & 1:
            for token_id in others:
                words[token_id // 32] |= np.uint32(1 << token_id % 32)

    def push(self, token_id: int) -> bool:
        if token_id in self._stop_token_ids:
            token_id = self._stop_token_ids[0]
        return self._matcher.consume_token(token_id)


class _Tokens:
    """What llguidance asks of a tokenizer. Where a grammar leaves one text only, just that text's own tokens pass."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_id: int) -> None:
        vocabulary = tokenizer.vocabulary
        spelled = vocabulary.token_bytes[:vocab_size]
        self.tokens = [*spelled, *([b""] * (vocab_size - len(spelled)))]
        self.special_token_ids = [token_id for token_id in vocabulary.special_ids if token_id < vocab_size]
        self.eos_token_id = stop_token_id
        self._plain = vocabulary.plain_bytes[:vocab_size]
        self._tokenizer = tokenizer
        # SentencePiece writes a space before the first character of a text, which here goes on from another
        self._before = "\x02" if vocabulary.kind == "sentencepiece" else ""
        self._num_before = len(tokenizer.encode([ClientText(self._before)]))  # BOS, too

    def __call__(self, text: bytes) -> list[int]:
        ids = self._tokenizer.encode([ClientText(self._before + text.decode("utf-8", "replace"))])[self._num_before :]
        has_logits = max(ids, default=0) < len(self.tokens)
        return ids if has_logits and b"".join(map(self.tokens.__getitem__, ids)) == text else self._by_length(text)

    def _by_length(self, text: bytes) -> list[int]:
        """The longest token first."""
        ids: list[int] = []
        while text:
            fitting = (token_id for token_id, spelled in enumerate(self._plain) if spelled and text.startswith(spelled))
            ids.append(max(fitting, key=lambda token_id: len(self._plain[token_id])))
            text = text[len(self._plain[ids[-1]]) :]
        return ids


def _to_llguidance(kind: GrammarKind, source: str) -> str:
    """Raises ValueError for what is no JSON or no GBNF."""
    if kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": WHITESPACE})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(source))
    except Exception as error:  # it raises no other for a rule that is not there
        raise ValueError(str(error)) from None
