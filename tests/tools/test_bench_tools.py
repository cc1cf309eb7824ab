"""The measuring tools: a random checkpoint that HF takes whole, a client that keeps times, sums that are right."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from aiohttp import web
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import make_random_model
from bench import client, summary, workload
from check_pauses import Stream


@pytest.mark.parametrize("arch", ["qwen2-vl-tiny", "llama-3.2-vision-tiny"])
def test_a_random_checkpoint_is_whole_and_speaks_with_the_real_control_tokens(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_random_model.py", str(tmp_path), "--arch", arch])
    monkeypatch.setattr(make_random_model, "SHARD_BYTES", 4 << 20)
    assert make_random_model.main() == 0
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for token, token_id in make_random_model.ARCHITECTURES[arch].special_tokens.items():
        assert tokenizer.convert_tokens_to_ids(token) == token_id
    text = "How many red circles? Ünïcode 漢字 🙂\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert make_random_model.main() == 2  # weights are not written over


def test_real_sizes_are_the_published_ones():
    config = make_random_model.ARCHITECTURES["qwen2-vl-2b"].config
    assert (config["image_token_id"], config["vision_start_token_id"], config["eos_token_id"]) == (
        151655,
        151652,
        151645,
    )
    ids = make_random_model.ARCHITECTURES["llama-3.2-11b-vision"].special_tokens
    assert [ids[f"<|{name}|>"] for name in ("begin_of_text", "eot_id", "python_tag", "image")] == [
        128000,
        128009,
        128010,
        128256,
    ]
    assert len(set(ids.values())) == 257


def test_workloads_repeat_by_seed_and_differ_otherwise():
    assert workload.random_words(50, "a") == workload.random_words(50, "a") != workload.random_words(50, "b")
    jpeg = workload.random_jpeg(64, 48, "a")
    assert Image.open(io.BytesIO(jpeg)).size == (64, 48)
    assert jpeg == workload.random_jpeg(64, 48, "a") != workload.random_jpeg(64, 48, "b")


def answer(sent: float, times: list[float], tokens: int) -> client.Answer:
    return client.Answer(sent, times, prompt_tokens=10, completion_tokens=tokens)


def test_numbers_of_a_scenario():
    row = summary.summarize([answer(0, [1, 1.5, 3.5], 5), answer(1, [1.25, 1.75, 2.25], 3)], wall_s=4)
    assert row["ttft_ms_p50"] == 625 and row["max_pause_ms"] == 2000
    assert row["output_tok_s"] == 2 and row["total_tok_s"] == 7
    assert answer(0, [1, 1.5, 3.5], 6).seconds_per_token == 0.5


def test_speed_together_counts_only_while_all_write():
    first = answer(0, [0, 1, 2, 3, 4, 5], 6)
    second = answer(0, [2, 3, 4], 5)  # two tokens a piece
    assert summary.together_tok_s([first, second]) == (2 + 2 * 2) / 2
    assert summary.together_tok_s([answer(0, [0, 1], 2), answer(0, [5, 6], 2)]) == 0.5  # never: all there is
    assert summary.together_tok_s([answer(0, [1], 1)]) == 0


def test_longest_pause_of_a_stream():
    stream = Stream(0)
    stream.times = [0.0, 1.0, None, 5.0, 5.5]
    assert stream.longest_pause(0, 1) == 1
    assert stream.longest_pause(0, 5.6) == 1  # asking anew is no pause
    assert stream.longest_pause(5.1, 9) == 3.5  # silent until the end
    assert stream.longest_pause(2, 4) == 0
    assert stream.longest_pause(0.4, 0.6) == 1  # a pause that spans the phase


async def test_the_client_reads_times_text_usage_and_errors():
    def chunk(**fields):
        return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"

    def piece(text):
        return chunk(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}], usage=None)

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body["max_tokens"] == 99:
            return web.json_response({"error": "no"}, status=400)
        response = web.StreamResponse()
        await response.prepare(request)
        for data in (piece(""), piece("one "), piece("two")):
            await response.write(data)
            await asyncio.sleep(0.02)
        if body["max_tokens"] == 98:
            await response.write(chunk(error={"message": "broke"}))
            return response
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
        await response.write(chunk(usage=usage) + b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with client.open_session() as session:
        got = await client.ask(session, url, workload.chat_body("hello", max_tokens=2))
        assert (got.text, got.prompt_tokens, got.completion_tokens, got.cached_tokens) == ("one two", 7, 2, 3)
        assert len(got.times) == 2 and got.ttft > 0.015 and got.gaps[0] > 0.015
        bodies = [lambda: workload.chat_body("hello", max_tokens=2)] * 5
        assert len(await client.ask_all(session, url, bodies, concurrency=2)) == 5
        for max_tokens in (98, 99):
            with pytest.raises(RuntimeError):
                await client.ask(session, url, workload.chat_body("hello", max_tokens=max_tokens))
    await runner.cleanup()
