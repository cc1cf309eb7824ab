"""The four clients of the tutorial, unchanged: curl, requests, the openai client, and two images in one message."""

from __future__ import annotations

import asyncio
import json
import subprocess

import openai
import pytest
import requests
from server_helpers import Running, Start

IMAGE_URL = "https://github.com/sgl-project/sglang/blob/main/test/lang/example_image.png?raw=true"
LOGO_URL = "https://raw.githubusercontent.com/sgl-project/sglang/main/assets/logo.png"


def image(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


async def test_curl(server: Running) -> None:
    command = f"""
curl -s http://localhost:{server.port}/v1/chat/completions \\
  -d '{{
    "model": "fake/model",
    "messages": [
      {{
        "role": "user",
        "content": [
          {{
            "type": "text",
            "text": "What’s in this image?"
          }},
          {{
            "type": "image_url",
            "image_url": {{
              "url": "{IMAGE_URL}"
            }}
          }}
        ]
      }}
    ],
    "max_tokens": 300
  }}'
"""
    output = await asyncio.to_thread(subprocess.check_output, command, shell=True)
    assert json.loads(output)["choices"][0]["message"]["content"] == "What’s in this image?"
    assert server.service.prompts.images[0].url == IMAGE_URL


async def test_requests(server: Running) -> None:
    data = {
        "model": "fake/model",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What’s in this image?"}, image(IMAGE_URL)]}
        ],
        "max_tokens": 300,
    }
    response = await asyncio.to_thread(requests.post, server.url + "/v1/chat/completions", json=data)
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "What’s in this image?"
    assert response.headers["x-request-id"].startswith("req-")


@pytest.fixture
async def client(server: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="None", max_retries=0)


async def test_openai(server: Running, client: openai.AsyncOpenAI) -> None:
    reply = await client.chat.completions.create(
        model="fake/model",
        messages=[
            {"role": "user", "content": [image(IMAGE_URL), image(LOGO_URL), {"type": "text", "text": "Compare."}]}
        ],  # type: ignore[list-item, misc]
        temperature=0,
    )
    assert reply.choices[0].message.content == "Compare."
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    assert [part.url for part in server.service.prompts.images] == [IMAGE_URL, LOGO_URL]
    # its own reply can be sent back as history
    history = [{"role": "user", "content": "Hi"}, reply.choices[0].message, {"role": "user", "content": "Again"}]
    again = await client.chat.completions.create(model="default", messages=history)  # type: ignore[arg-type]
    assert again.choices[0].message.content == "Again"
    dumped = [history[0], reply.choices[0].message.model_dump(), history[2]]
    again = await client.chat.completions.create(model="default", messages=dumped)  # type: ignore[arg-type]
    assert again.choices[0].message.content == "Again"


async def test_openai_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Count: 1 2 3"}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=1,
    )
    text, usage, num_logprobs = "", None, 0
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            num_logprobs += len(choice.logprobs.content or ()) if choice.logprobs else 0
        usage = chunk.usage
    assert text == "Count: 1 2 3" and num_logprobs == 12
    assert usage is not None and usage.completion_tokens == 12


async def test_openai_errors(start: Start, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="default", messages=[{"role": "user", "content": "x"}], n=99)
    assert bad.value.param == "n" and bad.value.request_id
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "x"}])
    assert [model.id async for model in client.models.list()] == ["fake/model"]
    assert (await client.models.retrieve("fake/model")).id == "fake/model"
    locked = await start(api_key="k")
    stranger = openai.AsyncOpenAI(base_url=locked.url + "/v1", api_key="None", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        await stranger.models.list()


async def test_openai_hears_of_an_error_in_the_stream(server: Running, client: openai.AsyncOpenAI) -> None:
    server.service.engine.error = RuntimeError("inside")
    server.service.engine.break_after = 2
    stream = await client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Hello"}], stream=True
    )
    with pytest.raises(openai.APIError, match="request id req-"):
        async for _ in stream:
            pass
