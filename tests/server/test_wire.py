"""Pieces below the endpoints: metrics, frames, decoding and range checks, by properties where they fit."""

from __future__ import annotations

import json
import random
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_fakes import FakePrompts

from lightvl.core import Finish, SamplingParams
from lightvl.errors import BadRequest
from lightvl.metrics import Metrics
from lightvl.server import large_strings
from lightvl.server.body import decode
from lightvl.server.chat import ChunkTemplate
from lightvl.server.params import sampling_params
from lightvl.server.schema import ChatRequest, PromptTokensDetails, Usage
from lightvl.server.sse import frame

FIELDS = sorted(ChatRequest.__struct_fields__)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(), st.text(), st.booleans())
def test_chunks_are_json_on_one_line(text: str, stop: str, with_usage: bool) -> None:
    template = ChunkTemplate("chatcmpl-1", 'a "model"', with_usage)
    finish = Finish("stop", stop, 1, 2, 3)
    for data in (template.role(1), template.text(1, text), template.finish(1, finish)):
        assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
        chunk = json.loads(data[6:])
        assert chunk["model"] == 'a "model"' and chunk["choices"][0]["index"] == 1
        assert ("usage" in chunk) == with_usage
    assert json.loads(template.text(0, text)[6:])["choices"][0]["delta"]["content"] == text
    assert json.loads(template.finish(0, finish)[6:])["choices"][0]["matched_stop"] == stop
    usage = json.loads(template.usage(Usage(1, 2, 3, PromptTokensDetails(0, 0)))[6:])
    assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 3


def test_frame() -> None:
    assert frame(b"{}") == b"data: {}\n\n"


@given(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), json_values, max_size=5))
def test_any_json_is_decoded_or_refused(body: dict[str, Any]) -> None:
    """Never another exception, and a refusal has a message that a client can read."""
    try:
        decode(json.dumps(body).encode("utf-8", "surrogatepass"), ChatRequest)
    except BadRequest as error:
        assert error.message


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(-1, 3),
            "top_p": st.floats(-1, 2),
            "top_k": st.integers(-3, 100),
            "min_p": st.floats(-1, 2),
            "repetition_penalty": st.floats(-1, 3),
            "frequency_penalty": st.floats(-3, 3),
            "presence_penalty": st.floats(-3, 3),
            "logit_bias": st.dictionaries(st.integers(-1, 1001), st.floats(-101, 101), max_size=3),
            "seed": st.integers(-(2**64), 2**64),
            "n": st.integers(-1, 20),
        },
    )
)
def test_params_hold_their_ranges(fields: dict[str, Any]) -> None:
    wire = msgspec.convert({"messages": [], **fields}, ChatRequest)
    try:
        params = sampling_params(
            wire,
            max_tokens=1,
            min_tokens=0,
            top_logprobs=None,
            defaults={},
            prompts=FakePrompts(),
            seeds=random.Random(0),
        )
    except BadRequest as error:
        assert error.param in fields and error.param in error.message
        return
    assert isinstance(params, SamplingParams)
    assert 0 <= params.temperature <= 2 and 0 < params.top_p <= 1 and params.top_k >= 0 and 0 <= params.min_p <= 1
    assert -2 <= params.frequency_penalty <= 2 and -2 <= params.presence_penalty <= 2
    assert all(0 <= token_id < 1000 and -100 <= bias <= 100 for token_id, bias in params.logit_bias)
    assert 0 < params.repetition_penalty <= 2 and 0 <= params.seed < 2**64 and 1 <= params.n <= 16


long_texts = st.builds(
    lambda piece, num, end: piece * num + end,
    st.sampled_from(["A", "data:a/b,", "/", "é", '"', "\\", " x", ",", "\n", '\\"A']),
    st.integers(0, 40),
    st.text(max_size=3),
)
long_json = st.recursive(
    long_texts | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(long_texts, inner, max_size=3),
    max_leaves=8,
)


@given(long_json, st.booleans(), st.sampled_from([None, 1]))
def test_long_strings_are_taken_out_and_put_back(value: Any, ascii_only: bool, indent: int | None) -> None:
    data = json.dumps({"k": value}, ensure_ascii=ascii_only, indent=indent).encode()
    expected = json.loads(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_strings, "LONG_BYTES", 8)
        rest, texts = large_strings.take_out(data)
    shown = json.loads(rest)
    assert all(len(text) >= 8 for text in texts.values())
    # keys stay placeholders: no field has a name that long
    assert without_keys(large_strings.put_back(shown, texts)) == without_keys(expected)


def without_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return [without_keys(item) for item in value.values()]
    return [without_keys(item) for item in value] if isinstance(value, list) else value


def test_long_strings_leave_no_trace_in_the_rest() -> None:
    url = "data:image/png;base64," + "A" * 100_000
    data = json.dumps({"messages": [{"role": "user", "content": url}], "stop": ["x", url]}).encode()
    rest, texts = large_strings.take_out(data)
    assert len(rest) < 300 and list(texts.values()) == [url, url]
    wire = large_strings.put_back(decode(rest, ChatRequest), texts)
    assert wire.messages[0].content == url and wire.stop == ["x", url]


def test_broken_json_stays_broken() -> None:
    for broken in (b'{"a" AAAA', b'{"a"AAAA', b'{"a": "b" "'):
        rest, _ = large_strings.take_out(broken + b"A" * 100_000 + b'"}')
        with pytest.raises(ValueError):
            json.loads(rest)


def test_nulls_of_unknown_fields_pass_at_any_depth() -> None:
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": None}], "weight": None}
        ],
        "new_field": None,
    }
    assert decode(json.dumps(body).encode(), ChatRequest).messages[0].role == "user"
    body["messages"][0]["weight"] = 1  # type: ignore[index]
    with pytest.raises(BadRequest, match=r"messages\[0\].weight"):
        decode(json.dumps(body).encode(), ChatRequest)


def test_metrics() -> None:
    metrics = Metrics()
    metrics.add("images_decoded_total")
    metrics.add("images_decoded_total", 2)
    metrics.gauge("num_running", lambda: 5)
    for value in (0.005, 0.006, 1000):
        metrics.observe("time_seconds", value, (0.005, 0.1))
    assert metrics.value("images_decoded_total") == 3 and metrics.value("num_running") == 5
    assert metrics.value("never_total") == 0
    assert metrics.render() == (
        "# TYPE lightvl:images_decoded_total counter\nlightvl:images_decoded_total 3\n"
        "# TYPE lightvl:num_running gauge\nlightvl:num_running 5\n"
        "# TYPE lightvl:time_seconds histogram\n"
        'lightvl:time_seconds_bucket{le="0.005"} 1\nlightvl:time_seconds_bucket{le="0.1"} 2\n'
        'lightvl:time_seconds_bucket{le="+Inf"} 3\n'
        "lightvl:time_seconds_sum 1000.011\nlightvl:time_seconds_count 3\n"
    )


def test_metrics_from_threads() -> None:
    metrics = Metrics()

    def count() -> None:
        for _ in range(20_000):
            metrics.add("x_total")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.value("x_total") == 80_000
