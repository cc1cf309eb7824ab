from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_helpers import CHATML, LLAMA_3, byte_level, sentencepiece, unigram

from lightvl.prompt.detokenizer import Detokenizer
from lightvl.prompt.template import ClientText
from lightvl.prompt.tokenizer import Tokenizer

KINDS = {"qwen": "bytes", "llama3": "bytes", "llama2": "sentencepiece", "unigram": "other"}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "qwen":
        return Tokenizer(byte_level([*CHATML, "<two words>", "<Ġodd>"], eos="<|im_end|>"))
    if kind == "llama3":
        return Tokenizer(byte_level(LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>"))
    return Tokenizer(sentencepiece() if kind == "llama2" else unigram())


def whole(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), *, skip_special: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, stop, skip_special)
    return "".join(map(detokenizer.push, ids)) + detokenizer.flush()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    assert tokenizer_of(kind).vocabulary.kind == KINDS[kind]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["qwen", "llama3", "llama2"]), st.data(), st.booleans())
def test_any_ids_equal_decoding_at_once(kind: str, data: st.DataObject, skip_special: bool) -> None:
    """Random ids: broken characters, special tokens anywhere, ids past the tokenizer."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=30))
    assert whole(tokenizer, ids, skip_special=skip_special) == tokenizer.decode(ids, skip_special=skip_special)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(KINDS)), st.text(max_size=40), st.booleans())
def test_text_comes_back(kind: str, text: str, skip_special: bool) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode([ClientText(text)])
    assert whole(tokenizer, ids, skip_special=skip_special) == tokenizer.decode(ids, skip_special=skip_special)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["qwen", "llama2"]),
    st.text("ab<é🎉 ", max_size=30),
    st.lists(st.text("ab<é🎉", max_size=4), max_size=3),
    st.data(),
)
def test_stop_strings(kind: str, text: str, stops: list[str], data: st.DataObject) -> None:
    """Cut before the stop that ends first (the longest of these), however the text is cut into tokens."""
    tokenizer = tokenizer_of(kind)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [i for piece in pieces for i in tokenizer.encode([ClientText(piece)]) if i != tokenizer.bos_token_id]
    full = tokenizer.decode(ids)
    expected, matched = full, None
    for end in range(1, len(full) + 1):
        ending = [stop for stop in stops if stop and full[:end].endswith(stop)]
        if ending:
            matched = max(ending, key=len)
            expected = full[: end - len(matched)]
            break
    detokenizer = Detokenizer(tokenizer, tuple(stops), True)
    out = ""
    for token_id in ids:
        out += detokenizer.push(token_id)
        assert expected.startswith(out)  # nothing is taken back
    out += detokenizer.flush()
    assert (out, detokenizer.matched) == (expected, matched)
    assert detokenizer.push(ids[0] if ids else 0) == "" or matched is None


def test_text_is_not_held_longer_than_needed() -> None:
    tokenizer = tokenizer_of("qwen")
    detokenizer = Detokenizer(tokenizer, ("xyz",), True)
    ids = [tokenizer.encode([ClientText(char)])[0] for char in "axybxyz!"]
    assert [detokenizer.push(token_id) for token_id in ids] == ["a", "", "", "xyb", "", "", "", ""]
    assert detokenizer.matched == "xyz" and detokenizer.flush() == ""
    plain = Detokenizer(tokenizer, (), True)
    emoji = tokenizer.encode([ClientText("🎉")])
    assert [plain.push(token_id) for token_id in emoji] == [""] * (len(emoji) - 1) + ["🎉"]
    assert plain.push(emoji[0]) == "" and plain.flush() == "\ufffd"


def test_the_stop_that_ends_first_wins_inside_one_token() -> None:
    tokenizer = tokenizer_of("qwen")
    words = tokenizer.control_id("<two words>")
    assert words is not None
    for stops, expected in ((("<two words", "two"), "<"), (("wo", "two"), "<"), ((">", "<two words>"), "")):
        for order in (stops, stops[::-1]):
            assert whole(tokenizer, [words], order, skip_special=False) == expected


def test_special_tokens_may_be_kept() -> None:
    tokenizer = tokenizer_of("qwen")
    end = tokenizer.control_id("<|im_end|>")
    assert end is not None
    assert whole(tokenizer, [end], skip_special=False) == "<|im_end|>" and whole(tokenizer, [end]) == ""
    assert whole(tokenizer, [end], ("im_end",), skip_special=False) == "<|"


@pytest.mark.full
@pytest.mark.parametrize("kind", ["qwen", "llama2", "unigram"])
def test_cost_per_token(kind: str) -> None:
    """Prints microseconds per token; fails only when far off the 10 that the loop can afford."""
    import time

    tokenizer = tokenizer_of(kind)
    rng = random.Random(1)
    ids = [rng.randrange(len(tokenizer)) for _ in range(20_000)]
    for stop in ((), ("\n\nUser:", "</answer>")):
        detokenizer = Detokenizer(tokenizer, stop, True)
        started = time.perf_counter()
        for token_id in ids:
            detokenizer.push(token_id)
        cost = (time.perf_counter() - started) / len(ids) * 1e6
        print(f"{kind} {len(stop)} stops: {cost:.2f} us/token")
        assert cost < (100 if kind == "unigram" else 30)
