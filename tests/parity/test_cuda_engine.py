"""The engine as it runs on CUDA, on a CPU: steps launched ahead of results that come late, decode steps replayed from
static tensors, chunks and decode rows in steps of their own; the same answers as HF's all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_helpers import MIB, LateCudaPlatform, ScriptedMeter
from parity_helpers import Oracle, ask, assert_same, question, serving, to_messages

from lightvl.core import SamplingParams
from lightvl.engine import build
from lightvl.engine.build import LightVLService
from lightvl.errors import ConfigError, LightVLError, Overloaded

GetOracle = Callable[[str], Oracle]


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> LateCudaPlatform:
    platform = LateCudaPlatform(delay_s=lambda step: 0.002 * (step % 3))
    platform.defaults = replace(platform.defaults, mix_rows=False, max_steps_in_flight=2)
    monkeypatch.setattr(build, "_pick_platform", lambda config: platform)
    return platform


@asynccontextmanager
async def late(oracle: Oracle, **flags: Any) -> AsyncIterator[LightVLService]:
    flags = {"chunked_prefill_size": 32, "max_running_requests": 6, "mem_fraction_static": None} | flags
    async with serving(oracle, **flags) as service:
        yield service


@pytest.mark.parametrize("max_steps", [1, 2, 3])
@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
async def test_late_results_and_graphs_change_nothing(
    oracle_of: GetOracle, platform: LateCudaPlatform, family: str, max_steps: int
) -> None:
    oracle = oracle_of(family)
    all_turns = [question(i % 3, i) for i in range(5)]
    platform.defaults = replace(platform.defaults, max_steps_in_flight=max_steps)
    async with late(oracle) as service:
        assert platform.attention is not None
        addresses = [_addresses(fixed) for fixed in platform.attention.fixed]
        answers = await asyncio.gather(*(ask(service, turns, max_tokens=14) for turns in all_turns))
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            assert_same(oracle, turns, answer)
        assert sum(graph.num_replays for graph in platform.graphs) > 10
        assert addresses == [_addresses(fixed) for fixed in platform.attention.fixed], "a captured tensor has moved"
    ahead = max(_launched_before_read(platform.log))
    assert ahead == max_steps, f"{ahead} steps were in flight at most"


def _addresses(fixed: Any) -> list[int]:
    inputs = fixed.inputs
    tensors = [inputs.token_ids, inputs.positions, inputs.self_attention.slots, inputs.logits_idx]
    if inputs.cross is not None:
        tensors.append(inputs.cross.sees_image)
    return [tensor.data_ptr() for tensor in tensors]


def _launched_before_read(log: list[tuple[str, int]]) -> list[int]:
    """Steps launched and not read back, at each moment."""
    in_flight, seen = 0, []
    for what, _ in log:
        in_flight += 1 if what == "launch" else -1
        seen.append(in_flight)
    return seen


async def test_more_sequences_than_the_largest_graph_holds(oracle_of: GetOracle, platform: LateCudaPlatform) -> None:
    oracle = oracle_of("qwen2")
    all_turns = [question(0, i) for i in range(5)]
    async with late(oracle, cuda_graph_max_bs=2) as service:
        assert {fixed.num_rows for fixed in platform.attention.fixed} == {1, 2}  # type: ignore[union-attr]
        answers = await asyncio.gather(*(ask(service, turns) for turns in all_turns))
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            assert_same(oracle, turns, answer)
        assert any(line.startswith("CUDA graphs: 2, for decode steps of up to 2") for line in service.report)


async def test_without_graphs(oracle_of: GetOracle, platform: LateCudaPlatform) -> None:
    oracle = oracle_of("qwen2")
    async with late(oracle, disable_cuda_graph=True) as service:
        assert_same(oracle, question(0, 1), (await ask(service, question(0, 1)))[0])
        assert platform.graphs == [] and "CUDA graphs: off (--disable-cuda-graph)" in service.report


async def test_more_choices_than_may_run_are_drawn_in_blocks(oracle_of: GetOracle, platform: LateCudaPlatform) -> None:
    """The first tokens of two requests are drawn in one step, from one row of logits for each, as when asked alone."""
    oracle = oracle_of("qwen2")
    params = SamplingParams(max_tokens=6, n=5, temperature=1.5, seed=3)
    flags = {"chunked_prefill_size": 512, "disable_radix_cache": True}  # nobody waits for a common prefix
    answers = []
    for together in (True, False):
        async with late(oracle, max_running_requests=2, **flags) as service:
            turns = [to_messages(question(0, case)) for case in (1, 2)]
            prompts = [await service.prompts.build_chat(messages) for messages in turns]
            drawn: dict[tuple[int, int], list[int]] = {}
            generations = (service.engine.submit(prompt, params) for prompt in prompts)  # each when it is asked for
            for number, generation in enumerate(list(generations) if together else generations):
                async for delta in generation:
                    drawn.setdefault((number, delta.choice), []).extend(delta.token_ids)
            answers.append(drawn)
    assert answers[0] == answers[1] and len(answers[0]) == 10
    assert all(len({tuple(answers[0][number, choice]) for choice in range(5)}) > 1 for number in (0, 1))


# --- memory ---------------------------------------------------------------------------------------------------------


async def test_pages_get_what_the_largest_steps_leave(oracle_of: GetOracle, platform: LateCudaPlatform) -> None:
    """Encode 100, rows 50, graphs 20 for the first and 2 for each of the other three sizes; the margin is 512."""
    oracle = oracle_of("qwen2_vl")
    platform.meter = ScriptedMeter(2048 * MIB, 700 * MIB, [100 * MIB, 30 * MIB, 50 * MIB, 20 * MIB, 22 * MIB])
    async with late(oracle, max_total_tokens=None) as service:
        kept = next(line for line in service.report if line.startswith("kept free: "))
        assert "encode 0.10," in kept and "sampling 0.05, CUDA graphs 0.03," in kept and "margin of 0.50" in kept
        num_sizes = len({fixed.num_rows for fixed in platform.attention.fixed})  # type: ignore[union-attr]
        assert num_sizes == 4  # 1, 2, 4, 6
        shape = build.decoder_config(build.read_config(oracle.folder)).kv_shape
        page_bytes = shape.bytes_per_token(torch.float32) * 16
        pool = service.engine._scheduler._pages
        features = next(int(line.split()[2]) for line in service.report if line.startswith("image features: "))
        row_bytes = build.decoder_config(build.read_config(oracle.folder)).hidden_size * 4
        left = (700 - 100 - 50 - 26 - 512) * MIB
        assert left - page_bytes < pool.num_pages * page_bytes + features * row_bytes <= left


def test_what_does_not_fit_is_one_clear_line(oracle_of: GetOracle, platform: LateCudaPlatform) -> None:
    oracle = oracle_of("qwen2")
    config = build.ServerConfig(model_path=str(oracle.folder), dtype="float32", max_total_tokens=1 << 24)
    with pytest.raises(ConfigError, match="--max-total-tokens 16777216"):
        build.build_service(config, build.Metrics())
    platform.meter = ScriptedMeter(2048 * MIB, 100 * MIB)
    with pytest.raises(ConfigError, match="no memory for K,V pages"):
        build.build_service(replace(config, max_total_tokens=None), build.Metrics())


# --- what breaks ----------------------------------------------------------------------------------------------------


async def test_out_of_memory_ends_the_step_with_a_503_and_the_server_lives(
    oracle_of: GetOracle, platform: LateCudaPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = oracle_of("qwen2_vl")
    async with late(oracle) as service:
        model = platform.runner._model  # type: ignore[union-attr]
        for broken, turns in ((model.decoder.forward, question(0, 1)), (model.family.encode, question(1, 2))):
            with monkeypatch.context() as patch:
                breaks = _out_of_memory if broken == model.decoder.forward else _out_of_memory_later
                patch.setattr(type(broken.__self__), broken.__name__, breaks)
                with pytest.raises(Overloaded, match="out of memory") as caught:
                    await ask(service, turns)
            assert caught.value.status == 503 and service.healthy
            assert_same(oracle, turns, (await ask(service, turns))[0])


def _out_of_memory(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _out_of_memory_later(*args: Any, **kwargs: Any) -> Any:
    """As an encode, which is a generator."""
    yield {}
    _out_of_memory()


async def test_features_that_are_not_finite_are_found_when_the_step_is_read_back(
    oracle_of: GetOracle, platform: LateCudaPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = oracle_of("qwen2_vl")
    async with late(oracle) as service:
        family = platform.runner._model.family  # type: ignore[union-attr]
        encode = family.encode

        def spoil(images: Any, attention: Any) -> Any:
            for done in encode(images, attention):
                yield {idx: features * torch.nan for idx, features in done.items()} if done else done

        with monkeypatch.context() as patch:
            patch.setattr(family, "encode", spoil)
            with pytest.raises(LightVLError):
                await ask(service, question(1, 2))
        assert_same(oracle, question(1, 2), (await ask(service, question(1, 2)))[0])
