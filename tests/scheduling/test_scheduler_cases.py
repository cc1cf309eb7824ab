"""What the design promises, one case each: sharing, forks, preemption, images, budgets, refusals."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import Mock

import pytest
from scheduling_helpers import Config, FakeEngine, make_prompt

from lightvl.core import Prompt, SamplingParams
from lightvl.errors import BadRequest, ContextLengthExceeded
from lightvl.scheduling.plan import StepPlan
from lightvl.scheduling.sequence import Sequence, SequenceState

LONG = SamplingParams(max_tokens=40, temperature=0.0)
SHORT = SamplingParams(max_tokens=1)


def text(*runs: tuple[int, int]) -> Prompt:
    """Runs of (first token, number of tokens)."""
    return make_prompt([list(range(first, first + length)) for first, length in runs], cross=False)


def step(engine: FakeEngine) -> StepPlan:
    plan = engine.launch()
    assert plan is not None
    engine.complete()
    return plan


def submit(engine: FakeEngine, prompt: Prompt, params: SamplingParams = SHORT) -> Sequence:
    sequences = engine.submit(prompt, params)
    assert sequences, "refused"
    return sequences[0]


@pytest.mark.parametrize("length", [15, 16, 17, 32])
def test_an_identical_prompt_is_cached_but_for_a_page(length: int) -> None:
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=64))
    submit(engine, text((0, length)))
    engine.drain()
    again = submit(engine, text((0, length)))
    engine.drain()
    assert length - 4 <= again.num_cached < length


@pytest.mark.parametrize("chunk_tokens", [8, 30, 500])
@pytest.mark.parametrize("steps", [1, 2])
def test_sixteen_same_prefixes_are_computed_once(chunk_tokens: int, steps: int) -> None:
    engine = FakeEngine(Config(num_pages=200, max_running=16, chunk_tokens=chunk_tokens, max_steps_in_flight=steps))
    for idx in range(16):
        submit(engine, text((0, 40), (1000 + 10 * idx, 5)), LONG)
    engine.drain()
    assert engine.num_prefill_tokens == 40 + 16 * 5


@pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "presence_penalty", "grammar"])
def test_only_a_sequence_with_penalties_or_a_grammar_waits_for_its_last_token(name: str) -> None:
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=64, max_steps_in_flight=2))
    plain = submit(engine, text((0, 5)), LONG)
    penalised = submit(engine, text((100, 5)), replace(LONG, **{name: Mock() if name == "grammar" else 0.5}))
    step(engine)
    engine.launch()
    ahead = engine.launch()
    assert ahead is not None and [row.sequence for row in ahead.rows] == [plain]
    engine.complete()
    both = engine.launch()
    assert both is not None and [row.sequence for row in both.rows] == [plain, penalised]


def test_sixteen_questions_about_one_new_image_encode_it_once() -> None:
    for cross in (False, True):
        engine = FakeEngine(Config(num_pages=200, max_running=16, chunk_tokens=8, cross=cross))
        for idx in range(16):
            submit(engine, make_prompt([[1, 2, 3], (7, 8), [1000 + idx] * 6], cross=cross))
        engine.drain()
        assert engine.num_encoded == {7: 1}


def test_one_waiter_takes_over_from_an_owner_that_ends() -> None:
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=8))
    owner, *waiters = [submit(engine, text((0, 40))) for _ in range(4)]
    step(engine)
    assert [s.state for s in waiters] == [SequenceState.WAITING] * 3
    step(engine)
    engine.end(owner, "abort")
    plan = step(engine)
    assert [row.sequence for row in plan.rows] == [waiters[0]] and plan.rows[0].start == 16
    engine.drain()
    assert engine.num_prefill_tokens == 40 + 2 * 4  # the last page of an identical prompt is computed again


def test_without_a_radix_cache_only_forks_share() -> None:
    engine = FakeEngine(Config(num_pages=100, use_radix=False, chunk_tokens=64, max_running=6))
    for _ in range(2):
        submit(engine, text((0, 20)), SamplingParams(max_tokens=5, n=3))
    engine.drain()
    assert engine.num_prefill_tokens == 40


def test_choices_fork_after_one_prefill_and_copy_the_partial_page() -> None:
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=64))
    sequences = engine.submit(text((0, 18)), SamplingParams(max_tokens=4, n=3))
    plan = step(engine)
    assert [set(row.samples) for row in plan.rows] == [set(sequences)]
    live = [s for s in sequences if s in engine.live]
    plan = step(engine)
    assert len(plan.rows) == len(live) == 3 and len(plan.page_copies) == 2
    assert all(s.pages[:4] == sequences[0].pages[:4] for s in live)
    engine.drain()
    assert engine.num_prefill_tokens == 18


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_sibling_takes_over_the_pages_of_an_aborted_first_choice(in_flight: bool) -> None:
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=8))
    first, second, third = engine.submit(text((0, 20)), SamplingParams(max_tokens=4, n=3))
    step(engine)
    if in_flight:
        engine.launch()
    pages = first.pages
    engine.end(first, "abort")
    assert second.pages is pages and second.state is SequenceState.RUNNING and third.state is SequenceState.FORKING
    engine.drain()
    assert engine.num_prefill_tokens == 20


def test_the_next_turn_hits_prompt_and_answer() -> None:
    """Also where several choices gave the same answer."""
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=64, page_size=2))
    sequences = engine.submit(text((0, 8)), SamplingParams(max_tokens=12, temperature=0.0, n=2))
    engine.drain()
    answer = sequences[0].output_ids
    assert sequences[1].output_ids == answer and len(answer) > 4
    turn = submit(engine, make_prompt([list(range(8)), answer, [9, 9]], cross=False))
    engine.drain()
    assert turn.num_cached >= 8 + len(answer) - 2


def test_answers_behind_a_page_that_two_computed_are_cached_too() -> None:
    """Equal prompts of full pages each compute the last page, and only one of the two enters the tree."""
    engine = FakeEngine(Config(num_pages=100, chunk_tokens=64))
    sequences = [submit(engine, text((0, 16)), SamplingParams(max_tokens=12, seed=seed)) for seed in range(2)]
    engine.drain()
    assert sequences[0].output_ids != sequences[1].output_ids
    for sequence in sequences:
        turn = submit(engine, make_prompt([list(range(16)), sequence.output_ids, [9, 9]], cross=False))
        engine.drain()
        assert turn.num_cached == 24


def test_the_latest_arrival_is_preempted_and_loses_no_token() -> None:
    engine = FakeEngine(Config(num_pages=10, chunk_tokens=64, max_running=3))
    sequences = [submit(engine, text((50 * idx, 9)), SamplingParams(max_tokens=25)) for idx in range(3)]
    preempted = set()
    while engine.live:
        engine.launch()
        if sequences[0] in engine.live:
            assert sequences[0].state is SequenceState.RUNNING, "the oldest never gives way"
        preempted |= {s for s in sequences if s.was_admitted and s.state is SequenceState.WAITING}
        if engine.in_flight:
            engine.complete()
    assert preempted and set(engine.ended.values()) == {"done"}


def test_pages_that_come_free_soon_preempt_nobody() -> None:
    engine = FakeEngine(Config(num_pages=8, chunk_tokens=64, max_running=3, max_steps_in_flight=2))
    first, second, third = (submit(engine, text(run), LONG) for run in ((0, 7), (50, 7), (100, 1)))
    while first.num_scheduled < 12:
        if engine.launch() is None:
            engine.complete()
    assert engine.pages.num_ready == 0 and len(engine.in_flight) == 2
    engine.end(third, "abort")  # in flight: its pages come when the step has completed, and `first` needs one now
    engine.complete()
    engine.launch()
    assert engine.scheduler.num_preempted == 0 and first.num_scheduled == 12
    engine.complete()
    engine.launch()
    assert engine.scheduler.num_preempted == 0 and first.num_scheduled == second.num_scheduled == 13
    engine.drain()


def test_a_lone_sequence_without_pages_is_exhausted() -> None:
    engine = FakeEngine(Config(num_pages=4, chunk_tokens=64))
    sequence = submit(engine, text((0, 14)), LONG)
    engine.drain()
    assert engine.ended[sequence] == "exhausted" and len(sequence.output_ids) == 3


def test_an_image_twice_in_a_prompt_with_room_for_one() -> None:
    engine = FakeEngine(Config(num_pages=50, image_units=4))
    sequence = submit(engine, make_prompt([(1, 4), (2, 4), (1, 4), [5]], cross=False))
    engine.drain()
    assert engine.ended[sequence] == "done" and engine.num_encoded == {1: 2, 2: 1}


def test_a_chunk_runs_up_to_an_image_that_is_not_ready() -> None:
    engine = FakeEngine(Config(num_pages=50, chunk_tokens=64))
    submit(engine, make_prompt([[1, 2, 3, 4, 5], (4, 6), [6]], cross=False))
    plan = step(engine)
    assert [(row.start, row.len) for row in plan.rows] == [(0, 5)] and len(plan.encodes) == 1
    other = submit(engine, text((50, 6)))
    plan = step(engine)
    assert other in [row.sequence for row in plan.rows], "others run on"
    engine.drain()


def test_images_of_the_next_in_line_are_encoded_ahead() -> None:
    engine = FakeEngine(Config(num_pages=50, max_running=1))
    submit(engine, text((50, 6)), LONG)
    submit(engine, make_prompt([(3, 4), [1]], cross=False))
    while not engine.num_encoded:
        step(engine)
    assert len(engine.live) == 2, "while the first still ran"


def test_a_prefix_hit_encodes_only_the_cross_image_that_was_evicted() -> None:
    engine = FakeEngine(Config(num_pages=100, cross=True, image_units=4, chunk_tokens=64))
    submit(engine, make_prompt([[1, 2, 3], (7, 3), list(range(20))], cross=True))
    engine.drain()
    submit(engine, make_prompt([(8, 3), [4]], cross=True))
    engine.drain()
    computed = engine.num_prefill_tokens
    again = submit(engine, make_prompt([[1, 2, 3], (7, 3), list(range(20)), [9]], cross=True))
    engine.drain()
    assert again.num_cached == 24 and engine.num_prefill_tokens - computed == 1
    assert engine.num_encoded == {7: 2, 8: 1}


def test_a_sequence_holds_only_the_cross_images_of_its_remaining_rows() -> None:
    engine = FakeEngine(Config(num_pages=100, cross=True, image_units=3, chunk_tokens=4))
    sequence = submit(engine, make_prompt([(1, 3), [1, 2, 3], (2, 3), [4, 5], (3, 3), [6]], cross=True), LONG)
    engine.drain()
    assert engine.ended[sequence] == "done" and engine.num_encoded == {1: 1, 2: 1, 3: 1}


def test_an_older_sequence_takes_cross_pages_from_a_younger_one() -> None:
    """It does not wait until the younger one has ended, which may take thousands of steps."""
    engine = FakeEngine(Config(num_pages=200, cross=True, image_units=4, chunk_tokens=4, max_running=2))
    older = submit(engine, make_prompt([(1, 2), list(range(40)), (2, 3), [5]], cross=True))
    younger = submit(engine, make_prompt([(3, 2), [6]], cross=True), SamplingParams(max_tokens=400))
    while older in engine.live:
        step(engine)
    assert engine.scheduler.num_preempted == 1 and younger in engine.live
    engine.drain()


def test_a_failed_encode_ends_those_who_need_it_and_no_others() -> None:
    engine = FakeEngine(Config(num_pages=100), fail_images=frozenset({2}))
    bad = [submit(engine, make_prompt([[1], (2, 4), [idx]], cross=False)) for idx in range(3)]
    good = submit(engine, make_prompt([[1], (3, 4)], cross=False))
    engine.drain()
    assert [engine.ended[s] for s in bad] == ["failed"] * 3 and engine.ended[good] == "done"


def test_a_sequence_that_is_not_ended_has_its_failed_encode_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(Config(num_pages=100), fail_images=frozenset({2}))
    sequence = submit(engine, make_prompt([[1], (2, 4), [3]], cross=False))
    monkeypatch.setattr(engine.scheduler, "sequences_needing", lambda key: [])
    for _ in range(4):
        step(engine)
    engine.fail_images = frozenset()
    engine.drain()
    assert engine.ended[sequence] == "done"


def test_an_encode_that_nobody_needs_any_more_is_dropped() -> None:
    engine = FakeEngine(Config(num_pages=100))
    sequence = submit(engine, make_prompt([(4, 4), [1]], cross=False))
    plan = engine.launch()
    assert plan is not None and plan.encodes and engine.images.get(4) is not None
    engine.end(sequence, "abort")
    assert engine.images.get(4) is not None, "a step in flight still works on it"
    engine.features[4] = 99
    engine.complete()
    assert engine.images.get(4) is None and engine.launch() is None
    submit(engine, text((0, 4)))
    assert step(engine).dropped_images == (4,)
    engine.drain()


def test_decode_rows_come_first_and_prefill_shares_the_step() -> None:
    engine = FakeEngine(Config(num_pages=200, max_running=4, chunk_tokens=8))
    first = submit(engine, text((0, 4)), SamplingParams(max_tokens=30))
    step(engine)
    second, third = submit(engine, text((100, 5))), submit(engine, text((200, 9)))
    assert [row.sequence for row in step(engine).rows] == [first], "what a step of streams alone takes is not known yet"
    plan = step(engine)
    assert [row.sequence for row in plan.rows] == [first, second, third]
    assert [row.len for row in plan.rows] == [1, 5, 3]
    engine.drain()


def test_chunks_shrink_to_the_time_budget_while_streams_run() -> None:
    engine = FakeEngine(Config(num_pages=400, chunk_tokens=256, step_budget_s=0.05))  # 1 ms a token, 10 ms a step
    stream = submit(engine, text((0, 4)), SamplingParams(max_tokens=400))
    for _ in range(3):
        step(engine)
    assert stream in engine.live
    submit(engine, text((1000, 600)))
    first = max(row.len for row in step(engine).rows)
    assert 16 <= first < 256
    later = [max(row.len for row in step(engine).rows) for _ in range(6)]
    assert all(16 <= length <= 60 for length in later), later
    engine.end(stream, "abort")
    assert max(row.len for row in step(engine).rows) > 200
    engine.drain()


def test_a_failed_step_leaves_nothing_in_the_radix_cache() -> None:
    engine = FakeEngine(Config(num_pages=50, chunk_tokens=64))
    sequence = submit(engine, text((0, 20)), LONG)
    plan = engine.launch()
    assert plan is not None
    engine.in_flight.clear()
    engine.touches.clear()
    engine.scheduler.complete(plan, type(engine._run(plan)[0])(rows_failed=True))
    engine.end(sequence, "failed")
    assert engine.radix is not None and engine.radix.num_nodes == 0
    engine.drain()


def test_what_can_never_run_is_refused() -> None:
    scheduler = FakeEngine(Config(num_pages=10, context_len=100)).scheduler
    params = SamplingParams(max_tokens=10)
    with pytest.raises(ContextLengthExceeded, match="101 tokens"):
        scheduler.check_fits(text((0, 101)), params)
    with pytest.raises(ContextLengthExceeded, match="max_tokens") as caught:
        scheduler.check_fits(text((0, 95)), params)
    assert caught.value.param == "max_tokens"
    with pytest.raises(ContextLengthExceeded, match="memory"):
        scheduler.check_fits(text((0, 41)), params)
    with pytest.raises(BadRequest):
        scheduler.check_fits(text(), params)
    scheduler.check_fits(text((0, 40)), params)
    with pytest.raises(BadRequest, match="13 feature rows"):
        scheduler.check_fits(make_prompt([(1, 13)], cross=False), params)
    cross = FakeEngine(Config(cross=True, image_units=4)).scheduler
    cross.check_fits(make_prompt([(1, 3), [1], (2, 3)], cross=True), params)
    with pytest.raises(BadRequest, match="6 cross pages"):
        cross.check_fits(make_prompt([(1, 3), (2, 3)], cross=True), params)
