"""What is refused, by which status, and whether the reply names the field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from server_helpers import Running, Start, chat_body

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **fields}]}


BAD_CHATS: list[tuple[str, dict[str, Any], str | None]] = [
    # what, body, the param that must be named
    ("no messages", {}, "messages"),
    ("empty messages", {"messages": []}, "messages"),
    ("messages as text", {"messages": "hi"}, "messages"),
    ("unknown role", {"messages": [{"role": "poet", "content": "x"}]}, "messages[0].role"),
    ("a call's id", user("x", tool_call_id="1"), "messages[0].tool_call_id"),
    ("no role", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("user without content", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("content as number", user(1), "messages[0].content"),
    ("text as number", user([{"type": "text", "text": 1}]), "messages[0].content[0].text"),
    ("unknown part", user([{"type": "video_url"}]), "messages[0].content[0].type"),
    ("untyped part", user([{"text": "x"}]), "messages[0].content[0].type"),
    ("image without url", user([{"type": "image_url", "image_url": {}}]), "messages[0].content[0].image_url.url"),
    (
        "detail medium",
        user([{"type": "image_url", "image_url": {"url": "data:,", "detail": "medium"}}]),
        "messages[0].content[0].image_url.detail",
    ),
    ("unknown part field", user([{**IMAGE, "max_pixels": 3}]), "messages[0].content[0].max_pixels"),
    ("video modality", user([{**IMAGE, "modalities": "video"}]), "messages[0].content[0].modalities"),
    ("tool calls", user("x", tool_calls=[{"id": "1"}]), "messages[0].tool_calls"),
    ("unknown message field", user("x", weight=0), "messages[0].weight"),
    ("unknown field", chat_body(max_tokns=1), "max_tokns"),
    ("unknown stream option", chat_body(stream=True, stream_options={"x": 1}), "stream_options.x"),
    ("options without stream", chat_body(stream_options={"include_usage": True}), "stream_options"),
    ("continue a user", chat_body(continue_final_message=True), "continue_final_message"),
    ("two maxima", chat_body(max_tokens=1, max_completion_tokens=2), "max_tokens"),
    ("top_logprobs alone", chat_body(top_logprobs=2), "top_logprobs"),
    ("top_logprobs 21", chat_body(logprobs=True, top_logprobs=21), "top_logprobs"),
    ("tools", chat_body(tools=[{"type": "function"}]), "tools"),
    ("tool_choice", chat_body(tool_choice="required"), "tool_choice"),
    ("frequency_penalty -2.1", chat_body(frequency_penalty=-2.1), "frequency_penalty"),
    ("presence_penalty 2.1", chat_body(presence_penalty=2.1), "presence_penalty"),
    ("bias of no id", chat_body(logit_bias={"red": 2}), "logit_bias"),
    ("bias of id -1", chat_body(logit_bias={"-1": 2}), "logit_bias"),
    ("bias of an id too large", chat_body(logit_bias={"999": 2, "1000": 2}), "logit_bias"),
    ("bias of 101", chat_body(logit_bias={"1": 101}), "logit_bias"),
    ("bias as a list", chat_body(logit_bias=[[1, 2]]), "logit_bias"),
    ("too many biases", chat_body(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias"),
    ("unknown response_format", chat_body(response_format={"type": "structural_tag"}), "response_format.type"),
    (
        "response_format without a schema",
        chat_body(response_format={"type": "json_schema"}),
        "response_format.json_schema",
    ),
    (
        "schema that does not compile",
        chat_body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "bad"}}}),
        "response_format.json_schema.schema",
    ),
    (
        "schema as text",
        chat_body(response_format={"type": "json_schema", "json_schema": {"schema": "{}"}}),
        "response_format.json_schema.schema",
    ),
    ("regex that does not compile", chat_body(regex="bad"), "regex"),
    ("two grammars", chat_body(regex="a", response_format={"type": "json_object"}), "response_format"),
    ("a grammar that may not end", chat_body(ebnf='root ::= "a"', ignore_eos=True), "ignore_eos"),
    ("a grammar that may not end yet", chat_body(ebnf='root ::= "a"', min_tokens=2), "min_tokens"),
    ("store", chat_body(store=True), "store"),
    ("audio", chat_body(modalities=["text", "audio"]), "modalities"),
    ("empty stop", chat_body(stop=""), "stop"),
    ("empty stop in list", chat_body(stop=["a", ""]), "stop"),
    ("too many stops", chat_body(stop=[str(i) for i in range(17)]), "stop"),
    ("stop as number", chat_body(stop=3), "stop"),
    ("negative stop id", chat_body(stop_token_ids=[-1]), "stop_token_ids"),
    ("n 0", chat_body(n=0), "n"),
    ("n 17", chat_body(n=17), "n"),
    ("n float", chat_body(n=1.5), "n"),
    ("n bool", chat_body(n=True), "n"),
    ("max_tokens 0", chat_body(max_tokens=0), "max_tokens"),
    ("max_completion_tokens -1", chat_body(max_completion_tokens=-1), "max_completion_tokens"),
    ("min_tokens -1", chat_body(min_tokens=-1), "min_tokens"),
    ("min_tokens above max_tokens", chat_body(max_tokens=4, min_tokens=5), "min_tokens"),
    ("temperature -1", chat_body(temperature=-0.1), "temperature"),
    ("temperature 2.1", chat_body(temperature=2.1), "temperature"),
    ("temperature text", chat_body(temperature="hot"), "temperature"),
    ("top_p 0", chat_body(top_p=0), "top_p"),
    ("top_p 1.1", chat_body(top_p=1.1), "top_p"),
    ("top_k -2", chat_body(top_k=-2), "top_k"),
    ("min_p 2", chat_body(min_p=2), "min_p"),
    ("repetition_penalty 0", chat_body(repetition_penalty=0), "repetition_penalty"),
    ("seed too large", chat_body(seed=2**63), "seed"),
    ("stream text", chat_body(stream="yes"), "stream"),
]


@pytest.mark.parametrize("body, param", [it[1:] for it in BAD_CHATS], ids=[it[0] for it in BAD_CHATS])
@pytest.mark.parametrize("streams", [False, True])
async def test_bad_chat(server: Running, body: dict[str, Any], param: str, streams: bool) -> None:
    if streams and not {"stream", "stream_options"} & set(body):
        body = {**body, "stream": True}
    status, reply = await server.post("/v1/chat/completions", body)
    assert status == 400, reply
    error = reply["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and param in error["message"]
    assert not server.service.engine.params, "nothing was submitted"


@pytest.mark.parametrize(
    "body, word",
    [
        (b"", "empty"),
        (b"  ", "empty"),
        (b'{"messages": [}', "byte 14"),
        (b'{"messages": [', "truncated"),
        (b"\xff", "JSON"),
        (b"[]", "object"),
        (b'{"temperature": NaN}', "byte"),
        (b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', "JSON"),
        (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "JSON"),
        (b'{"metadata":{"a":' + b"[" * 100_000, "JSON"),
        (b'{"unheard_of":' * 900 + b"1" + b"}" * 900, ""),  # as deep as a recursive function just cannot go
    ],
)
async def test_bad_json(server: Running, body: bytes, word: str) -> None:
    for path in ("/v1/chat/completions", "/generate"):
        status, reply = await server.post(path, data=body)
        assert status == 400 and word in reply["error"]["message"], reply


async def test_infinite_numbers(server: Running) -> None:
    status, reply = await server.post(
        "/v1/chat/completions", data=json.dumps(chat_body(temperature=7)).replace("7", "1e999")
    )
    assert status == 400 and reply["error"]["param"] == "temperature", reply


async def test_deep_nesting_in_an_accepted_field(server: Running) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    body = '{"messages":[{"role":"user","content":"x"}],"metadata":{"a":' + deep + "}}"
    status, reply = await server.post("/v1/chat/completions", data=body)
    assert status == 400 and reply["error"]["type"] == "invalid_request_error", reply


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nxxxxx",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\nxxxxx\r\n",
        b"Content-Length: five\r\n\r\nxxxxx",
    ],
)
async def test_broken_transfer(server: Running, head: bytes, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + head)
    status = await asyncio.wait_for(reader.readline(), 2)
    assert status.startswith(b"HTTP/1.1 400") or status.startswith(b"HTTP/1.0 400"), status
    writer.close()
    assert "Traceback" not in caplog.text


async def test_unknown_model(server: Running) -> None:
    status, reply = await server.chat(model="gpt-9")
    assert status == 404 and reply["error"]["code"] == "model_not_found" and reply["error"]["param"] == "model"


async def test_unknown_route_and_method(server: Running) -> None:
    status, reply = await server.post("/v1/nothing", {})
    assert status == 404 and "/v1/nothing" in reply["error"]["message"]
    status, reply = await server.get("/v1/chat/completions")
    assert status == 405 and reply["error"]["type"] == "invalid_request_error"
    async with server.session.get(server.url + "/generate") as response:
        assert response.headers["Allow"] == "POST"


async def test_too_large(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightvl.server.body.MAX_BODY_BYTES", 1000)
    status, reply = await server.post("/v1/chat/completions", data=b"x" * 1001)
    assert status == 413 and reply["error"]["type"] == "invalid_request_error"


async def test_too_large_without_a_length(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightvl.server.body.MAX_BODY_BYTES", 1000)

    async def endless() -> Any:
        for _ in range(10_000):
            yield b"x" * 1000

    status, reply = await server.post("/v1/chat/completions", data=endless())
    assert status == 413 and "limit" in reply["error"]["message"]


async def test_large_bodies_are_taken(server: Running) -> None:
    body = chat_body("x")
    body["messages"].insert(0, {"role": "user", "content": [{**IMAGE, "image_url": {"url": "A" * (3 << 20)}}]})
    assert (await server.post("/v1/chat/completions", body))[0] == 200
    assert server.service.prompts.images[0].url == "A" * (3 << 20)
    body["oops"] = 1
    status, reply = await server.post("/v1/chat/completions", body)
    assert status == 400 and reply["error"]["param"] == "oops"


async def test_api_key(start: Start) -> None:
    server = await start(api_key="sesam")
    for headers, code in (({}, 401), ({"Authorization": "Bearer nö"}, 401), ({"Authorization": "sesam"}, 401)):
        async with server.session.get(server.url + "/v1/models", headers=headers) as response:
            error = (await response.json())["error"]
            assert response.status == code and error["code"] == "invalid_api_key" and "sesam" not in str(error)
            assert response.headers["WWW-Authenticate"] == "Bearer"
    assert (await server.chat())[0] == 401
    assert (await server.get("/v1/models", headers={"Authorization": "Bearer sesam"}))[0] == 200
    assert (await server.get("/health"))[0] == 200
