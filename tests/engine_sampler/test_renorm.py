"""The GPU's way of filtering against the CPU's, with flashinfer's contract in exact arithmetic in place of its kernels;
and the calls themselves against the signatures of the version that is pinned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.core import SamplingParams
from lightvl.engine import sampler
from lightvl.engine.renorm import FlashinferRenorm, kept_tokens
from lightvl.engine.sampler import BROKEN, SampleRow, sample


class ExactRenorm:
    """What flashinfer promises, in float64: keep the least set of greatest probabilities, ties included."""

    def top_k(self, probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        assert probs.dtype == torch.float32 and probs.is_contiguous() and probs.isfinite().all()
        assert top_k.dtype == torch.int32 and top_k.shape == (len(probs),)
        assert int(top_k.min()) >= 1 and int(top_k.max()) <= probs.shape[1]
        ranked = probs.sort(-1, descending=True).values
        least = ranked.gather(1, top_k.long().unsqueeze(1) - 1)
        return self._norm(probs, probs >= least)

    def top_p(self, probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        assert top_p.dtype == torch.float32 and top_p.shape == (len(probs),) and bool((top_p < 1).all())
        assert probs.isfinite().all()
        ranked = probs.double().sort(-1, descending=True).values
        mass = ranked.cumsum(-1)
        enough = mass >= top_p.double().unsqueeze(1) * mass[:, -1:]
        least = ranked.gather(1, enough.int().argmax(-1, keepdim=True))
        return self._norm(probs, probs.double() >= least)

    def _norm(self, probs: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        left = torch.where(kept, probs, 0.0)
        return left / left.sum(-1, keepdim=True).clamp_min(1e-30)


ROWS = st.tuples(
    st.sampled_from([0, 1, 3, 20, 500]),  # top_k
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),  # top_p
    st.sampled_from([0.0, 0.05, 0.5]),  # min_p
    st.sampled_from([0.0, 0.7, 1.5]),  # temperature
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_the_same_tokens_as_on_a_cpu(rows: list[tuple[int, float, float, float]], seed: int) -> None:
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(seed)) * 3
    samples = [
        SampleRow(SamplingParams(16, temperature=t, top_p=p, top_k=k, min_p=m, seed=seed), 0, i)
        for i, (k, p, m, t) in enumerate(rows)
    ]
    cpu = sample(logits.clone(), samples).token_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "renorm_for", lambda device_type: ExactRenorm())
        gpu = sample(logits.clone(), samples).token_ids
    assert torch.equal(cpu, gpu)


def test_ties_are_kept_and_a_row_that_is_off_keeps_all() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, -2.0, -torch.inf]] * 4)
    top_k = torch.tensor([[2], [0], [0], [1]])
    top_p = torch.tensor([[1.0], [0.83], [1.0], [1.0]], dtype=torch.float64)
    log_min_p = torch.tensor([[-math.inf], [-math.inf], [-math.inf], [math.log(0.1)]])
    kept = kept_tokens(scores, top_k, top_p, log_min_p, ExactRenorm(), any_top_k=True, any_top_p=True)
    assert kept[0].tolist() == kept[1].tolist() == [True] * 4 + [False] * 2
    assert bool(kept[2].all())
    assert kept[3].tolist() == [True] + [False] * 5


def test_a_broken_row_is_told_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "renorm_for", lambda device_type: ExactRenorm())
    logits = torch.randn(3, 40)
    logits[1] = torch.nan
    rows = [SampleRow(SamplingParams(4, top_p=0.8, top_k=5), 0, i) for i in range(3)]
    token_ids = sample(logits, rows).token_ids.tolist()
    assert token_ids[1] == BROKEN and min(token_ids[0], token_ids[2]) >= 0


def test_flashinfer_is_called_as_it_is_declared() -> None:
    """Its signatures of 0.6.12, from facts/flashinfer.md: other argument names would fail at the first request."""

    class Sampling:
        def top_k_renorm_probs(self, probs: Any, top_k: Any) -> Any:
            return probs

        def top_p_renorm_probs(self, probs: Any, top_p: Any, is_deterministic: bool = False) -> Any:
            assert is_deterministic
            return probs

    renorm = FlashinferRenorm(Sampling())
    probs = torch.from_numpy(np.ones((1, 2), dtype=np.float32))
    assert renorm.top_k(probs, torch.tensor([1], dtype=torch.int32)) is probs
    assert renorm.top_p(probs, torch.tensor([0.5])) is probs
