"""The noise against plain integer arithmetic, and its distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.engine import noise
from lightvl.engine.noise import gumbel_noise, hash_choices, hash_positions


def mix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def mix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 127),
    position=st.integers(0, 2**20),
    token_id=st.integers(0, 200_000),
)
def test_noise_is_the_hash_as_unsigned_arithmetic_has_it(seed, choice, position, token_id):
    keys = hash_positions(hash_choices([seed], [choice]), [position])
    key = mix64((mix64((mix64(seed) + choice) % 2**64) + position) % 2**64)
    hashed = mix32((mix32(token_id ^ (key % 2**32)) + (key >> 32)) % 2**32)
    u = min(((hashed >> 1) + 0.5) / 2**31, 1 - 2**-24)
    expected = -math.log(-math.log1p(-u))
    assert gumbel_noise(keys, torch.tensor([[token_id]])).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_noise_is_finite_at_both_ends_of_the_uniform(monkeypatch):
    monkeypatch.setattr(noise, "_mix32", lambda x: torch.tensor([[0, -1, 1, -2, 2**31 - 1, -(2**31)]]).int())
    drawn = gumbel_noise(torch.zeros((2, 1, 1), dtype=torch.int32), torch.arange(6))
    assert torch.isfinite(drawn).all()
    assert drawn.min() < -2.7 and drawn.max() > 22


def test_noise_of_neighbouring_tokens_and_keys_is_uncorrelated():
    keys = hash_positions(hash_choices([s for s in range(8) for _ in range(8)], [0] * 64), list(range(8)) * 8)
    uniform = torch.exp(-torch.exp(-gumbel_noise(keys, torch.arange(4096)).double())) - 0.5
    along = (uniform[:, 1:] * uniform[:, :-1]).mean() * 12
    across = (uniform[1:] * uniform[:-1]).mean() * 12
    assert abs(along) < 5 / math.sqrt(64 * 4095) and abs(across) < 5 / math.sqrt(63 * 4096)
    assert abs(uniform.mean()) < 5 / math.sqrt(12 * 64 * 4096)
