"""The real command in a process of its own: the embedded model's files, the tutorial's four clients, and the end."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import openai
import pydantic
import pytest
import requests
from e2e_helpers import Running, chat, end, image_part, launch, text_part
from parity_helpers import data_url, noise_image
from tiny_models import tiny_mllama


@pytest.fixture(scope="module")
def demo() -> Iterator[Running]:
    running = launch()
    yield running
    end(running)


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("mllama")
    tiny_mllama(folder)
    name = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    running = launch("--model-path", str(folder), "--chat-template=llama_3_vision", "--served-model-name", name)
    yield running
    end(running)


def test_the_curl_that_the_greeting_tells_answers(demo: Running) -> None:
    command = demo.greeting[demo.greeting.index("\ncurl ") :]
    reply = json.loads(subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60).stdout)
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["prompt_tokens_details"]["image_tokens"] > 0


def test_the_same_image_in_three_forms_is_decoded_and_encoded_once(demo: Running) -> None:
    url = data_url(noise_image(113, 87, 4))
    question = text_part("What is in this image?")
    decodes, encodes = demo.metric("image_decodes_total"), demo.metric("images_encoded_total")
    replies = [
        chat(demo, [image_part(form), question], temperature=0)
        for form in (url, url.split(",")[1], url.replace("image/png", "image/*"))
    ]
    assert len({reply["choices"][0]["message"]["content"] for reply in replies}) == 1
    for reply in replies[1:]:
        usage = reply["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 16
    assert demo.metric("image_decodes_total") == decodes + 1
    assert demo.metric("images_encoded_total") == encodes + 1


@pytest.mark.parametrize("name", ["demo", "mllama"])
def test_openai_client(name: str, request: pytest.FixtureRequest) -> None:
    running: Running = request.getfixturevalue(name)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="None")
    images = [image_part(data_url(noise_image(100 + 40 * i, 90, i))) for i in range(2)]
    messages: Any = [{"role": "user", "content": [*images, text_part("Describe both.")]}]
    whole = client.chat.completions.create(model=running.model, messages=messages, max_tokens=16, temperature=0)
    stream = client.chat.completions.create(
        model=running.model,
        messages=messages,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens  # type: ignore[union-attr]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


class Shape(pydantic.BaseModel):
    shape: Literal["circle", "square", "star"]
    colour: Literal["red", "blue"]
    count: Annotated[int, pydantic.Field(ge=0, le=9)]
    note: Annotated[str, pydantic.Field(max_length=9)] | None


@pytest.mark.parametrize("name", ["demo", "mllama"])
def test_answers_in_the_clients_own_schema(name: str, request: pytest.FixtureRequest) -> None:
    running: Running = request.getfixturevalue(name)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="None")

    def ask(seed: int) -> list[Shape | None]:
        content: Any = [image_part(data_url(noise_image(120, 90, seed))), text_part("What is there?")]
        whole = client.chat.completions.parse(
            model=running.model,
            messages=[{"role": "user", "content": content}],
            response_format=Shape,
            max_tokens=1000,  # a random model goes on with white space as long as it may
            temperature=1,
            seed=seed,
            n=2,
        )
        assert [choice.finish_reason for choice in whole.choices] == ["stop", "stop"]
        return [choice.message.parsed for choice in whole.choices]

    hello = [text_part("Hello!")]
    with ThreadPoolExecutor(8) as pool:
        plain = pool.submit(chat, running, hello, temperature=0)
        assert all(isinstance(parsed, Shape) for both in pool.map(ask, range(8)) for parsed in both)
    assert plain.result()["choices"] == chat(running, hello, temperature=0)["choices"]

    with client.chat.completions.stream(
        model=running.model, messages=[{"role": "user", "content": "A shape?"}], response_format=Shape, temperature=0
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Shape)


def test_a_rendered_chat_goes_on_as_the_chat_itself(demo: Running) -> None:
    messages: Any = [{"role": "user", "content": "What can you do?"}]
    rendered = requests.post(f"{demo.url}/v1/chat/completions/render", json={"messages": messages}, timeout=60).json()
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="None")
    reply = client.chat.completions.create(model=demo.model, messages=messages, max_tokens=40, temperature=0)
    fields: Any = {"model": demo.model, "prompt": rendered["prompt"], "max_tokens": 40, "temperature": 0, "logprobs": 1}
    whole, chunks = client.completions.create(**fields), list(client.completions.create(**fields, stream=True))
    assert whole.choices[0].text == reply.choices[0].message.content
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert whole.usage.prompt_tokens == reply.usage.prompt_tokens == rendered["prompt_tokens"]  # type: ignore[union-attr]
    told = whole.choices[0].logprobs
    assert told is not None and "".join(told.tokens or ()) == whole.choices[0].text
    assert all(
        whole.choices[0].text[at:].startswith(token) for at, token in zip(told.text_offset, told.tokens, strict=True)
    )  # type: ignore[arg-type]


def test_curl_without_a_content_type(mllama: Running) -> None:
    body = json.dumps(
        {
            "model": mllama.model,
            "messages": [
                {
                    "role": "user",
                    "content": [text_part("What’s in this image?"), image_part(data_url(noise_image(70, 50, 2)))],
                }
            ],
            "max_tokens": 5,
        }
    )
    out = subprocess.run(
        ["curl", "-s", f"{mllama.url}/v1/chat/completions", "-d", "@-"], input=body.encode(), capture_output=True
    ).stdout
    reply = json.loads(out)
    assert reply["object"] == "chat.completion" and reply["usage"]["completion_tokens"] <= 5


def test_sixteen_streams_and_one_that_leaves(demo: Running) -> None:
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="None")

    def one(i: int) -> str:
        stream = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": f"Tell me about number {i}."}],
            max_tokens=24,
            stream=True,
            seed=i,
            extra_body={"ignore_eos": True},
        )
        if i == 3:
            next(iter(stream))
            stream.close()
            return "left"
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        return "done"

    with ThreadPoolExecutor(16) as threads:
        assert sorted(set(threads.map(one, range(16)))) == ["done", "left"]
    deadline = time.monotonic() + 5
    while demo.metric("num_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert demo.metric("num_running") == demo.metric("kv_pages_held") == 0


def test_a_file_url_and_a_private_address_are_refused(demo: Running) -> None:
    for url in ("file:///etc/passwd", "http://127.0.0.1:1/x.png", "http://169.254.169.254/latest"):
        body = {"messages": [{"role": "user", "content": [image_part(url)]}]}
        response = requests.post(f"{demo.url}/v1/chat/completions", json=body, timeout=30)
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == "messages[0].content[0].image_url.url"


def test_health_and_models(mllama: Running) -> None:
    assert requests.get(f"{mllama.url}/health", timeout=5).status_code == 200
    models = requests.get(f"{mllama.url}/v1/models", timeout=5).json()
    assert models["data"][0]["id"] == mllama.model
    folder = Path(requests.get(f"{mllama.url}/get_model_info", timeout=5).json()["model_path"])
    assert (folder / "config.json").is_file()
