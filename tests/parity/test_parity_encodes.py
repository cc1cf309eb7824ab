"""Waiting images of several requests go through the tower in one job of the whole service, and one bad image ends none
but those who need it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from parity_helpers import IMAGE_FAMILIES, Answer, Oracle, Part, ask, assert_same, serving, to_messages

from lightvl.core import SamplingParams
from lightvl.engine.build import LightVLService
from lightvl.errors import LightVLError
from lightvl.models.families import FAMILIES

Turns = list[tuple[str, list[Part]]]
GetOracle = Callable[[str], Oracle]
SIZES = [(28, 28), (100, 57), (33, 160), (160, 40), (9, 11), (103, 90), (57, 58), (58, 57)]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images of each encode that begins."""
    seen: list[int] = []
    for family in {FAMILIES[name] for name in FAMILIES}:
        encode = family.encode  # type: ignore[attr-defined]

        def counting(self: Any, images: Any, attention: Any, encode: Any = encode) -> Iterator[Any]:
            seen.append(len(images))
            return encode(self, images, attention)

        monkeypatch.setattr(family, "encode", counting)
    return seen


async def ask_at_once(service: LightVLService, all_turns: list[Turns]) -> list[Answer | Exception]:
    """All are submitted before the engine makes its next plan."""
    prompts = [await service.prompts.build_chat(to_messages(turns)) for turns in all_turns]
    params = SamplingParams(max_tokens=8, temperature=0.0, top_logprobs=5)
    generations = [service.engine.submit(prompt, params) for prompt in prompts]

    async def collect(generation: Any) -> Answer | Exception:
        answer = Answer()
        try:
            async for delta in generation:
                answer.token_ids += delta.token_ids
                answer.logprobs += delta.logprobs
                answer.finish = delta.finish
        except LightVLError as error:
            return error
        return answer

    return await asyncio.gather(*(collect(generation) for generation in generations))


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
async def test_eight_waiting_images_are_encoded_in_one_job(oracle_of: GetOracle, family: str, jobs: list[int]) -> None:
    oracle = oracle_of(family)
    system: Turns = [("system", ["You look at pictures, one by one, and you tell in a few words what you see."])]
    all_turns: list[Turns] = [[*system, ("user", [(*size, i), f"Number {i}?"])] for i, size in enumerate(SIZES)]
    async with serving(oracle) as service:
        for turns, answer in zip(all_turns, await ask_at_once(service, all_turns), strict=True):
            assert isinstance(answer, Answer)
            assert_same(oracle, turns, answer)
        assert jobs == [8]
        one_prompt: Turns = [("user", [*((*size, 50 + i) for i, size in enumerate(SIZES)), "And these?"])]
        assert_same(oracle, one_prompt, (await ask(service, one_prompt))[0])
        assert jobs == [8, 8]


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
async def test_one_bad_image_ends_its_request_alone(
    oracle_of: GetOracle, family: str, jobs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five images in one job one has features that are not finite, and one cannot be decoded again."""
    oracle = oracle_of(family)
    all_turns: list[Turns] = [[("user", [(*SIZES[i], i), "What is it?"])] for i in range(5)]
    async with serving(oracle) as service:
        family_object = service.prompts._family  # type: ignore[attr-defined]
        encode = family_object.encode

        def poisoned(images: Any, attention: Any) -> Iterator[Any]:
            for done in encode(images, attention):
                if done and 3 in done:
                    done = done | {3: torch.full_like(done[3], torch.nan)}
                yield done

        monkeypatch.setattr(family_object, "encode", poisoned)
        pixels = service.prompts.media.pixels  # type: ignore[attr-defined]
        num_calls = 0

        def failing(media: Any) -> torch.Tensor:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 5:
                raise ValueError("cut off")
            return pixels(media)  # type: ignore[no-any-return]

        monkeypatch.setattr(service.prompts.media, "pixels", failing)  # type: ignore[attr-defined]
        answers = await ask_at_once(service, all_turns)
        for turns, answer in zip(all_turns[:3], answers, strict=False):
            assert isinstance(answer, Answer)
            assert_same(oracle, turns, answer)
        assert [type(answer) for answer in answers[3:]] == [LightVLError] * 2
        assert jobs == [4]
