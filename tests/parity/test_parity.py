"""The whole service (prompt, scheduler, encodes, decoder, sampler) against HF transformers, under any chunking, prefix
hit, preemption and company. The core tier walks pairs of the grid; `-m full` walks all of it."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from parity_helpers import (
    FAMILIES,
    IMAGE_FAMILIES,
    SIZES,
    Answer,
    Oracle,
    Part,
    Turns,
    ask,
    assert_bfloat16_errs_like_hf,
    assert_same,
    question,
    serving,
)

from lightvl.engine import memory

GetOracle = Callable[[str], Oracle]

GRID = [
    (family, num_images, chunk)
    for family in FAMILIES
    for num_images in range(4 if family in IMAGE_FAMILIES else 1)
    for chunk in (16, 37, 512)
]
PAIRS = [cell for i, cell in enumerate(GRID) if i % 3 == (i // 3) % 3]


async def check_grid_cell(oracle: Oracle, num_images: int, chunk: int, case: int, **flags: Any) -> None:
    turns = question(num_images, case)
    async with serving(oracle, chunked_prefill_size=chunk, **flags) as service:
        first = (await ask(service, turns))[0]
        assert_same(oracle, turns, first)
        again = (await ask(service, turns))[0]
        assert_same(oracle, turns, again)
        assert again.token_ids == first.token_ids
        assert first.finish is not None and again.finish is not None
        assert first.finish.cached_tokens == 0
        page_size = flags.get("page_size") or 16
        assert again.finish.cached_tokens >= again.finish.prompt_tokens - page_size
        if num_images:
            assert service.prompts.counters.decodes == num_images, "an image was decoded again"
            assert service.prompts.counters.preprocesses == num_images


@pytest.mark.parametrize(("family", "num_images", "chunk"), PAIRS)
async def test_grid(oracle_of: GetOracle, family: str, num_images: int, chunk: int) -> None:
    await check_grid_cell(oracle_of(family), num_images, chunk, case=num_images + chunk)


@pytest.mark.full
@pytest.mark.parametrize(("family", "num_images", "chunk"), GRID)
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("case", range(6))
async def test_whole_grid(
    oracle_of: GetOracle, family: str, num_images: int, chunk: int, page_size: int, case: int
) -> None:
    await check_grid_cell(oracle_of(family), num_images, chunk, case, page_size=page_size)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
async def test_another_question_and_a_second_turn_reuse_the_prefix(oracle_of: GetOracle, family: str) -> None:
    oracle = oracle_of(family)
    images: list[Part] = [(120, 90, 1), (61, 140, 2)]
    first: Turns = [("user", ["Look closely.", *images, "How many circles are in the first picture?"])]
    other: Turns = [("user", ["Look closely.", *images, "Which of the two is brighter, and why?"])]
    async with serving(oracle, chunked_prefill_size=64) as service:
        answer = (await ask(service, first))[0]
        assert_same(oracle, first, answer)
        encoded = service.engine._scheduler._images.num_encoded
        shared = _shared_len(oracle, first, other)
        reply = (await ask(service, other))[0]
        assert_same(oracle, other, reply)
        assert reply.finish is not None and reply.finish.cached_tokens >= shared // 16 * 16
        follow: Turns = [*first, ("assistant", [answer.text]), ("user", ["And the second?", (40, 40, 3)])]
        again = (await ask(service, follow))[0]
        assert_same(oracle, follow, again)
        assert again.finish is not None and again.finish.cached_tokens > 0
        assert service.engine._scheduler._images.num_encoded == encoded + 1, "only the new image is encoded"
        assert service.prompts.counters.decodes == 3


def _shared_len(oracle: Oracle, first: Turns, second: Turns) -> int:
    pairs = zip(oracle.prepare(first)[0], oracle.prepare(second)[0], strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama", "qwen2"])
async def test_sixteen_at_once_share_work_and_disturb_nobody(oracle_of: GetOracle, family: str) -> None:
    oracle = oracle_of(family)
    image: list[Part] = [(90, 120, 5)] if family in IMAGE_FAMILIES else []
    same = [("user", [*image, f"Question number {i}: what do you see there?"]) for i in range(10)]
    mixed = [question(i % 3 if image else 0, i) for i in range(6)]
    everything: list[Turns] = [[turn] for turn in same] + mixed  # type: ignore[list-item]
    async with serving(oracle, chunked_prefill_size=48) as service:
        answers = await asyncio.gather(*(ask(service, turns) for turns in everything))
        for turns, (answer,) in zip(everything, answers, strict=True):
            assert_same(oracle, turns, answer)
        if image:
            num_different = 1 + sum(i % 3 for i in range(6))
            assert service.engine._scheduler._images.num_encoded == num_different
        shared = [answer.finish.cached_tokens for (answer,) in answers[1:10] if answer.finish]
        assert min(shared) >= 16, "the common part was computed more than once"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "mllama", "llama"])
async def test_preemption_loses_nothing(oracle_of: GetOracle, family: str) -> None:
    """Pools so small that running sequences must give way again and again."""
    oracle = oracle_of(family)
    all_turns = [question(1 if family in IMAGE_FAMILIES else 0, i, words="Tell me more. " * 3) for i in range(6)]
    longest = max(len(oracle.prepare(turns)[0]) for turns in all_turns)
    async with serving(oracle, max_total_tokens=longest + 96, page_size=4, chunked_prefill_size=32) as service:
        answers = await asyncio.gather(*(ask(service, turns, max_tokens=40) for turns in all_turns))
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            assert_same(oracle, turns, answer)
        assert service.engine._scheduler.num_preempted > 0, "the test preempts nobody"


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
async def test_choices_fork_after_one_prefill(oracle_of: GetOracle, family: str) -> None:
    oracle = oracle_of(family)
    turns = question(1, 0)
    async with serving(oracle, disable_radix_cache=True) as service:
        answers = await ask(service, turns, n=3)
        assert all(answer.token_ids == answers[0].token_ids for answer in answers)
        assert_same(oracle, turns, answers[0])
        warm = {"temperature": 1.0, "seed": 7}
        drawn = await ask(service, turns, n=3, max_tokens=16, **warm)
        assert len({tuple(answer.token_ids) for answer in drawn}) > 1
        alone: list[Answer] = await ask(service, turns, n=1, max_tokens=16, **warm)
        assert alone[0].token_ids == drawn[0].token_ids, "a choice depends on its company"


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
async def test_evicted_images_are_made_again(
    oracle_of: GetOracle, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feature store (or cross pool) for few images, and too few pages to keep the prompts: what is asked again is
    encoded again, and a prefix hit in front of evicted cross pages is kept."""
    monkeypatch.setattr(memory, "MIN_FEATURE_ROWS", 64)
    monkeypatch.setattr(memory, "FEATURE_SHARE", 0.0)
    monkeypatch.setattr(memory, "MIN_CROSS_IMAGES", 2)
    oracle = oracle_of(family)
    turns = [question(2, i) for i in range(8)]
    num_tokens = 4096 if family == "mllama" else 320  # for mllama the prompts stay in the prefix cache
    async with serving(oracle, max_running_requests=1, max_total_tokens=num_tokens, max_image_tokens=64) as service:
        for asked in (*turns, *turns[:3]):
            assert_same(oracle, asked, (await ask(service, asked))[0])
        assert service.engine._scheduler._images.num_encoded > 2 * len(turns), "the test evicts nothing"


