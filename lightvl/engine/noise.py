"""The randomness of sampling: a function of (seed, choice, position, token id) and of nothing else.

Called by the sampler. The integers are a promise: they are the same on CPU and CUDA, for any row, company or chunking,
and a seed must go on to give the same text in later versions. Knows nothing of logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

UInt64Array = np.ndarray[Any, np.dtype[np.uint64]]


def hash_choices(seeds: list[int], choices: list[int]) -> UInt64Array:
    """(R,) per row, from 0 <= seed < 2**64 and the choice's number. Fixed for as long as the row lives."""
    return _mix64(_mix64(np.array(seeds, dtype=np.uint64)) + np.array(choices, dtype=np.uint64))


def hash_positions(choice_hashes: UInt64Array, positions: list[int]) -> torch.Tensor:
    """(2, R, 1) int32 on the host: the two halves of each row's key for one step."""
    keys = _mix64(choice_hashes + np.array(positions, dtype=np.uint64))
    return torch.from_numpy(np.ascontiguousarray(keys.view(np.int32).reshape(-1, 2).T)).unsqueeze(-1)


def gumbel_noise(keys: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """keys (2, R, 1) int32, token_ids (V,) or (R, K) integers. Returns (R, V or K) float32, each finite.

    int32 products wrap and the masks make shifts logical, so this is 32-bit unsigned arithmetic on every device, at
    half the memory traffic of int64. The uniform u has 31 bits and is finest near 0, where the winners are: the noise
    is -log(-log(1 - u)).
    """
    hashed = _mix32(token_ids.to(torch.int32) ^ keys[0])
    hashed = _mix32(hashed.add_(keys[1]))
    u = hashed.bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF).float()
    u.add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)  # float32 rounds the largest integers up to 1
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix64(x: UInt64Array) -> UInt64Array:
    """The splitmix64 finaliser, a bijection of 64 bits; its input is stepped so that 0 is no fixed point."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The murmur3 finaliser, in place on int32; the factors are 0x85EBCA6B and 0xC2B2AE35 as signed numbers."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= -2048144789
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= -1028477387
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x
