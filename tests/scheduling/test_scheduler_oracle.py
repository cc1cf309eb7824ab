"""Random traffic against the oracle in scheduling_helpers.py: every row reads the right K,V and images, every law
holds after every step, every sequence ends with its one right answer, nothing deadlocks, nothing is lost."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduling_helpers import STOPS, Config, FakeEngine, answer_alone, make_prompt, random_pieces

from lightvl.core import SamplingParams


def random_config(rng: random.Random) -> Config:
    return Config(
        page_size=rng.choice([1, 2, 4, 4, 8]),
        num_pages=rng.choice([6, 9, 14, 30, 80]),
        max_running=rng.choice([1, 2, 3, 6]),
        chunk_tokens=rng.choice([1, 3, 8, 16, 64]),
        max_steps_in_flight=rng.choice([1, 2, 2, 3]),
        use_radix=rng.random() < 0.8,
        cross=rng.random() < 0.5,
        image_units=rng.choice([4, 5, 8, 20]),
        mix_rows=rng.random() < 0.8,
        step_budget_s=rng.choice([0.0, 0.02, 1.0]),
    )


def run_traffic(seed: int) -> FakeEngine:
    rng = random.Random(seed)
    failing = frozenset({2}) if rng.random() < 0.2 else frozenset()
    config = random_config(rng)
    engine = FakeEngine(config, seed, failing)
    num_images = rng.choice([0, 3, 6])
    abort_rate = rng.choice([0.0, 0.02, 0.1])
    for _ in range(rng.randint(10, 80)):
        roll = rng.random()
        if roll < 0.25:
            prompt = make_prompt(random_pieces(rng, num_images), cross=config.cross)
            params = SamplingParams(
                max_tokens=rng.choice([1, 2, 6, 20]),
                temperature=rng.choice([0.0, 1.0]),
                seed=rng.randrange(2),
                n=rng.choice([1, 1, 1, 2, 4]),
                stop_token_ids=STOPS,
            )
            engine.submit(prompt, params)
        elif roll < 0.25 + abort_rate:
            if engine.live:
                engine.end(rng.choice(engine.live), "abort")
                engine.scheduler.check()
        elif roll < 0.7:
            engine.launch()
        elif engine.in_flight:
            engine.complete()
    engine.drain()
    engine.check_nothing_lost()
    return engine


@pytest.mark.parametrize("block", range(10))
def test_random_traffic(block: int) -> None:
    for seed in range(block * 30, block * 30 + 30):
        try:
            run_traffic(seed)
        except BaseException as error:
            error.add_note(f"run_traffic({seed})")
            raise


@pytest.mark.full
@pytest.mark.parametrize("block", range(50))
def test_much_random_traffic(block: int) -> None:
    for seed in range(10_000 + block * 200, 10_200 + block * 200):
        try:
            run_traffic(seed)
        except BaseException as error:
            error.add_note(f"run_traffic({seed})")
            raise


def test_traffic_reaches_the_hard_cases() -> None:
    """The random traffic is worth something only if it preempts, hits prefixes, forks, aborts and exhausts."""
    engines = [run_traffic(seed) for seed in range(60)]
    assert sum(engine.scheduler.num_preempted for engine in engines) > 25
    assert sum(s.num_cached > 0 for engine in engines for s in engine.ended) > 50
    assert sum(s.choice > 0 for engine in engines for s in engine.ended) > 50
    reasons = [reason for engine in engines for reason in engine.ended.values()]
    assert {"done", "abort", "exhausted", "failed"} <= set(reasons)
    assert reasons.count("done") > len(reasons) / 2


class Traffic(RuleBasedStateMachine):
    """The same, steered by hypothesis, which shrinks what it finds."""

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        num_pages=st.integers(6, 30),
        max_running=st.integers(1, 4),
        chunk_tokens=st.sampled_from([1, 3, 8, 16]),
        steps=st.integers(1, 3),
        use_radix=st.booleans(),
        cross=st.booleans(),
        image_units=st.integers(4, 9),
        mix_rows=st.booleans(),
    )
    def start(
        self,
        page_size: int,
        num_pages: int,
        max_running: int,
        chunk_tokens: int,
        steps: int,
        use_radix: bool,
        cross: bool,
        image_units: int,
        mix_rows: bool,
    ) -> None:
        self.engine = FakeEngine(
            Config(page_size, num_pages, max_running, chunk_tokens, steps, use_radix, cross, image_units, mix_rows)
        )

    @rule(
        pieces=st.lists(
            st.one_of(
                st.integers(0, 4).map(lambda key: (key, 1 + (key * 7 + 3) % 4)),
                st.integers(1, 9).map(lambda n: list(range(n))),
            ),
            min_size=1,
            max_size=4,
        ),
        max_tokens=st.integers(1, 8),
        n=st.integers(1, 3),
        seed=st.integers(0, 1),
    )
    def submit(self, pieces: list[list[int] | tuple[int, int]], max_tokens: int, n: int, seed: int) -> None:
        self.engine.submit(
            make_prompt(pieces, cross=self.engine.config.cross),
            SamplingParams(max_tokens, seed=seed, n=n, stop_token_ids=STOPS),
        )

    @rule()
    def launch(self) -> None:
        self.engine.launch()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def complete(self) -> None:
        self.engine.complete()

    @precondition(lambda self: self.engine.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.end(data.draw(st.sampled_from(self.engine.live)), "abort")
        self.engine.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.drain()
            self.engine.check_nothing_lost()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_fake_model_is_deterministic() -> None:
    prompt = make_prompt([[1, 2, 3], (1, 2), [4]], cross=False)
    params = SamplingParams(max_tokens=5)
    assert answer_alone(prompt, params, 0) == answer_alone(prompt, params, 0) != answer_alone(prompt, params, 1)
