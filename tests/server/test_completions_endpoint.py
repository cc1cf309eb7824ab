"""OpenAI's older completions, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_helpers import Running

from lightvl.core import Delta, Finish, TokenLogprob

PATH = "/v1/completions"


async def test_whole_reply(server: Running) -> None:
    status, reply = await server.post(PATH, {"prompt": "Hello", "model": "fake/model", "max_tokens": 50})
    assert status == 200 and reply.pop("id").startswith("cmpl-") and isinstance(reply.pop("created"), int)
    choice = {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "matched_stop": 7}
    details = {"cached_tokens": 3, "image_tokens": 0}
    usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10, "prompt_tokens_details": details}
    assert reply == {"object": "text_completion", "model": "fake/model", "choices": [choice], "usage": usage}


async def test_sixteen_tokens_by_default(server: Running) -> None:
    _, reply = await server.post(PATH, {"prompt": "x" * 200, "n": 2})
    assert [choice["text"] for choice in reply["choices"]] == ["x" * 16] * 2
    assert [choice["finish_reason"] for choice in reply["choices"]] == ["length"] * 2
    assert reply["usage"]["completion_tokens"] == 32


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"], [72, 105], [[72, 105]]])
async def test_forms_of_one_prompt(server: Running, prompt: Any) -> None:
    status, reply = await server.post(PATH, {"prompt": prompt})
    assert status == 200 and reply["choices"][0]["text"] == "Hi"


async def test_logprobs(server: Running) -> None:
    _, reply = await server.post(PATH, {"prompt": "abc", "logprobs": 2})
    assert reply["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}, {"c": -0.5, "d": -1.5}],
        "text_offset": [0, 1, 2],
    }
    _, reply = await server.post(PATH, {"prompt": "a", "logprobs": 0})
    assert reply["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}]


async def test_stream(server: Running) -> None:
    body = {"prompt": "ab", "n": 2, "logprobs": 1, "stream": True}
    *events, done = await server.events(PATH, body)
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]" and len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["object"] == "text_completion" and "usage" not in chunk for chunk in chunks)
    for idx in range(2):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == idx]
        assert [choice["text"] for choice in mine] == ["a", "b", ""]
        assert [choice["logprobs"]["text_offset"] for choice in mine] == [[0], [1], []]
        assert [choice["finish_reason"] for choice in mine] == [None, None, "stop"]
        assert [choice["matched_stop"] for choice in mine] == [None, None, 7]


async def test_usage_ends_a_stream(server: Running) -> None:
    body = {"prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = [json.loads(event) for event in (await server.events(PATH, body))[:-1]]
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 4


async def test_text_that_is_held_back(server: Running) -> None:
    async def script(prompt: Any, params: Any) -> Any:
        yield Delta(0, "", [65])
        yield Delta(0, "", [66])
        yield Delta(
            0, "AB", [67, 9], [TokenLogprob(67, float("-inf")), TokenLogprob(9, -1.0)], Finish("stop", 9, 5, 4, 0)
        )

    server.service.engine.script = script
    events = await server.events(PATH, {"prompt": "a", "logprobs": 0, "stream": True})
    (choice,) = json.loads(events[0])["choices"]
    assert len(events) == 2 and choice["text"] == "AB" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["token_logprobs"] == [-9999.0], "without the stop token"


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, True]}, "prompt[1]"),
        ({"prompt": "a" * 2000}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 17}, "min_tokens"),
        ({"prompt": "a", "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
async def test_refused(server: Running, body: dict[str, Any], param: str) -> None:
    status, reply = await server.post(PATH, body)
    assert status == 400 and reply["error"]["param"] == param and param in reply["error"]["message"], reply
    assert not server.service.engine.params, "nothing was submitted"


async def test_values_that_change_nothing(server: Running) -> None:
    neutral = {"echo": False, "best_of": 1, "suffix": "", "user": "me", "logprobs": None, "stop": None, "min_tokens": 0}
    assert (await server.post(PATH, {"prompt": "a", **neutral}))[0] == 200


async def test_another_model(server: Running) -> None:
    status, reply = await server.post(PATH, {"prompt": "a", "model": "gpt-9"})
    assert status == 404 and reply["error"]["code"] == "model_not_found"
