"""Prompts told and taken apart without generating."""

from __future__ import annotations

from server_fakes import IMAGE_TOKENS
from server_helpers import Running, chat_body


async def test_render_tells_the_prompt_and_generates_nothing(server: Running) -> None:
    content = [{"type": "image_url", "image_url": {"url": "AAAA"}}, {"type": "text", "text": "Hi"}]
    status, reply = await server.post(
        "/v1/chat/completions/render", {"messages": [{"role": "user", "content": content}]}
    )
    assert status == 200 and reply["prompt"].endswith("Hi")
    assert reply["num_images"] == 1 and reply["image_tokens"] == IMAGE_TOKENS
    assert reply["prompt_tokens"] == IMAGE_TOKENS + 2
    assert server.service.engine.params == []


async def test_render_refuses_what_a_completion_would_refuse(server: Running) -> None:
    status, reply = await server.post("/v1/chat/completions/render", chat_body(tools=[{"type": "function"}]))
    assert status == 400 and reply["error"]["param"] == "tools"


async def test_tokenize_and_back(server: Running) -> None:
    status, reply = await server.post("/v1/tokenize", {"prompt": "Hi", "model": "default"})
    assert status == 200 and reply["tokens"] == [1, 72, 105] and reply["count"] == 3
    _, plain = await server.post("/v1/tokenize", {"prompt": "Hi", "add_special_tokens": False})
    assert plain["tokens"] == [72, 105]
    _, text = await server.post("/v1/detokenize", {"tokens": reply["tokens"]})
    assert text == {"text": "Hi"}
    _, text = await server.post("/v1/detokenize", {"tokens": reply["tokens"], "skip_special_tokens": False})
    assert text == {"text": "\x01Hi"}


async def test_bad_requests(server: Running) -> None:
    for path, body, param in (
        ("/v1/tokenize", {"prompt": 3}, "prompt"),
        ("/v1/tokenize", {}, "prompt"),
        ("/v1/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/detokenize", {"tokens": [1], "colour": "red"}, "colour"),
    ):
        status, reply = await server.post(path, body)
        assert status == 400 and reply["error"]["param"] == param
    status, reply = await server.post("/v1/tokenize", {"prompt": "a", "model": "other"})
    assert status == 404 and reply["error"]["code"] == "model_not_found"
