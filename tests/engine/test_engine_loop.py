"""The engine's loop over a fake device: every request ends with exactly one last event, whatever happens."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from engine_fakes import Machine, collect, expected_token, make_machine, make_prompt

from lightvl.core import PromptImage, SamplingParams
from lightvl.errors import BadRequest, LightVLError, Overloaded
from lightvl.scheduling.sequence import Sequence


@asynccontextmanager
async def running(**kwargs: Any) -> AsyncIterator[Machine]:
    machine = make_machine(**kwargs)
    machine.engine.start()
    try:
        yield machine
        assert machine.engine.healthy
    finally:
        await machine.engine.close()
    assert machine.device.closed
    machine.scheduler.check()
    assert machine.scheduler.num_running == machine.scheduler.num_waiting == 0


def tokens_of(prompt_ids: list[int], num_tokens: int, choice: int = 0) -> list[int]:
    sequence = Sequence(0, make_prompt(prompt_ids), SamplingParams(max_tokens=num_tokens), choice)
    return [expected_token(sequence, len(prompt_ids) + i) for i in range(num_tokens)]


@pytest.mark.parametrize("max_steps_in_flight", [1, 2, 3])
async def test_many_requests_with_tiny_pools(max_steps_in_flight: int) -> None:
    draw = random.Random(7)
    async with running(num_pages=40, max_steps_in_flight=max_steps_in_flight) as machine:

        async def one(i: int) -> None:
            await asyncio.sleep(draw.random() * 0.05)
            ids = [1] * draw.randrange(1, 20) + [i % 5] * draw.randrange(1, 20)
            params = SamplingParams(max_tokens=draw.randrange(1, 30), n=draw.choice([1, 1, 3]))
            for choice, collected in enumerate(await collect(machine.engine, make_prompt(ids), params)):
                assert collected.token_ids == tokens_of(ids, params.max_tokens, choice)
                assert collected.finish is not None and collected.finish.reason == "length"
                assert collected.finish.completion_tokens == params.max_tokens
                assert collected.finish.prompt_tokens == len(ids)

        await asyncio.gather(*(one(i) for i in range(60)))


class Script:
    """A grammar, and its matchers, that keeps what each one is told and breaks after so many tokens."""

    def __init__(self, break_after: int) -> None:
        self.break_after = break_after
        self.told: list[list[int]] = []

    def start(self) -> ScriptMatcher:
        self.told.append([])
        return ScriptMatcher(self.told[-1], self.break_after)


@dataclass
class ScriptMatcher:
    told: list[int]
    break_after: int

    def allow(self, mask: Any) -> None:
        raise AssertionError("the fake device does not ask")

    def push(self, token_id: int) -> bool:
        self.told.append(token_id)
        return len(self.told) <= self.break_after


@pytest.mark.parametrize("max_steps_in_flight", [1, 3])
async def test_each_choice_tells_its_own_matcher_every_token_once(max_steps_in_flight: int) -> None:
    ids = [3, 1, 4, 1, 5]
    async with running(num_pages=12, max_steps_in_flight=max_steps_in_flight) as machine:  # too few: preemptions
        grammar = Script(break_after=100)
        others = [collect(machine.engine, make_prompt([i] * 9), SamplingParams(max_tokens=20)) for i in range(4)]
        params = SamplingParams(max_tokens=12, n=3, grammar=grammar)
        choices, *_ = await asyncio.gather(collect(machine.engine, make_prompt(ids), params), *others)
        assert machine.scheduler.num_preempted
    assert [choice.token_ids for choice in choices] == grammar.told == [tokens_of(ids, 12, n) for n in range(3)]


async def test_a_grammar_that_went_beyond_its_limits_ends_its_request_alone() -> None:
    async with running() as machine:
        params = SamplingParams(max_tokens=12, grammar=Script(break_after=4))
        other = asyncio.create_task(collect(machine.engine, make_prompt([1, 2]), SamplingParams(max_tokens=12)))
        with pytest.raises(BadRequest, match="grammar"):
            await collect(machine.engine, make_prompt([3, 1, 4]), params)
        assert (await other)[0].token_ids == tokens_of([1, 2], 12)


@pytest.mark.parametrize("max_steps_in_flight", [1, 2, 3])
async def test_stop_token_and_stop_string_end_once_and_free(max_steps_in_flight: int) -> None:
    ids = [3, 1, 4, 1, 5]
    tokens = tokens_of(ids, 40)
    stop_token = tokens[5]
    at = tokens.index(stop_token)
    text = "".join(chr(97 + t % 26) for t in tokens)
    stop_string = text[8:11]
    async with running(max_steps_in_flight=max_steps_in_flight) as machine:
        by_token, by_string = await asyncio.gather(
            collect(
                machine.engine,
                make_prompt(ids),
                SamplingParams(max_tokens=40, stop_token_ids=frozenset([stop_token])),
            ),
            collect(machine.engine, make_prompt(ids), SamplingParams(max_tokens=40, stop=(stop_string,))),
        )
    finish = by_token[0].finish
    assert finish is not None and (finish.reason, finish.matched_stop) == ("stop", stop_token)
    assert by_token[0].token_ids == tokens[: at + 1]
    finish = by_string[0].finish
    assert finish is not None and (finish.reason, finish.matched_stop) == ("stop", stop_string)
    assert by_string[0].text == text[: text.index(stop_string)]


async def test_abort_frees_at_once_and_disturbs_nobody() -> None:
    async with running() as machine:
        params = SamplingParams(max_tokens=100)
        doomed = machine.engine.submit(make_prompt([9] * 30), params)
        other = asyncio.create_task(collect(machine.engine, make_prompt([8] * 9), SamplingParams(max_tokens=20)))
        async for _ in doomed:
            break
        doomed.abort()
        doomed.abort()
        assert machine.scheduler.num_running <= 1
        assert (await other)[0].token_ids == tokens_of([8] * 9, 20)


async def test_a_broken_step_ends_its_requests_with_an_error_and_the_next_one_works() -> None:
    async with running() as machine:
        machine.device.break_rows = lambda plan: RuntimeError("boom, with /secret/path")
        with pytest.raises(LightVLError) as caught:
            await collect(machine.engine, make_prompt([1, 2, 3]), SamplingParams(max_tokens=5))
        assert "secret" not in str(caught.value)
        machine.device.break_rows = lambda plan: None
        ended = await collect(machine.engine, make_prompt([1, 2, 3]), SamplingParams(max_tokens=5))
        assert ended[0].token_ids == tokens_of([1, 2, 3], 5)


async def test_a_broken_encode_ends_only_those_who_need_the_image() -> None:
    image = PromptImage(key=77, first_row=2, end_row=8, size=6, media=None)
    async with running() as machine:
        machine.device.break_encode = lambda image: BadRequest("bad image", param="messages[0]")
        with_image = asyncio.create_task(
            collect(machine.engine, make_prompt([0] * 10, (image,)), SamplingParams(max_tokens=5))
        )
        without = await collect(machine.engine, make_prompt([1] * 10), SamplingParams(max_tokens=5))
        with pytest.raises(BadRequest, match="bad image"):
            await with_image
        assert without[0].token_ids == tokens_of([1] * 10, 5)
        machine.device.break_encode = lambda image: None
        again = await collect(machine.engine, make_prompt([0] * 10, (image,)), SamplingParams(max_tokens=5))
        assert len(again[0].token_ids) == 5


async def test_drain_refuses_new_and_finishes_old() -> None:
    async with running() as machine:
        old = asyncio.create_task(collect(machine.engine, make_prompt([1] * 10), SamplingParams(max_tokens=30)))
        await asyncio.sleep(0.005)
        await machine.engine.drain(5.0)
        assert old.done() or (await old)[0].finish is not None
        with pytest.raises(Overloaded):
            machine.engine.submit(make_prompt([1]), SamplingParams(max_tokens=1))


async def test_close_tells_everybody() -> None:
    machine = make_machine()
    machine.engine.start()
    task = asyncio.create_task(collect(machine.engine, make_prompt([1] * 10), SamplingParams(max_tokens=100)))
    await asyncio.sleep(0.01)
    await machine.engine.close()
    with pytest.raises(Overloaded):
        await task


async def test_a_prompt_that_can_never_fit_is_refused_at_once() -> None:
    async with running(num_pages=4) as machine:
        with pytest.raises(BadRequest):
            machine.engine.submit(make_prompt([1] * 100), SamplingParams(max_tokens=5))


async def test_who_runs_out_of_pages_alone_ends_with_length_and_the_next_one_runs() -> None:
    async with running(num_pages=4, max_running=1) as machine:
        asked = [collect(machine.engine, make_prompt([i] * 10), SamplingParams(max_tokens=60)) for i in range(3)]
        for i, (answer,) in enumerate(await asyncio.gather(*asked)):
            assert answer.finish is not None and answer.finish.reason == "length"
            assert 1 <= len(answer.token_ids) < 60
            assert answer.token_ids == tokens_of([i] * 10, len(answer.token_ids))
