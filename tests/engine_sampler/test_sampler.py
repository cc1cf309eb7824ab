"""The sampler against HF's logits processors, against exact probabilities, and against itself in other company."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from grammar_helpers import Only
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lightvl.core import SamplingParams
from lightvl.engine import sampler
from lightvl.engine.sampler import BROKEN, SampleRow, sample, to_host


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 16, **changes})


def row(position: int = 7, choice: int = 0, seen: list[int] | None = None, prompt_len: int = 0, **changes) -> SampleRow:
    tokens = None if seen is None else np.array(seen, dtype=np.int64)
    return SampleRow(params(**changes), choice, position, tokens, prompt_len)


def tokens_of(logits: torch.Tensor, rows: list[SampleRow]) -> list[int]:
    return [token_id for token_id, _ in to_host(sample(logits.clone(), rows), rows)]


def kept_by_hf(logits: torch.Tensor, one: SampleRow) -> torch.Tensor:
    """(V,) bool: what HF's generate leaves of logits (V,)."""
    p, scores = one.params, logits.unsqueeze(0)
    ids = torch.from_numpy(one.seen).unsqueeze(0) if one.seen is not None else torch.zeros((1, 0), dtype=torch.int64)
    if p.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(p.repetition_penalty)(ids, scores)
    if p.logit_bias:
        scores = SequenceBiasLogitsProcessor([[[token_id], bias] for token_id, bias in p.logit_bias])(ids, scores)
    scores = TemperatureLogitsWarper(p.temperature)(ids, scores)
    if p.top_k:
        scores = TopKLogitsWarper(p.top_k)(ids, scores)
    if p.top_p < 1:
        scores = TopPLogitsWarper(p.top_p)(ids, scores)
    if p.min_p:
        scores = MinPLogitsWarper(p.min_p)(ids, scores)
    return scores[0] > -torch.inf


def kept_by_us(monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor, rows: list[SampleRow]) -> list[set[int]]:
    """The tokens that could be drawn, seen by making the noise a wave that favours one token after the other."""
    kept: list[set[int]] = [set() for _ in rows]
    for favoured in range(logits.shape[1]):
        monkeypatch.setattr(
            sampler,
            "gumbel_noise",
            lambda keys, ids, favoured=favoured: (ids == favoured).float().mul(1e6).expand(keys.shape[1], -1).clone(),
        )
        for tokens, token_id in zip(kept, tokens_of(logits, rows), strict=True):
            if token_id == favoured:
                tokens.add(token_id)
    return kept


# --- greedy ---------------------------------------------------------------------------------------------------------


def test_greedy_rows_cost_one_argmax_and_build_nothing(monkeypatch):
    for name in ("_draw", "_change"):
        monkeypatch.setattr(sampler, name, lambda *args: pytest.fail("greedy needs no more than argmax"))
    logits = torch.randn(5, 97)
    out = sample(logits.clone(), [row(temperature=0.0)] * 5)
    assert torch.equal(out.token_ids, logits.argmax(-1))
    assert out.logprobs is None and out.top_ids is None


def test_tokens_are_penalised_for_being_generated_and_for_each_time():
    logits = torch.tensor([[4.0, 3.5, 3.0, 2.6]])
    seen = [0, 0, 0, 0, 1, 1, 2]  # of which the first four are the prompt
    for penalties, best in (
        ({"presence_penalty": 1.0}, 0),
        ({"presence_penalty": -1.0}, 1),
        ({"frequency_penalty": 0.2}, 0),
        ({"frequency_penalty": -0.3}, 1),
        ({"frequency_penalty": -1.2}, 1),
        ({"frequency_penalty": 0.7, "presence_penalty": -2.0}, 2),  # 4, 3.5 + 0.6, 3 + 1.3, 2.6
        ({"repetition_penalty": 2.0}, 3),
        ({"repetition_penalty": 1.2, "presence_penalty": 1.0}, 0),
        ({"repetition_penalty": 2.0, "presence_penalty": -1.0}, 1),  # 2, 1.75 + 1, 1.5 + 1, 2.6
    ):
        one = row(temperature=0.0, seen=seen, prompt_len=4, **penalties)
        assert tokens_of(logits, [one]) == [best], penalties
        assert tokens_of(logits.expand(2, -1), [one, row(temperature=0.0)]) == [best, 0]


