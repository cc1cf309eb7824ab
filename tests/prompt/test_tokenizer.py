from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_helpers import CHATML, LLAMA_3, byte_level, sentencepiece, unigram

from lightvl.errors import BadRequest
from lightvl.prompt.template import ClientText, Control, ImageSlot, Segment
from lightvl.prompt.tokenizer import Tokenizer

KINDS = ["qwen", "llama3", "llama2", "llama2-first", "llama2-normalized", "unigram"]


@cache
def pair(kind: str) -> tuple[Any, Tokenizer]:
    if kind == "qwen":
        hf: Any = byte_level(CHATML, eos="<|im_end|>")
        return hf, made(hf, hf.convert_tokens_to_ids("<|image_pad|>"))
    if kind == "llama3":
        hf = byte_level(LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>")
        return hf, made(hf, hf.convert_tokens_to_ids("<|image|>"))
    if kind == "unigram":
        hf = unigram()
        return hf, made(hf, len(hf))
    hf = sentencepiece(first_only=kind == "llama2-first", normalized=kind == "llama2-normalized")
    return hf, made(hf, hf.convert_tokens_to_ids("<image>"))


def made(hf: Any, image_token_id: int | None) -> Tokenizer:
    """From a copy: a Tokenizer takes its backend over."""
    return Tokenizer(copy.deepcopy(hf), image_token_id=image_token_id)


def flat(segments: list[Segment], tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.image_token or "" if isinstance(s, ImageSlot) else s.text for s in segments)


TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["Hello", " world", "  ", "\n", "naïf 日本語", "e\u0301", "'s", "42", " the cat", "<tool_call>", "<", "|>"]
    ),
)


@st.composite
def prompts(draw: st.DrawFn, dirty: bool) -> tuple[str, list[Segment]]:
    kind = draw(st.sampled_from(KINDS if dirty else [kind for kind in KINDS if kind != "llama2-normalized"]))
    left_out = {pair(kind)[1].image_token, pair(kind)[0].bos_token if dirty else None}
    names = [name for name in pair(kind)[1].control_tokens if name not in left_out]
    client = (
        st.lists(st.sampled_from([*pair(kind)[1].control_tokens]) | TEXT, max_size=4).map("".join) if dirty else TEXT
    )
    segment = st.one_of(
        st.lists(st.sampled_from(names) | TEXT.filter(lambda t: "<" not in t), max_size=3).map("".join).map(Control),
        client.map(ClientText),
        st.just(ImageSlot()),
    )
    return kind, draw(st.lists(segment, max_size=7))


@settings(max_examples=300, deadline=None)
@given(prompts(dirty=False))
def test_ids_equal_hf_on_clean_text(prompt: tuple[str, list[Segment]]) -> None:
    kind, segments = prompt
    hf, tokenizer = pair(kind)
    text = flat(segments, tokenizer)
    if any(name in "".join(s.text for s in segments if isinstance(s, ClientText)) for name in tokenizer.control_tokens):
        return
    if kind == "unigram" and (ImageSlot() in segments or "<" in text.replace("</s>", "")):
        return  # HF has no image token there, and takes "</s>" from pieces of text
    expected = hf.encode(text, add_special_tokens=False)
    if tokenizer.bos_token_id is not None:
        while expected[:1] == [tokenizer.bos_token_id]:
            del expected[0]
        expected.insert(0, tokenizer.bos_token_id)
    assert tokenizer.encode(segments) == expected


@settings(max_examples=300, deadline=None)
@given(prompts(dirty=True))
def test_client_text_never_becomes_control(prompt: tuple[str, list[Segment]]) -> None:
    """Exactly the control tokens of the control segments, in order, whatever the client writes; and nothing is lost."""
    kind, segments = prompt
    hf, tokenizer = pair(kind)
    unk = hf.unk_token
    control = {tokenizer.control_id(name) for name in tokenizer.control_tokens if name != unk}
    expected: list[int | None] = []
    for segment in segments:
        if isinstance(segment, ImageSlot):
            expected.append(tokenizer.control_id(str(tokenizer.image_token)))
        elif isinstance(segment, Control):
            found = tokenizer.control_pattern.findall(segment.text)
            expected += [tokenizer.control_id(name) for name in found if name != unk]
    got = [token_id for token_id in tokenizer.encode(segments) if token_id in control]
    if tokenizer.bos_token_id is not None:
        expected.insert(0, tokenizer.bos_token_id)
    assert got == expected


