"""SGLang's /generate, and the server's answers about itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from server_helpers import Running, Start

from lightvl.core import ImagePart


async def test_text(server: Running) -> None:
    status, reply = await server.post("/generate", {"text": "Hello", "sampling_params": {"max_new_tokens": 3}})
    assert status == 200 and reply["text"] == "Hel" and reply["output_ids"] == [72, 101, 108]
    meta = reply["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 3}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (5, 3, 3)
    assert meta["e2e_latency"] >= 0 and "output_token_logprobs" not in meta


async def test_defaults(server: Running) -> None:
    _, reply = await server.post("/generate", {"text": "x" * 200, "rid": "mine"})
    assert reply["meta_info"]["completion_tokens"] == 128 and reply["meta_info"]["id"] == "mine"
    assert server.service.engine.params[0].max_tokens == 128
    await server.post("/generate", {"text": "x", "sampling_params": {"min_new_tokens": 128}})
    assert server.service.engine.params[1].min_tokens == 128


async def test_ids_and_images(server: Running) -> None:
    body = {"input_ids": [72, 105], "image_data": ["AAAA", "https://x/y.png"], "sampling_params": {"temperature": 0}}
    status, reply = await server.post("/generate", body)
    assert status == 200 and reply["text"] == "Hi" and reply["meta_info"]["prompt_tokens"] == 10
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": 7}
    images = [ImagePart("AAAA", "image_data[0]"), ImagePart("https://x/y.png", "image_data[1]")]
    assert server.service.prompts.images == images
    await server.post("/generate", {"text": "a", "image_data": "AAAA"})
    assert server.service.prompts.images == [ImagePart("AAAA", "image_data")]


async def test_logprobs(server: Running) -> None:
    body = {"text": "ab", "return_logprob": True, "top_logprobs_num": 2, "return_text_in_logprobs": True}
    _, reply = await server.post("/generate", {**body, "logprob_start_len": -1})
    assert reply["meta_info"]["output_token_logprobs"] == [[-0.5, 97, "a"], [-0.5, 98, "b"]]
    assert reply["meta_info"]["output_top_logprobs"][0] == [[-0.5, 97, "a"], [-1.5, 98, "b"]]
    _, reply = await server.post("/generate", {"text": "a", "return_logprob": True})
    assert reply["meta_info"]["output_token_logprobs"] == [[-0.5, 97, None]]
    assert "output_top_logprobs" not in reply["meta_info"]


async def test_stream_repeats_the_whole_text(server: Running) -> None:
    *events, done = await server.events("/generate", {"text": "abc", "stream": True})
    parsed = [json.loads(event) for event in events]
    assert done == "[DONE]" and [event["text"] for event in parsed] == ["a", "ab", "abc", "abc"]
    assert [event["meta_info"]["finish_reason"] for event in parsed[:3]] == [None] * 3
    assert parsed[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 7}
    assert parsed[-1]["output_ids"] == [97, 98, 99] and "index" not in parsed[0]


async def test_choices(server: Running) -> None:
    body = {"text": "ab", "sampling_params": {"n": 2}}
    _, replies = await server.post("/generate", body)
    assert [reply["text"] for reply in replies] == ["ab", "ab"]
    *events, _ = await server.events("/generate", {**body, "stream": True})
    assert {json.loads(event)["index"] for event in events} == {0, 1}


@pytest.mark.parametrize(
    "body, param",
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": ["a", "b"]}, "text"),
        ({"input_ids": [[1], [2]]}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1, -1]}, "input_ids"),
        ({"input_ids": [1, True]}, "input_ids"),
        ({"text": "a", "image_data": [1]}, "image_data[0]"),
        ({"text": "a", "sampling_params": {"temperature": 3}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"min_new_tokens": 129}}, "sampling_params.min_new_tokens"),
        ({"text": "a", "sampling_params": {"json_schema": "bad"}}, "sampling_params.json_schema"),
        ({"text": "a", "sampling_params": {"json_schema": {}}}, "sampling_params.json_schema"),
        ({"text": "a", "sampling_params": {"max_tokens": 1}}, "sampling_params.max_tokens"),
        ({"text": "a", "sampling_params": {"regex": "bad"}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"regex": "a", "min_new_tokens": 3}}, "sampling_params.min_new_tokens"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "top_logprobs_num": 1}, "top_logprobs_num"),
        ({"text": "a", "temperature": 1}, "temperature"),
        ({"text": "a" * 2000}, "text"),
        ({"input_ids": [1] * 2000}, "input_ids"),
    ],
)
async def test_refused(server: Running, body: dict[str, Any], param: str) -> None:
    status, reply = await server.post("/generate", body)
    assert status == 400 and reply["error"]["param"] == param, reply


async def test_models(server: Running) -> None:
    status, reply = await server.get("/v1/models")
    assert status == 200 and reply["object"] == "list"
    assert reply["data"] == [
        {
            "id": "fake/model",
            "object": "model",
            "created": 1,
            "owned_by": "lightvl",
            "root": "/fake",
            "max_model_len": 2000,
        }
    ]
    for name in ("fake/model", "fake%2Fmodel", "default"):
        assert (await server.get(f"/v1/models/{name}")) == (200, reply["data"][0])
    status, reply = await server.get("/v1/models/other")
    assert status == 404 and reply["error"]["code"] == "model_not_found"


async def test_model_info(start: Start) -> None:
    server = await start(info={"sampling_defaults": {"top_k": 3}})
    _, reply = await server.get("/get_model_info")
    assert reply["model_path"] == reply["tokenizer_path"] == "/fake" and reply["is_generation"] is True
    assert reply["context_length"] == 2000 and reply["sampling_defaults"] == {"top_k": 3}


async def test_health(server: Running) -> None:
    assert await server.get("/health") == (200, {"status": "ok"})
    server.service.healthy = False
    status, reply = await server.get("/health")
    assert status == 503 and reply["error"]["code"] == "unhealthy"


async def test_time_to_the_first_token(server: Running) -> None:
    server.service.engine.delay_s = 0.03
    await server.chat("0123456789")
    async with server.session.get(server.url + "/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines() if line[0] != "#")
    assert 0.025 < float(lines["lightvl:time_to_first_token_seconds_sum"]) < 0.2
    assert float(lines["lightvl:e2e_request_latency_seconds_sum"]) > 0.25


async def test_metrics(server: Running) -> None:
    await server.chat("Hello", n=2)
    server.context.metrics.gauge("images_decoded_total", lambda: 4)
    async with server.session.get(server.url + "/metrics") as response:
        assert response.status == 200 and response.content_type == "text/plain"
        lines = (await response.text()).splitlines()
    for line in (
        "# TYPE lightvl:prompt_tokens_total counter",
        "lightvl:prompt_tokens_total 5",
        "lightvl:cached_tokens_total 3",
        "lightvl:generation_tokens_total 10",
        "lightvl:requests_broken_off_total 0",
        "lightvl:images_decoded_total 4",
        "# TYPE lightvl:num_requests gauge",
        "lightvl:num_requests 0",
        'lightvl:time_to_first_token_seconds_bucket{le="+Inf"} 1',
        "lightvl:time_to_first_token_seconds_count 1",
    ):
        assert line in lines