def following(grammar: Only, **changes) -> SampleRow:
    return replace(row(grammar=grammar, **changes), matcher=grammar)


@pytest.mark.parametrize("num_tokens", [31, 32, 97])
def test_a_row_follows_its_grammar_and_no_others(num_tokens):
    logits = torch.randn(4, num_tokens)
    logits[:, 0] = 50
    last = num_tokens - 1
    least = logits.argmin(-1).tolist()
    rows = [
        following(Only(least[0]), temperature=0.0),
        row(temperature=0.0),
        following(Only(7, last), temperature=0.0, top_logprobs=1),
        following(Only(least[3]), temperature=1.5, top_p=0.1, logit_bias=((3, 100.0),)),
    ]
    out = sample(logits.clone(), rows)
    best = 7 if logits[2, 7] > logits[2, last] else last
    assert out.token_ids.tolist() == [least[0], 0, best, least[3]]
    assert out.top_ids.tolist() == [[0]], "logprobs are the model's own"
    assert not rows[0].params.needs_best_only and rows[0].params.needs_commits and not rows[1].params.needs_commits


def test_draws_within_a_grammar_are_as_likely_as_the_model_has_them():
    logits = torch.tensor([[5.0, 0.0, 1.0, 2.0]])
    drawn = [tokens_of(logits, [following(Only(1, 3), seed=seed)])[0] for seed in range(2000)]
    assert set(drawn) == {1, 3}
    assert drawn.count(3) / len(drawn) == pytest.approx(math.exp(2) / (1 + math.exp(2)), abs=0.03)


def test_a_bias_bans_a_token_or_makes_it_the_only_one():
    logits = torch.tensor([[4.0, 3.5, 3.0]] * 3)
    banned, only = ({"logit_bias": ((token_id, bias),)} for token_id, bias in ((0, -100.0), (2, 100.0)))
    rows = [row(temperature=0.0, **banned), row(temperature=0.0), row(temperature=2.0, **only)]
    assert tokens_of(logits, rows) == [1, 0, 2]
    assert not rows[0].params.needs_best_only and rows[1].params.needs_best_only


def test_no_stop_token_is_chosen_before_the_least_number_of_tokens():
    logits = torch.tensor([[9.0, 8.0, 7.0]])
    early = {"min_tokens": 3, "stop_token_ids": frozenset({0, 3}), "logit_bias": ((0, 100.0),), "prompt_len": 5}
    for temperature in (0.0, 0.1):
        by_position = [
            tokens_of(logits, [row(position, temperature=temperature, **early)])[0] for position in range(5, 10)
        ]
        assert by_position == [1, 1, 1, 0, 0]
    assert not row(**early).params.needs_best_only


def test_greedy_ties_give_the_first_token_in_any_company():
    logits = torch.zeros(3, 50)
    logits[:, [11, 30, 49]] = 2.0
    greedy, drawn = row(temperature=0.0), row(temperature=1.0, top_k=5)
    assert tokens_of(logits, [greedy, greedy, greedy]) == [11, 11, 11]
    assert tokens_of(logits, [greedy, drawn, greedy])[::2] == [11, 11]


def test_greedy_takes_the_best_penalised_logit():
    logits = torch.tensor([[3.0, 2.9, -1.0], [-1.0, -1.1, -9.0]])
    penalised = [row(temperature=0.0, repetition_penalty=1.2, seen=[0, 0, 2])] * 2
    assert tokens_of(logits, penalised) == [1, 1]
    assert tokens_of(logits, [row(temperature=0.0), penalised[0]]) == [0, 1]


# --- filters --------------------------------------------------------------------------------------------------------

FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"top_k": 9, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.6, "min_p": 0.02},
    {"temperature": 0.3, "top_p": 0.8},
    {"temperature": 2.5, "top_k": 30, "min_p": 0.3},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "seen": [3, 5, 5, 60]},
    {"top_k": 3, "repetition_penalty": 0.8, "seen": [1, 2, 90]},
    {"top_k": 3, "logit_bias": ((5, 2.5), (9, -100.0), (41, 100.0))},
    {"top_p": 0.8, "repetition_penalty": 1.4, "seen": [1, 2, 9], "logit_bias": ((9, 1.5), (0, 0.25))},
    {},
]


