"""Grammars over the tokens of all kinds of tokenizers: what the masks let through is what was asked for."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_tokenizer import pair

from lightvl.core import GrammarKind
from lightvl.errors import BadRequest
from lightvl.prompt import structured
from lightvl.prompt.detokenizer import Detokenizer
from lightvl.prompt.structured import Grammars
from lightvl.prompt.template import ClientText as Text
from lightvl.prompt.tokenizer import Tokenizer

KINDS = ["qwen", "llama3", "llama2", "llama2-first", "llama2-normalized"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 20},
        "tags": {"type": "array", "items": {"enum": ["rot", "grün"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
NUM_SPARE = 7  # ids with a logit, but nothing that they spell


def made(tokenizer: Tokenizer, stops: list[str]) -> tuple[Grammars, int, list[int]]:
    """Grammars, the size of their vocabulary, and the stop tokens."""
    stop_ids = [token_id for text in stops if (token_id := tokenizer.control_id(text)) is not None]
    vocab_size = len(tokenizer) + NUM_SPARE
    return Grammars(tokenizer, vocab_size, stop_ids), vocab_size, stop_ids


def stops_of(kind: str) -> list[str]:
    return {"qwen": ["<|im_end|>", "<|endoftext|>"], "llama3": ["<|eot_id|>", "<|end_of_text|>"]}.get(kind, ["</s>"])


def walk(tokenizer: Tokenizer, stops: list[str], kind: GrammarKind, source: str, rng: random.Random) -> str:
    """The text of one answer, each token drawn among those that are allowed, any stop token as soon as one is."""
    grammars, vocab_size, stop_ids = made(tokenizer, stops)
    matcher = grammars.compile(kind, source, param="x").start()
    detokenizer = Detokenizer(tokenizer)
    text = ""
    for _ in range(400):
        mask = np.full(-(-vocab_size // 32), -1, dtype=np.int32)
        matcher.allow(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        assert allowed and allowed[-1] < len(tokenizer)
        if not set(stop_ids).isdisjoint(allowed):
            assert set(stop_ids) <= set(allowed)
            assert matcher.push(rng.choice(stop_ids))
            return text + detokenizer.flush()
        assert tokenizer.vocabulary.special_ids.isdisjoint(allowed)
        assert all(tokenizer.token_bytes(token_id) for token_id in allowed)
        token_id = rng.choice(allowed)
        assert matcher.push(token_id)
        text += detokenizer.push(token_id)
    raise AssertionError(f"no end: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_drawn_matches_the_schema(kind: str) -> None:
    rng = random.Random(kind)
    for _ in range(5):
        answer = json.loads(walk(pair(kind)[1], stops_of(kind), "json_schema", json.dumps(SCHEMA), rng))
        assert list(answer) == ["name", "count", "tags"]
        assert len(answer["name"]) <= 12 and 0 <= answer["count"] <= 20
        assert len(answer["tags"]) <= 3 and set(answer["tags"]) <= {"rot", "grün"}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_drawn_matches_the_regex_and_the_gbnf(kind: str) -> None:
    rng = random.Random(kind)
    tokenizer, stops = pair(kind)[1], stops_of(kind)
    for _ in range(5):
        assert re.fullmatch(r"(ab|ü){2} \d{3}", walk(tokenizer, stops, "regex", r"(ab|ü){2} [0-9]{3}", rng))
        answer = walk(tokenizer, stops, "ebnf", 'root ::= "It is " what "."\nwhat ::= "red" | "not " what', rng)
        assert re.fullmatch(r"It is (not )*red\.", answer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_is_sure_has_the_tokens_that_it_has_within_another(kind: str) -> None:
    tokenizer = pair(kind)[1]
    tokens = structured._Tokens(tokenizer, len(tokenizer), 0)
    text = " zebra 93, vortex"
    ids = tokens(text.encode())
    assert tokenizer.encode([Text("Xq" + text)])[-len(ids) :] == ids
    for spelled in (b"{", "ön 日本語".encode(), b"\n {", b"\xff{", b" brown\xc3"):
        assert b"".join(map(tokenizer.token_bytes, tokens(spelled))) == spelled
    others = structured._Tokens(tokenizer, max(ids), 0)(text.encode())  # the largest id has no logit
    assert b"".join(map(tokenizer.token_bytes, others)) == text.encode() and max(others) < max(ids)


def test_white_space_of_json_ends() -> None:
    tokenizer = pair("qwen")[1]
    grammars, vocab_size, _ = made(tokenizer, stops_of("qwen"))
    matcher = grammars.compile("json_schema", '{"type":"object"}', param="x").start()
    (brace,), (newline,) = (tokenizer.encode([Text(text)]) for text in ("{", "\n"))
    assert matcher.push(brace) and matcher.push(newline)
    mask = np.empty(-(-vocab_size // 32), dtype=np.int32)
    matcher.allow(mask)
    assert not mask[newline // 32] >> newline % 32 & 1
    assert not matcher.push(newline)


@pytest.mark.parametrize(
    "kind, source, word",
    [
        ("json_schema", "{", "EOF"),
        ("json_schema", '{"type":"objct"}', "objct"),
        ("json_schema", '{"type":"object","unevaluatedItems":3}', "unevaluatedItems"),
        ("json_schema", '{"not":' * 1000 + "{}" + "}" * 1000, "Invalid"),
        ("regex", "(a", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "(" * 10_000 + "a" + ")" * 10_000, "Invalid"),
        ("ebnf", "root ::= (", "Expected"),
        ("ebnf", "root ::= " + "(" * 100_000, "Invalid"),
        ("ebnf", "start ::= other", "other"),
    ],
)
def test_what_does_not_compile_is_told(kind: GrammarKind, source: str, word: str) -> None:
    grammars, _, _ = made(pair("qwen")[1], stops_of("qwen"))
    with pytest.raises(BadRequest, match=word) as caught:
        grammars.compile(kind, source, param="regex")
    assert caught.value.param == "regex" and len(str(caught.value)) < 500


def test_what_breaks_at_its_first_mask_is_told_before_any_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Costly:
        error = ""
        grammar_from_regex = structured.LLMatcher.grammar_from_regex

        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def deep_copy(self) -> Costly:
            return Costly()

        def compute_bitmask(self) -> bytes:
            self.error = "too many expressions"
            return b""

        def is_error(self) -> bool:
            return bool(self.error)

        def get_error(self) -> str:
            return self.error

    monkeypatch.setattr(structured, "LLMatcher", Costly)
    with pytest.raises(BadRequest, match="too many expressions"):
        made(pair("qwen")[1], stops_of("qwen"))[0].compile("regex", "a", param="regex")


def test_a_tokenizer_without_a_table_and_a_model_without_an_end_take_none() -> None:
    for kind, stops in (("unigram", ["</s>"]), ("qwen", [])):
        with pytest.raises(BadRequest, match="tokenizer"):
            made(pair(kind)[1], stops)[0].compile("regex", "a", param="regex")


def test_a_grammar_is_compiled_once_and_its_sequences_do_not_meet() -> None:
    tokenizer = pair("llama3")[1]
    grammars, vocab_size, _ = made(tokenizer, stops_of("llama3"))
    with ThreadPoolExecutor(4) as pool:
        compiled = list(pool.map(lambda _: grammars.compile("regex", "ab", param="x"), range(20)))
    assert grammars.compile("regex", "ab", param="x") in compiled
    one, other = compiled[0].start(), compiled[0].start()
    (a,) = tokenizer.encode([Text("a")])[1:]
    masks = np.empty((2, -(-vocab_size // 32)), dtype=np.int32)
    assert one.push(a)
    for matcher, mask in zip((one, other), masks, strict=True):
        matcher.allow(mask)
    assert [bool(mask[a // 32] >> a % 32 & 1) for mask in masks] == [False, True]
