"""Every row of the table of LLaVA checkpoints, through the whole service, against HF's twin: 0 to 3 images of odd
sizes, chunked and not, after a prefix hit, and 16 at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from llava_helpers import LlavaOracle, Turns
from parity_helpers import Part, ask, assert_bfloat16_errs_like_hf, assert_same, serving
from tiny_llava import ROWS

GetOracle = Callable[[str], LlavaOracle]

SIZES = [(57, 43), (200, 31), (40, 300), (9, 11), (123, 128), (31, 29), (300, 180)]


def question(num_images: int, case: int) -> Turns:
    """Images of odd sizes at various places: first, between texts, after the text."""
    images: list[Part] = [(*SIZES[(case + i) % len(SIZES)], 31 * case + i) for i in range(num_images)]
    layouts: list[list[Part]] = [
        [*images, "What is in these pictures?"],
        [piece for image in images for piece in ("See", image)] + ["How many are there?"],
        ["Describe them:", *images],
    ]
    turns: Turns = [("system", ["Be brief."])] if case % 2 else []
    return [*turns, ("user", layouts[case % 3])]


def plain_own_template(oracle: LlavaOracle, turns: Turns) -> Turns:
    """The models' own templates put a system text anywhere; the built-in ones know it."""
    return turns if oracle.twin.row.own_template is None else [turn for turn in turns if turn[0] != "system"]


async def check_row(oracle: LlavaOracle, num_images: int, chunk: int, case: int, **flags: Any) -> None:
    turns = plain_own_template(oracle, question(num_images, case))
    async with serving(oracle, chunked_prefill_size=chunk, **flags) as service:
        assert service.info.chat_template == oracle.twin.row.template
        first = (await ask(service, turns))[0]
        assert_same(oracle, turns, first)
        again = (await ask(service, turns))[0]
        assert_same(oracle, turns, again)
        assert again.token_ids == first.token_ids
        assert first.finish is not None and again.finish is not None
        assert first.finish.cached_tokens == 0
        assert again.finish.cached_tokens >= again.finish.prompt_tokens - 16
        assert service.prompts.counters.decodes == num_images


@pytest.mark.parametrize("name", ROWS)
async def test_every_row_answers_as_its_twin(oracle_of: GetOracle, name: str) -> None:
    oracle, number = oracle_of(name), list(ROWS).index(name)
    for num_images in range(4):
        await check_row(oracle, num_images, (16, 37, 512)[(num_images + number) % 3], case=num_images + number)


@pytest.mark.full
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("num_images", range(4))
@pytest.mark.parametrize("chunk", [16, 37, 512])
@pytest.mark.parametrize("case", range(6))
async def test_whole_grid(oracle_of: GetOracle, name: str, num_images: int, chunk: int, case: int) -> None:
    await check_row(oracle_of(name), num_images, chunk, case, page_size=(1, 5, 16)[case % 3])


@pytest.mark.parametrize("name", ["llava-onevision-qwen2-7b-ov-chat", "llava-v1.5-7b"])
async def test_many_at_once(oracle_of: GetOracle, name: str) -> None:
    oracle = oracle_of(name)
    all_turns = [question(i % 4, i) for i in range(16)]
    async with serving(oracle, chunked_prefill_size=64) as service:
        answers = await asyncio.gather(*(ask(service, turns) for turns in all_turns))
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            assert_same(oracle, turns, answer)


async def test_adding_an_image_in_a_later_turn_changes_the_view_of_the_first(oracle_of: GetOracle) -> None:
    """OneVision shows an image that is alone in tiles, and several in one square view each."""
    oracle = oracle_of("llava-onevision-qwen2-7b-ov-hf")
    first: Turns = [("user", [(200, 90, 1), "What is this?"])]
    async with serving(oracle, chunked_prefill_size=64) as service:
        answer = (await ask(service, first))[0]
        assert_same(oracle, first, answer)
        second: Turns = [*first, ("assistant", ["A cat."]), ("user", ["And this?", (90, 200, 2)])]
        reply = (await ask(service, second))[0]
        assert_same(oracle, second, reply)
        assert service.engine._scheduler._images.num_encoded == 3, "the first image has two views"


async def test_a_tower_beside_the_checkpoint_loses_to_one_inside(oracle_of: GetOracle) -> None:
    """Its folder has other weights (see tiny_llava), as the hub's CLIP has for checkpoints that tuned theirs."""
    oracle = oracle_of("llava-v1.6-34b")
    assert (oracle.folder.parent / "clip-vit-large-patch14-336" / "pytorch_model.bin").is_file()
    turns = question(1, 0)
    async with serving(oracle) as service:
        assert_same(oracle, turns, (await ask(service, turns))[0])


async def test_preemption_loses_nothing(oracle_of: GetOracle) -> None:
    """A pool so small that running sequences must give way again and again."""
    oracle = oracle_of("llava-onevision-qwen2-7b-ov-hf")
    all_turns = [question(1, i) for i in range(6)]
    longest = max(len(oracle.prepare(turns)[0]) for turns in all_turns)
    async with serving(oracle, max_total_tokens=longest + 96, page_size=4, chunked_prefill_size=32) as service:
        answers = await asyncio.gather(*(ask(service, turns, max_tokens=40) for turns in all_turns))
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            assert_same(oracle, turns, answer)
        assert service.engine._scheduler.num_preempted > 0, "the test preempts nobody"


@pytest.mark.parametrize("name", ["llava-onevision-qwen2-0.5b-ov", "llava-v1.6-vicuna-7b", "llava-v1.5-7b"])
async def test_bfloat16_errs_at_most_twice_as_much_as_hf(oracle_of: GetOracle, name: str) -> None:
    """Mean error of logprobs against float32, over the tokens and alternatives of several answers."""
    oracle = oracle_of(name)
    await assert_bfloat16_errs_like_hf(oracle, oracle.twin.model, [question(case % 3, case) for case in range(6)])