@pytest.mark.parametrize("kind", KINDS)
def test_client_text_survives_unchanged(kind: str) -> None:
    _, tokenizer = pair(kind)
    text = "a " + "".join(tokenizer.control_tokens) + " b"
    ids = tokenizer.encode([ClientText(text)])
    if kind == "unigram":
        spelled = "".join(tokenizer.token_text(token_id) for token_id in ids)
        assert "</s>" in spelled and tokenizer.eos_token_id not in ids
    else:
        assert tokenizer.decode(ids[1:] if tokenizer.adds_bos else ids, skip_special=False).strip() == text
    assert tokenizer.encode([Control(text)]) != ids


@pytest.mark.parametrize("kind", ["llama3", "llama2"])
def test_bos_exactly_once(kind: str) -> None:
    hf, tokenizer = pair(kind)
    bos = hf.bos_token
    for segments in (
        [ClientText("hi")],
        [Control(bos), ClientText("hi")],
        [Control(bos + bos + bos + "hi")],
        [Control(bos), Control(bos), ClientText("hi")],
    ):
        ids = tokenizer.encode(list(segments))
        assert ids[0] == hf.bos_token_id and ids.count(hf.bos_token_id) == 1
    assert tokenizer.encode([]) == [hf.bos_token_id]


def test_no_bos_where_the_family_has_none() -> None:
    hf, tokenizer = pair("qwen")
    assert tokenizer.encode([ClientText("hi")], bos=True) == hf.encode("hi")


def test_a_special_token_that_takes_white_space_with_it() -> None:
    hf, tokenizer = pair("qwen")
    ids = tokenizer.encode([ClientText("the  "), Control("<|wide|>"), ClientText(" \ncat")])
    assert ids == hf.encode("the  <|wide|> \ncat") == hf.encode("the<|wide|>cat")


def test_an_image_token_that_the_tokenizer_lacks() -> None:
    hf = sentencepiece(image=False)
    tokenizer = made(hf, len(hf))
    assert tokenizer.image_token == "<image>" and tokenizer.control_id("<image>") == len(hf)
    ids = tokenizer.encode([Control("USER: "), ImageSlot(), ClientText("what <image>?")])
    assert ids.count(len(hf)) == 1
    assert tokenizer.encode([Control("a<image>b")]).count(len(hf)) == 1


def test_an_image_token_that_is_not_special() -> None:
    from tokenizers import AddedToken

    hf = sentencepiece(image=False)
    hf.add_tokens([AddedToken("<image>", special=False, normalized=False)])
    image_id = hf.convert_tokens_to_ids("<image>")
    tokenizer = made(hf, image_id)
    assert image_id not in tokenizer.encode([ClientText("a <image> b")])
    assert tokenizer.encode([ImageSlot()]).count(image_id) == 1


def test_spelling_of_single_tokens() -> None:
    hf, tokenizer = pair("qwen")
    ids = tokenizer.encode([ClientText("日本 naïf")])
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == "日本 naïf"
    assert tokenizer.token_bytes(10**6) == b"" and tokenizer.token_bytes(len(tokenizer)) == b""
    assert tokenizer.token_text(hf.convert_tokens_to_ids("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.decode([ids[0], 10**6]) == tokenizer.decode(ids[:1])
    _, llama = pair("llama2")
    ids = llama.encode([ClientText("the 日 cat")])[1:]
    assert b"".join(map(llama.token_bytes, ids)).decode() == " the 日 cat"


def test_lone_surrogates_are_refused() -> None:
    for kind in KINDS:
        for text in ("\ud800", "x" * 5000 + "\udfff"):
            with pytest.raises(BadRequest):
                pair(kind)[1].encode([ClientText(text)])


def test_threads() -> None:
    """Control and client text encoded at once on many threads: nothing is switched over between them."""
    hf, tokenizer = pair("llama3")
    segments = [Control("<|start_header_id|>"), ClientText("<|eot_id|> the cat " * 20), Control("<|eot_id|>")]
    expected = tokenizer.encode(segments)
    assert expected.count(hf.eos_token_id) == 1
    with ThreadPoolExecutor(8) as executor:
        assert all(ids == expected for ids in executor.map(lambda _: tokenizer.encode(segments), range(200)))
