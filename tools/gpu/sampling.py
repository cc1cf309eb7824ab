"""Part 2: the sampler chooses on this device what it chooses on a CPU, with every setting that changes or filters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from grammar_helpers import Only

from gpu.rows import Context, Row
from lightvl.core import SamplingParams
from lightvl.engine.sampler import SampleRow, sample, to_host

NUM_ROWS, VOCAB_SIZE = 64, 152_064
PROMPT_LEN, OUTPUT_LEN = 40, 20
STOPS = frozenset(range(20))
GREEDY = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.5},
    "frequency and presence penalty": {"frequency_penalty": 0.7, "presence_penalty": 1.2},
    "bias": {"logit_bias": ((5, 100.0), (7, -100.0))},
    "no stop yet": {"min_tokens": 1000},
    "all of these": {
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.5,
        "presence_penalty": -0.3,
        "logit_bias": ((7, 2.0),),
        "min_tokens": 1000,
    },
    "grammar": {"grammar": Only(*range(30, 60))},
}
DRAWN = {
    "drawn": {},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "all filters": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "presence_penalty": 1.0, "min_tokens": 1000},
}
LEAST_SAME = 0.95  # of draws: logarithms round differently, and so does the token at which a filter cuts


def run(context: Context) -> None:
    for names, temperature, least in ((GREEDY, 0.0, 1.0), (DRAWN, 0.8, LEAST_SAME)):
        for name, changes in names.items():
            params = SamplingParams(
                max_tokens=2000, temperature=temperature, stop_token_ids=STOPS, top_logprobs=5, **changes
            )
            context.check(name, lambda row, params=params, least=least: _same(context, params, least, row))


def _same(context: Context, params: SamplingParams, least: float, row: Row) -> None:
    """The share of rows that choose the same token as on a CPU. Tokens that were seen, biased or stop are likely, so
    that what is done to them shows."""
    rng = np.random.default_rng(0)
    num_rows, vocab_size = (16, 1000) if context.is_dry else (NUM_ROWS, VOCAB_SIZE)
    seen = rng.integers(0, 100, (num_rows, PROMPT_LEN + OUTPUT_LEN))
    logits = torch.from_numpy(rng.standard_normal((num_rows, vocab_size), dtype=np.float32) * 2)
    logits[:, :100] += 8
    rows = [SampleRow(params, 0, seen.shape[1], tokens, PROMPT_LEN) for tokens in seen]
    if params.grammar is not None:  # of every other row
        rows[::2] = [replace(row, matcher=params.grammar.start()) for row in rows[::2]]
    with torch.inference_mode():
        here, there = (to_host(sample(logits.clone().to(device), rows), rows) for device in (context.device, "cpu"))
    same = [pair for pair in zip(here, there, strict=True) if pair[0][0] == pair[1][0]]
    row.at_least(len(same) / num_rows, least, "the same")
    off = max((abs(a.logprob - b.logprob) for (_, a), (_, b) in same), default=0.0)
    row.note = f"logprobs {off:.1e} off"
    assert off < 1e-3, row.note