@pytest.mark.parametrize("num_head", [4, 1024], ids=["small head", "head holds all"])
@pytest.mark.parametrize("block", [400, 1 << 21], ids=["small blocks", "one block"])
def test_kept_tokens_are_those_of_hf(monkeypatch, num_head, block):
    """All filters in one batch, so each row also meets the others' settings."""
    monkeypatch.setattr(sampler, "NUM_HEAD", num_head)
    monkeypatch.setattr(sampler, "CPU_BLOCK", block)
    monkeypatch.setattr(sampler, "TIE_SLACK", 1)
    rows = [row(**options) for options in FILTERS]
    logits = torch.randn(len(rows), 120, generator=torch.Generator().manual_seed(1)) * 3
    kept = kept_by_us(monkeypatch, logits, rows)
    for i, one in enumerate(rows):
        assert kept[i] == set(kept_by_hf(logits[i], one).nonzero().flatten().tolist()), FILTERS[i]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_a_filter_alone_keeps_what_it_keeps_in_company(monkeypatch, options):
    monkeypatch.setattr(sampler, "NUM_HEAD", 16)
    logits = torch.randn(1, 120, generator=torch.Generator().manual_seed(2)) * 3
    one = row(**options)
    assert kept_by_us(monkeypatch, logits, [one]) == [set(kept_by_hf(logits[0], one).nonzero().flatten().tolist())]


@pytest.mark.parametrize("slack", [0, 2, 64])
def test_ties_with_the_last_kept_token_are_kept(monkeypatch, slack):
    monkeypatch.setattr(sampler, "TIE_SLACK", slack)
    monkeypatch.setattr(sampler, "NUM_HEAD", 4)
    logits = torch.full((3, 40), -5.0)
    logits[:, 3] = 2.0
    logits[:, 10:22] = 1.0
    rows = [row(top_k=3), row(top_p=0.4), row(top_k=2, top_p=0.4)]
    expected = {3, *range(10, 22)}
    assert kept_by_us(monkeypatch, logits, rows) == [expected] * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(2, 300),
    spread=st.floats(0.01, 8),
    filters=st.lists(
        st.fixed_dictionaries(
            {
                "top_k": st.sampled_from([0, 1, 2, 20, 100, 10_000]),
                "top_p": st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
                "min_p": st.sampled_from([0.0, 0.001, 0.3, 1.0]),
                "temperature": st.sampled_from([0.01, 0.6, 1.0, 3.0]),
            }
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_drawn_tokens_are_ones_that_hf_keeps(seed, num_tokens, spread, filters):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(filters), num_tokens, generator=generator) * spread
    rows = [row(position=seed % 1000, seed=seed, **options) for options in filters]
    for i, token_id in enumerate(tokens_of(logits, rows)):
        kept = kept_by_hf(logits[i], rows[i])
        # HF's own sums are float32: a token within rounding of the border may fall on either side.
        assert kept[token_id] or logits[i][kept].min() - logits[i, token_id] < 1e-3 * spread, filters[i]


def test_the_head_grows_where_it_does_not_hold_the_nucleus(monkeypatch):
    """A flat row beside a peaked one: only the flat one is looked at again."""
    monkeypatch.setattr(sampler, "NUM_HEAD", 12)
    monkeypatch.setattr(sampler, "TIE_SLACK", 1)
    monkeypatch.setattr(sampler, "HEAD_GROWTH", 3)
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(3)) * torch.tensor([[0.1], [9.0], [0.1]])
    rows = [row(top_p=0.9), row(top_p=0.5), row(top_p=0.1)]
    sizes = []
    for kept, one, line in zip(kept_by_us(monkeypatch, logits, rows), rows, logits, strict=True):
        sizes.append(len(kept))
        assert kept == set(kept_by_hf(line, one).nonzero().flatten().tolist())
    assert sizes[0] > 36 > sizes[2] > 12 > sizes[1]


