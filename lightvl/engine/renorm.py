"""Which tokens top_k, top_p and min_p leave, on a GPU: by flashinfer's renormalisation, which finds a row's thresholds
without sorting it.

Called by the sampler. A threshold keeps all tokens that tie with the last one, as on a CPU; those of top_p come from
float32 sums, so a token at the very border may fall to the other side.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch

from lightvl.attention.cuda_library import flashinfer


class Renorm(Protocol):
    """probs (R, V) float32; what is not kept becomes 0."""

    def top_k(self, probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        """top_k (R,) int32 from 1 to V."""
        ...

    def top_p(self, probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        """top_p (R,) float32 below 1; a row may come with another sum than 1."""
        ...


class FlashinferRenorm:
    def __init__(self, sampling: Any) -> None:
        self._sampling = sampling

    def top_k(self, probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
        kept: torch.Tensor = self._sampling.top_k_renorm_probs(probs, top_k)
        return kept

    def top_p(self, probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
        # deterministic: else its sums depend on the order in which threads add, and a seed would not repeat itself
        kept: torch.Tensor = self._sampling.top_p_renorm_probs(probs, top_p, is_deterministic=True)
        return kept


@functools.cache
def renorm_for(device_type: str) -> Renorm | None:
    """None on a CPU, where looking among the best few is faster."""
    return FlashinferRenorm(flashinfer().sampling) if device_type == "cuda" else None


def kept_tokens(
    scores: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    log_min_p: torch.Tensor,
    renorm: Renorm,
    *,
    any_top_k: bool,
    any_top_p: bool,
) -> torch.Tensor:
    """(R, V) bool. scores (R, V) float32, none NaN; settings (R, 1): top_k 0, top_p 1 and log_min_p -inf are off."""
    num_tokens = scores.shape[1]
    best = scores.max(-1, keepdim=True).values
    # A row without a finite score has no probabilities; it must not bring NaN to kernels that search.
    probs = scores.masked_fill(best == -torch.inf, 0.0).softmax(-1)
    kept = torch.ones_like(probs, dtype=torch.bool)
    if any_top_k:
        probs = renorm.top_k(probs, torch.where(top_k > 0, top_k.clamp_max(num_tokens), num_tokens)[:, 0].int())
        kept = (probs > 0).logical_or_(top_k == 0)
    if any_top_p:
        has_top_p = top_p < 1
        asked = torch.where(has_top_p, top_p, 0.5)[:, 0].float()  # what it finds for the others is not used
        kept.logical_and_((renorm.top_p(probs, asked) > 0).logical_or_(~has_top_p))
    return kept.logical_and_(scores >= best + log_min_p)