@pytest.mark.full
@pytest.mark.parametrize("family", IMAGE_FAMILIES)
async def test_a_long_prompt_with_many_images(oracle_of: GetOracle, family: str) -> None:
    oracle = oracle_of(family)
    parts: list[Part] = []
    for i in range(8):
        parts += ["All work and no play makes a dull picture. " * 12, (*SIZES[i % len(SIZES)], i)]
    turns: Turns = [("user", [*parts, "Which one?"])]
    async with serving(oracle, chunked_prefill_size=200) as service:
        assert_same(oracle, turns, (await ask(service, turns))[0])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "mllama", "llama"])
async def test_bfloat16_errs_at_most_twice_as_much_as_hf(oracle_of: GetOracle, family: str) -> None:
    """Mean error of logprobs against float32, over the tokens and alternatives of several answers."""
    oracle = oracle_of(family)
    num_images = 3 if family in IMAGE_FAMILIES else 1
    all_turns = [question(case % num_images, case) for case in range(6)]
    await assert_bfloat16_errs_like_hf(oracle, oracle.model, all_turns)


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
async def test_two_steps_in_flight_change_nothing(oracle_of: GetOracle, family: str) -> None:
    """The second step is launched before the first one's tokens are known to the host: they are read on the device."""
    oracle = oracle_of(family)
    all_turns = [question(i % 3, i) for i in range(5)]
    async with serving(oracle, chunked_prefill_size=32) as service:
        scheduler = service.engine._scheduler
        scheduler.limits = replace(scheduler.limits, max_steps_in_flight=2)
        answers = await asyncio.gather(*(ask(service, turns, max_tokens=20) for turns in all_turns))
        for turns, (answer,) in zip(all_turns, answers, strict=True):
            assert_same(oracle, turns, answer)


