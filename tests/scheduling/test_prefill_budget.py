"""PrefillBudget: learns both costs, shrinks chunks as the context grows, forgives one slow step."""

from __future__ import annotations

import random

import pytest

from lightvl.scheduling.budget import PrefillBudget, attended_pairs


def teach(budget: PrefillBudget, token_s: float, pair_s: float, noise: float = 0.0) -> None:
    rng = random.Random(0)
    for idx in range(40):
        start, num_tokens = 512 * (idx % 8), rng.choice([64, 200, 512])
        pairs = attended_pairs(start, num_tokens)
        seconds = (token_s * num_tokens + pair_s * pairs) * (1 + noise * rng.uniform(-1, 1))
        budget.record(0, num_tokens, pairs, seconds)


@pytest.mark.parametrize(("token_s", "pair_s"), [(0.004, 3e-7), (0.0001, 2e-7), (0.01, 0.0)])
def test_learns_the_costs_and_keeps_to_the_budget(token_s: float, pair_s: float) -> None:
    budget = PrefillBudget()
    assert not budget.is_known
    teach(budget, token_s, pair_s, noise=0.05)
    for start in (0, 1000, 4000):
        tokens = budget.tokens_within(0.3, start)
        real = token_s * tokens + pair_s * attended_pairs(start, tokens)
        assert real == pytest.approx(0.3, rel=0.15)
        assert budget.seconds(start, tokens) <= 0.3 < budget.seconds(start, tokens + 1)
    assert budget.tokens_within(0.0, 0) == budget.tokens_within(-1.0, 0) == 0


def test_decode_steps_are_told_apart() -> None:
    budget = PrefillBudget()
    for _ in range(20):
        budget.record(8, 0, 0.0, 0.05)
    for _ in range(20):
        budget.record(8, 100, attended_pairs(0, 100), 0.05 + 0.1)
    assert budget.decode_s == pytest.approx(0.05)
    assert budget.tokens_within(0.1, 0) == pytest.approx(100, rel=0.05)


def test_knows_what_a_step_of_streams_takes_until_they_double() -> None:
    budget = PrefillBudget()
    assert budget.knows_decodes(0) and not budget.knows_decodes(1)
    budget.record(0, 0, 0.0, 0.0)  # a step without rows
    assert not budget.knows_decodes(1)
    budget.record(2, 0, 0.0, 0.05)
    assert budget.knows_decodes(4) and not budget.knows_decodes(5)
    budget.record(5, 0, 0.0, 0.2)
    assert budget.decode_s == 0.2, "what two rows took says nothing about five"
    assert budget.knows_decodes(10)


def test_one_slow_small_step_does_not_matter_for_long() -> None:
    budget = PrefillBudget()
    budget.record(0, 16, attended_pairs(0, 16), 2.0)  # a first step, with everything cold
    teach(budget, 0.004, 0.0)
    assert budget.tokens_within(0.4, 0) == pytest.approx(100, rel=0.1)
