"""A step's rows as arrays: decode steps have a path of their own, which must say the same as that of chunks."""

from __future__ import annotations

import random

import numpy as np
import pytest

from lightvl.core import Prompt, SamplingParams
from lightvl.engine.inputs import _tokens_of_chunks, _tokens_of_decodes
from lightvl.scheduling.plan import Row
from lightvl.scheduling.sequence import Sequence

PAGE_SIZE = 4


@pytest.mark.parametrize("multi_axis", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_decodes_are_chunks_of_one_token(multi_axis: bool, seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for slot in range(rng.randint(1, 9)):
        prompt_len = rng.randint(1, 40)
        ids, positions = np.arange(prompt_len) + 7, np.arange(3 * prompt_len).reshape(3, -1)
        prompt = Prompt(ids, ids.tolist(), positions=positions, rope_delta=rng.randint(-9, 9))
        sequence = Sequence(slot, prompt, SamplingParams(max_tokens=99))
        num_known = prompt_len + rng.randint(0, 20)
        # tokens that were committed after the step was planned are none of its own
        sequence.output_ids.extend(rng.choices(range(1000), k=num_known - prompt_len + rng.randint(0, 2)))
        pages, start = rng.sample(range(100), 16), rng.randint(prompt_len, num_known)
        rows.append(Row(sequence, start, 1, pages, num_known, slot, samples=(sequence,)))
    got = _tokens_of_decodes(rows, PAGE_SIZE, multi_axis)
    want = _tokens_of_chunks(rows, PAGE_SIZE, multi_axis)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