@pytest.mark.parametrize("repetition, frequency, presence", [(1.5, 0, 0), (1, 0.2, 0.1), (1.2, 0.1, -0.2)])
async def test_penalties_count_every_token(
    oracle_of: GetOracle, repetition: float, frequency: float, presence: float
) -> None:
    """The same answer with one and with two steps in flight, and another one than without penalties."""
    oracle = oracle_of("qwen2")
    turns = question(0, 1)
    penalties = {
        "repetition_penalty": repetition,
        "frequency_penalty": frequency,
        "presence_penalty": presence,
        "logit_bias": ((7, 0.3),),
    }
    answers = []
    async with serving(oracle) as service:
        plain = (await ask(service, turns, max_tokens=40))[0].token_ids
        for max_steps in (1, 2):
            scheduler = service.engine._scheduler
            scheduler.limits = replace(scheduler.limits, max_steps_in_flight=max_steps)
            answers.append((await ask(service, turns, max_tokens=40, **penalties))[0].token_ids)
    assert answers[0] == answers[1] != plain
    prompt_ids, _ = oracle.prepare(turns)
    for step, token_id in enumerate(answers[0]):
        generated = answers[0][:step]
        penalised = _raw_logits(oracle, prompt_ids + generated)
        for seen in {*prompt_ids, *generated}:
            penalised[seen] *= 1 / repetition if penalised[seen] > 0 else repetition
        for seen in set(generated):
            penalised[seen] -= frequency * generated.count(seen) + presence
        penalised[7] += 0.3
        best = penalised.topk(2)
        if best.values[0] - best.values[1] > 2e-3:
            assert token_id == best.indices[0], f"output {step} is another token"


@pytest.mark.parametrize("max_steps", [1, 2])
async def test_an_answer_goes_on_to_its_least_number_of_tokens(oracle_of: GetOracle, max_steps: int) -> None:
    oracle = oracle_of("qwen2")
    turns = question(0, 1)
    prompt_ids, _ = oracle.prepare(turns)
    async with serving(oracle) as service:
        scheduler = service.engine._scheduler
        scheduler.limits = replace(scheduler.limits, max_steps_in_flight=max_steps)
        plain = (await ask(service, turns, max_tokens=20))[0].token_ids
        stops = frozenset(plain[3:5])
        short = (await ask(service, turns, max_tokens=20, stop_token_ids=stops))[0].token_ids
        long = (await ask(service, turns, max_tokens=20, min_tokens=12, stop_token_ids=stops))[0].token_ids
    assert len(short) <= 4 and len(long) > 12 and not stops & set(long[:12])
    for step, token_id in enumerate(long):
        allowed = _raw_logits(oracle, prompt_ids + long[:step])
        if step < 12:
            allowed[list(stops)] = -torch.inf
        best = allowed.topk(2)
        if best.values[0] - best.values[1] > 2e-3:
            assert token_id == best.indices[0], f"output {step} is another token"


@pytest.mark.parametrize("family", FAMILIES)
async def test_a_grammar_leaves_the_best_of_what_it_has_next(oracle_of: GetOracle, family: str) -> None:
    oracle = oracle_of(family)
    turns = question(0, 1)
    answers = []
    async with serving(oracle) as service:
        grammar = await service.prompts.grammar("regex", "[a-f]{3} ([0-9]{2}|red)!", param="regex")
        plain = asyncio.create_task(ask(service, turns, max_tokens=20))
        for max_steps in (1, 2):
            scheduler = service.engine._scheduler
            scheduler.limits = replace(scheduler.limits, max_steps_in_flight=max_steps)
            stops = service.prompts.stop_token_ids
            answers += await ask(service, turns, max_tokens=40, grammar=grammar, stop_token_ids=stops)
        assert_same(oracle, turns, (await plain)[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert re.fullmatch("[a-f]{3} ([0-9]{2}|red)!", answers[0].text)
    prompt_ids, _ = oracle.prepare(turns)
    matcher = grammar.start()
    for step, token_id in enumerate(answers[0].token_ids):
        logits = _raw_logits(oracle, prompt_ids + answers[0].token_ids[:step])
        mask = np.empty(-(-len(logits) // 32), dtype=np.int32)
        matcher.allow(mask)
        is_allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(logits)] == 1
        best = logits.masked_fill(~torch.from_numpy(is_allowed), -torch.inf).topk(2)
        if best.values[0] - best.values[1] > 2e-3:
            assert token_id == best.indices[0], f"output {step} is another token"
        assert matcher.push(token_id)


@torch.no_grad()
def _raw_logits(oracle: Oracle, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = oracle.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    return logits