def test_an_unfiltered_row_beside_filtered_ones_keeps_every_token(monkeypatch):
    """And costs no second look at any row."""
    monkeypatch.setattr(sampler, "TIE_SLACK", 1)
    searches = []
    search = sampler._search
    monkeypatch.setattr(sampler, "_search", lambda *args: searches.append(args) or search(*args))
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(8))
    kept = kept_by_us(monkeypatch, logits, [row(top_k=3), row()])
    assert [len(tokens) for tokens in kept] == [3, 50]
    assert len(searches) == 50  # one per step


def test_tokens_without_a_logit_are_not_penalised():
    """mllama's image token stands in the prompt, one past the last logit."""
    logits = torch.tensor([[1.0, 0.5, 0.2], [3.0, 2.0, 0.0]])
    rows = [row(temperature=0.0, repetition_penalty=4.0, seen=[0, 3]), row(temperature=0.0)]
    assert tokens_of(logits, rows) == [1, 0]


# --- randomness -----------------------------------------------------------------------------------------------------


def chi_square_limit(degrees: int) -> float:
    """Upper 1e-5 point (Wilson and Hilferty): these tests are deterministic, the limit only tells what is odd."""
    return degrees * (1 - 2 / (9 * degrees) + 4.265 * math.sqrt(2 / (9 * degrees))) ** 3


def assert_distributed(token_ids: list[int], probs: torch.Tensor) -> None:
    observed = np.bincount(token_ids, minlength=len(probs))
    expected = probs.double().numpy() * len(token_ids)
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < chi_square_limit(len(expected) - 1)


@pytest.mark.parametrize("vary", ["seed", "position", "choice"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_k": 6}, {"top_p": 0.8}], ids=str)
def test_draws_follow_the_softmax(vary, options):
    logits = torch.randn(24, generator=torch.Generator().manual_seed(4)) * 1.5
    num_draws = 20_000
    drawn: list[int] = []
    for start in range(0, num_draws, 500):
        rows = [row(**{vary: start + i}, **options) for i in range(500)]
        drawn += tokens_of(logits.expand(500, -1), rows)
    one = row(**options)
    kept = kept_by_hf(logits, one)
    probs = (logits / one.params.temperature).masked_fill(~kept, -torch.inf).softmax(-1)
    assert_distributed(drawn, probs)


@pytest.mark.parametrize("other", [{"position": 8}, {"choice": 1}, {"seed": 1}], ids=str)
def test_draws_of_neighbours_are_independent(other):
    """Pairs that differ by one in one key follow the product of the two distributions."""
    logits = torch.tensor([0.5, 0.0, -0.5, 1.0])
    pairs: list[int] = []
    for start in range(0, 16_000, 500):
        base = [row(position=7 if "seed" not in other else start + i, seed=2 * (start + i)) for i in range(500)]
        if "seed" in other:
            base = [row(position=start + i) for i in range(500)]
            moved = [row(position=start + i, seed=1) for i in range(500)]
        else:
            moved = [row(**{"position": 7, **other}, seed=2 * (start + i)) for i in range(500)]
        first, second = (tokens_of(logits.expand(500, -1), rows) for rows in (base, moved))
        pairs += [4 * a + b for a, b in zip(first, second, strict=True)]
    probs = logits.softmax(-1)
    assert_distributed(pairs, torch.outer(probs, probs).flatten())


MIXED = [
    {"seed": 1},
    {"seed": 2, "temperature": 0.0},
    {"seed": 3, "top_k": 5},
    {"seed": 4, "top_p": 0.7, "temperature": 1.4},
    {"seed": 5, "min_p": 0.05},
    {"seed": 5, "choice": 1, "min_p": 0.05},
    {"seed": 6, "temperature": 0.8, "repetition_penalty": 1.5, "seen": [1, 2, 3]},
    {"seed": 7, "top_logprobs": 3},
    {"seed": 8, "frequency_penalty": 0.5, "presence_penalty": 0.2, "seen": [3, 7, 7, 9], "prompt_len": 1},
    {"seed": 9, "temperature": 0.0, "logit_bias": ((11, 3.0), (12, -1.5))},
    {"seed": 9, "min_tokens": 60, "stop_token_ids": frozenset(range(0, 1500, 2))},
]


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(len(MIXED))), num_rows=st.integers(1, len(MIXED)))
def test_a_row_draws_the_same_in_any_place_and_company(order, num_rows):
    logits = torch.randn(len(MIXED), 1500, generator=torch.Generator().manual_seed(5)) * 2
    rows = [row(position=40 + i, **options) for i, options in enumerate(MIXED)]
    alone = [tokens_of(logits[i : i + 1], [rows[i]])[0] for i in range(len(rows))]
    chosen = order[:num_rows]
    assert tokens_of(logits[chosen], [rows[i] for i in chosen]) == [alone[i] for i in chosen]


