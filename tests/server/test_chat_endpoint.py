"""Chat completions, whole and streamed, as OpenAI has them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_fakes import FakeGrammar
from server_helpers import Running, Start, chat_body

from lightvl.core import Delta, Finish, ImagePart, Message, TextPart, TokenLogprob


async def test_whole_reply(server: Running) -> None:
    status, reply = await server.chat(max_tokens=50)
    assert status == 200
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion"
    assert reply["model"] == "fake/model" and isinstance(reply["created"], int)
    (choice,) = reply["choices"]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hello", "refusal": None, "tool_calls": None},
        "logprobs": None,
        "finish_reason": "stop",
        "matched_stop": 7,
    }
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 5,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 3, "image_tokens": 0},
    }


async def test_length(server: Running) -> None:
    _, reply = await server.chat(max_completion_tokens=2)
    assert reply["choices"][0]["message"]["content"] == "He"
    assert reply["choices"][0]["finish_reason"] == "length" and reply["choices"][0]["matched_stop"] is None


@pytest.mark.parametrize("model", [None, "default", "fake/model", "fake"])
async def test_known_models(server: Running, model: str | None) -> None:
    assert (await server.chat(model=model))[0] == 200


async def test_stream(server: Running) -> None:
    *chunks, done = await server.events("/v1/chat/completions", chat_body('Hi "é\n', stream=True))
    assert done == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert len({chunk["id"] for chunk in parsed}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in parsed)
    assert parsed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in parsed) == 'Hi "é\n'
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed] == [None] * (len(parsed) - 1) + ["stop"]
    assert parsed[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
        "matched_stop": 7,
    }


async def test_stream_with_usage(server: Running) -> None:
    body = chat_body(stream=True, stream_options={"include_usage": True}, n=2)
    *chunks, done = await server.events("/v1/chat/completions", body)
    parsed = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]" and all(chunk["usage"] is None for chunk in parsed[:-1])
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3, "image_tokens": 0}
    assert parsed[-1]["usage"]["completion_tokens"] == 10 and parsed[-1]["usage"]["prompt_tokens"] == 5
    for choice in range(2):
        mine = [chunk["choices"][0] for chunk in parsed[:-1] if chunk["choices"][0]["index"] == choice]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(it["delta"].get("content", "") for it in mine) == "Hello"
        assert mine[-1]["finish_reason"] == "stop"


async def test_choices(server: Running) -> None:
    status, reply = await server.chat(n=3, temperature=0)
    assert status == 200 and [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert all(choice["message"]["content"] == "Hello" for choice in reply["choices"])


async def test_logprobs(server: Running) -> None:
    _, reply = await server.chat("é", logprobs=True, top_logprobs=2)
    (entry,) = reply["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "é" and entry["bytes"] == [0xC3, 0xA9] and entry["logprob"] == -0.5
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5]
    _, reply = await server.chat("é", logprobs=True)
    assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_streamed_logprobs_of_held_back_text(server: Running) -> None:
    """A token whose text is held back still brings its logprob; deltas with neither bring no chunk."""

    async def script(prompt: Any, params: Any) -> Any:
        yield Delta(0, "", [65], [TokenLogprob(65, float("-inf"))])
        yield Delta(0, "", [66])
        yield Delta(0, "AB", [67], [TokenLogprob(66, -1.0)], Finish("stop", "x", 5, 3, 0))

    server.service.engine.script = script
    body = chat_body(stream=True, logprobs=True)
    chunks = [json.loads(chunk) for chunk in (await server.events("/v1/chat/completions", body))[:-1]]
    assert len(chunks) == 4
    assert chunks[1]["choices"][0]["logprobs"]["content"][0]["logprob"] == -9999.0
    assert chunks[2]["choices"][0]["delta"] == {"content": "AB"}
    assert chunks[3]["choices"][0]["matched_stop"] == "x"


async def test_messages_reach_the_builder(server: Running) -> None:
    url = "data:image/png;base64,AAAA"
    messages = [
        {"role": "developer", "content": "Be brief.", "name": "boss"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "a"},
                {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
                {"type": "text", "text": "b"},
                {"type": "image_url", "image_url": {"url": url, "detail": None}, "modalities": "multi-images"},
                {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "annotations": []},
        {"role": "assistant", "content": "It"},
    ]
    body = {"messages": messages, "continue_final_message": True}
    status, reply = await server.post("/v1/chat/completions", body)
    assert status == 200 and server.service.prompts.continued
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == 12
    assert list(server.service.prompts.messages) == [
        Message("system", (TextPart("Be brief."),)),
        Message(
            "user",
            (
                TextPart("a"),
                ImagePart(url, "messages[1].content[1].image_url.url"),
                TextPart("b"),
                ImagePart(url, "messages[1].content[3].image_url.url"),
                ImagePart(url, "messages[1].content[4].image_url.url", max_side=512),
            ),
        ),
        Message("assistant", ()),
        Message("assistant", (TextPart("It"),)),
    ]


async def test_params_reach_the_engine(server: Running) -> None:
    fields = dict(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, seed=-1, stop=["a", "b", "a"], n=2,
        frequency_penalty=-0.5, presence_penalty=2, logit_bias={"0": -100, "999": 2.5}, unheard_of=None,
        logprobs=True, top_logprobs=5, skip_special_tokens=False, stop_token_ids=[11], max_tokens=9, min_tokens=9,
    )  # fmt: skip
    assert (await server.chat(**fields))[0] == 200
    (params,) = server.service.engine.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.repetition_penalty, params.seed, params.n, params.top_logprobs) == (1.1, 2**64 - 1, 2, 5)
    assert (params.frequency_penalty, params.presence_penalty) == (-0.5, 2)
    assert params.logit_bias == ((0, -100), (999, 2.5))
    assert params.stop == ("a", "b", "<end>") and params.stop_token_ids == {7, 11}
    assert params.keep_special_tokens and params.max_tokens == params.min_tokens == 9


@pytest.mark.parametrize(
    "fields, grammar",
    [
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type":"object"}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}},
            ("json_schema", '{"type":"object"}'),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["ä", 1.5, None]}}}},
            ("json_schema", '{"enum":["ä",1.5,null]}'),
        ),
        ({"regex": "[a-z]+"}, ("regex", "[a-z]+")),
        ({"ebnf": 'root ::= "a"'}, ("ebnf", 'root ::= "a"')),
    ],
)
async def test_grammars_reach_the_engine(server: Running, fields: dict[str, Any], grammar: tuple[Any, str]) -> None:
    assert (await server.chat(**fields))[0] == 200
    assert (await server.post("/v1/completions", {"prompt": "x", **fields}))[0] == 200
    name, value = next(iter(fields.items()))
    if name == "response_format":
        name, value = "json_schema", grammar[1]
    assert (await server.post("/generate", {"text": "x", "sampling_params": {name: value}}))[0] == 200
    assert [params.grammar for params in server.service.engine.params] == [FakeGrammar(*grammar)] * 3


async def test_defaults(start: Start) -> None:
    server = await start(info={"sampling_defaults": {"temperature": 0.25, "top_k": 5}}, random_seed=1)
    await server.chat(ignore_eos=True, top_k=-1)
    await server.chat()
    first, second = server.service.engine.params
    assert (first.temperature, first.top_p, first.top_k, second.top_k) == (0.25, 1.0, 0, 5)
    assert first.max_tokens == 2000 - 5, "to the context's end"
    assert first.stop == () and first.stop_token_ids == frozenset()
    assert first.seed != second.seed
    again = await start(random_seed=1)
    await again.chat()
    assert again.service.engine.params[0].seed == first.seed


async def test_neutral_values_count_as_absent(server: Running) -> None:
    neutral = {
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": True, "functions": [], "response_format": {"type": "text"}, "modalities": ["text"],
        "store": False, "service_tier": "auto", "user": "me", "metadata": {"a": "b"}, "safety_identifier": "x",
        "prompt_cache_key": "y", "top_logprobs": 0, "logprobs": False, "n": 1, "stop": None, "reasoning_effort": None,
        "never_heard_of": None, "stream": False, "regex": None, "seed": None, "max_tokens": None, "min_tokens": 0,
    }  # fmt: skip
    status, reply = await server.chat(**neutral)
    assert status == 200, reply


async def test_max_tokens_are_bounded_by_the_context(server: Running) -> None:
    assert (await server.chat(max_tokens=10**9))[0] == 200
    assert server.service.engine.params[0].max_tokens == 1995
    status, reply = await server.chat("x" * 2000)
    assert status == 400 and reply["error"]["code"] == "context_length_exceeded"
    assert reply["error"]["param"] == "messages" and "2000" in reply["error"]["message"]
    assert (await server.chat("x" * 1999))[0] == 200


async def test_the_tool_role_reaches_the_template(server: Running) -> None:
    messages = [{"role": "user", "content": "A"}, {"role": "tool", "content": "B", "tool_call_id": "call_1"}]
    status, _ = await server.post("/v1/chat/completions", {"messages": messages})
    assert status == 200 and [message.role for message in server.service.prompts.messages] == ["user", "tool"]