@pytest.mark.parametrize("block", [1, 3000, 4500])
def test_drawing_in_blocks_changes_nothing(monkeypatch, block):
    logits = torch.randn(len(MIXED), 1500, generator=torch.Generator().manual_seed(5)) * 2
    rows = [row(position=40 + i, **options) for i, options in enumerate(MIXED)]
    whole = tokens_of(logits, rows)
    monkeypatch.setattr(sampler, "CPU_BLOCK", block)
    assert tokens_of(logits, rows) == whole


def test_settings_are_made_tensors_once_while_the_rows_stay(monkeypatch):
    logits = torch.randn(3, 64)
    options = [params(seed=i, top_k=4) for i in range(3)]
    sample(logits.clone(), [SampleRow(p, 0, 10) for p in options])
    before = sampler._draws.cache_info().misses
    for position in range(11, 15):
        sample(logits.clone(), [SampleRow(p, 0, position) for p in options])
    assert sampler._draws.cache_info().misses == before


# --- logprobs -------------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_logits_and_only_of_rows_that_want_them():
    logits = torch.randn(4, 80, generator=torch.Generator().manual_seed(6)) * 2
    rows = [
        row(top_logprobs=2, temperature=0.3, top_k=4, repetition_penalty=1.7, seen=list(range(40))),
        row(),
        row(top_logprobs=0, temperature=0.0),
        row(top_logprobs=5, temperature=1.9),
    ]
    results = to_host(sample(logits.clone(), rows), rows)
    expected = logits.log_softmax(-1)
    assert results[1][1] is None
    for i, k in ((0, 2), (2, 0), (3, 5)):
        token_id, logprob = results[i]
        assert logprob is not None and logprob.token_id == token_id and len(logprob.top) == k
        assert logprob.logprob == pytest.approx(expected[i, token_id].item(), abs=1e-5)
        best = expected[i].topk(max(k, 1))
        assert [t for t, _ in logprob.top] == best.indices.tolist()[:k]
        assert [v for _, v in logprob.top] == pytest.approx(best.values.tolist()[:k], abs=1e-5)


def test_more_alternatives_than_tokens_and_impossible_tokens():
    logits = torch.tensor([[1.0, -torch.inf, 0.0]])
    [(token_id, logprob)] = to_host(sample(logits, rows := [row(temperature=0.0, top_logprobs=20)]), rows)
    assert token_id == 0 and logprob is not None
    assert [t for t, _ in logprob.top] == [0, 2, 1]
    assert logprob.top[2][1] == sampler.LEAST_LOGPROB


# --- broken logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_logprobs": 2}],
    ids=str,
)
def test_a_broken_row_is_told_and_harms_no_other(options):
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(7))
    rows = [row(position=i, **options) for i in range(4)]
    whole = tokens_of(logits, rows)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    out = sample(logits.clone(), rows)
    assert out.token_ids[1:3].tolist() == [BROKEN, BROKEN]
    assert [token_id for token_id, _ in to_host(out, rows)] == [whole[0], BROKEN, BROKEN, whole[3]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.9}], ids=str)
def test_single_nans_count_as_impossible_tokens(options):
    logits = torch.zeros(1, 30)
    logits[0, 4:] = torch.nan
    for position in range(20):
        assert tokens_of(logits, [row(position=position, **options)])[0] < 4


def test_plus_infinity_is_chosen():
    logits = torch.zeros(2, 30)
    logits[:, 9] = torch.inf
    assert tokens_of(logits, [row(temperature=0.0), row(temperature=0.5, top_p=0.9)]) == [9, 9]
