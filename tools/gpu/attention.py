"""Part 3: the attention backend, the decoder's fused operations, the towers' attention and the sampler's noise against
dense references in float32, in bfloat16 over a grid of shapes.

The bound is on the norm of the error over the norm of the reference: bfloat16 operands give 2e-3 to 5e-3, one key too
many or too few a tenth and more. A dry run uses few tiny shapes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from attention_helpers import Dense, Pair, cross_pairs, encoder_pair

from gpu.devices import make_attention, tower_attention, wait
from gpu.rows import Context, Row
from lightvl.attention.ops import TorchOps, ops_for
from lightvl.core import SamplingParams
from lightvl.engine.noise import gumbel_noise, hash_choices, hash_positions
from lightvl.engine.sampler import SampleRow, sample

BOUND = 1e-2
DTYPE = torch.bfloat16

Steps = list[list[tuple[int, int]]]
"""Per step its rows: (sequence, number of new tokens)."""


@dataclass(frozen=True)
class Case:
    """Several steps of one backend. `groups`: query heads per K,V head."""

    name: str
    steps: Steps
    groups: int
    kv_heads: int
    dim: int
    page_size: int


def cases(is_dry: bool) -> list[Case]:
    long = 20 if is_dry else 3000
    batch = 5 if is_dry else 256
    shapes = [  # the served ones: Qwen2-VL-7B and 2B, Llama-3.1-8B, Vicuna-7B, Qwen2-0.5B, and what else groups can be
        (7, 4, 128),
        (6, 2, 128),
        (4, 8, 128),
        (1, 32, 128),
        (7, 2, 64),
        (8, 1, 128),
        (2, 2, 64),
        (3, 2, 64),
        (5, 2, 128),
    ]
    if is_dry:
        shapes = [(7, 1, 64), (1, 2, 64)]
    made = []
    for groups, kv_heads, dim in shapes:
        for page_size in (1, 16):
            shape = f"{groups * kv_heads}/{kv_heads} heads of {dim}, pages of {page_size}"
            rng = random.Random(f"{groups} {dim} {page_size}")
            mixed = [[(seq, rng.choice([1, 1, 2, 17, 60])) for seq in rng.sample(range(6), 4)] for _ in range(4)]
            steps: dict[str, Steps] = {
                "prefill in chunks": [[(0, long)], [(0, long // 3), (1, 7)], [(1, long // 2), (0, 1)]],
                "chunks and decode": [[(seq, 5 + 7 * seq) for seq in range(6)], *mixed],
                f"decode of {batch}": [
                    [(seq, 1 + seq * 13 % 90) for seq in range(batch)],
                    *[[(seq, 1) for seq in range(batch)] for _ in range(2)],
                    [(seq, 1) for seq in range(0, batch, 2)],
                ],
                "decode of a long one": [[(0, 2 * long)], [(0, 1)], [(0, 1)]],
            }
            made += [Case(f"{name}, {shape}", rows, groups, kv_heads, dim, page_size) for name, rows in steps.items()]
    # the first shapes matter most, and time may end: one page size first for all of them
    return made if is_dry else sorted(made, key=lambda case: case.page_size != 16)


def run(context: Context) -> None:
    device = context.device
    for name, ops_check in OPS.items():
        context.check(f"ops: {name}", lambda row, ops_check=ops_check: ops_check(device, row))
    context.check("noise is that of a CPU", lambda row: _noise(device, row))
    context.check("tokens are drawn as on a CPU", lambda row: _draws(device, row))
    for dim in (80,) if context.is_dry else (80, 72, 64, 128):
        for what, seg_lens, kv_lens in SEGMENTS if not context.is_dry else SEGMENTS[1:]:
            context.check(
                f"tower: {what}, heads of {dim}",
                lambda row, dim=dim, seg_lens=seg_lens, kv_lens=kv_lens: _tower(device, dim, seg_lens, kv_lens, row),
            )
    for groups, dim, page_len in [(4, 64, 5)] if context.is_dry else [(4, 128, 1601), (1, 64, 5), (7, 128, 26)]:
        context.check(
            f"cross: {2 * groups}/2 heads of {dim}, tiles of {page_len}",
            lambda row, args=(groups, dim, page_len): _cross(device, *args, row),
        )
    for case in cases(context.is_dry):
        context.check(case.name, lambda row, case=case: _self(device, case, row), seconds=2)


def judge(row: Row, pairs: list[Pair]) -> None:
    """The worst of `pairs`; NaN is the worst of all."""
    errors = [((got.float() - want).norm() / want.norm()).item() for got, want in pairs]
    row.at_most(max(errors, key=lambda error: float("inf") if error != error else error), BOUND)


@torch.inference_mode()
def _self(device: str, case: Case, row: Row) -> None:
    dense = Dense(
        groups=case.groups,
        kv_heads=case.kv_heads,
        dim=case.dim,
        page_size=case.page_size,
        dtype=DTYPE,
        seed=1,
        num_tokens=2 * case.page_size * len({seq for step in case.steps for seq, _ in step})
        + sum(num for step in case.steps for _, num in step),
        make=make_attention(device),
        device=device,
    )
    judge(row, [pair for step in case.steps for pair in dense.step(step)])
    wait(device)


@torch.inference_mode()
def _cross(device: str, groups: int, dim: int, page_len: int, row: Row) -> None:
    make = make_attention(device)
    judge(row, cross_pairs(groups=groups, dim=dim, page_len=page_len, dtype=DTYPE, make=make, device=device))


SEGMENTS: list[tuple[str, list[int], list[int] | None]] = [
    ("one image of 5184 patches", [5184], None),
    ("windows and odd images", [64] * 20 + [16, 4, 300, 77, 64], None),
    ("queries and keys of other numbers, some without queries", [40, 0, 25, 1], [40, 30, 65, 9]),
]


@torch.inference_mode()
def _tower(device: str, dim: int, seg_lens: list[int], kv_lens: list[int] | None, row: Row) -> None:
    attention = tower_attention(device)
    judge(row, [encoder_pair(attention, seg_lens, kv_lens, heads=4, dim=dim, dtype=DTYPE, device=device)])


# --- operations between matmuls -------------------------------------------------------------------------------------


def _random(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(device, DTYPE)


def _norms(device: str, row: Row) -> None:
    torch.manual_seed(0)
    ours, exact = ops_for(torch.device(device), DTYPE), TorchOps()
    x, branch, weight = _random(device, 33, 3584), _random(device, 33, 3584), _random(device, 3584)
    heads, head_weight = _random(device, 33, 5, 128), _random(device, 128)
    wide = (branch.float(), x.float(), weight.float(), 1e-5)
    pairs = [
        (ours.rms_norm(x, weight, 1e-6), exact.rms_norm(x.float(), weight.float(), 1e-6)),
        (ours.rms_norm(heads, head_weight, 1e-6), exact.rms_norm(heads.float(), head_weight.float(), 1e-6)),
    ]
    pairs += zip(ours.add_rms_norm(branch, x, weight, 1e-5), exact.add_rms_norm(*wide), strict=True)
    judge(row, list(pairs))


def _silu(device: str, row: Row) -> None:
    torch.manual_seed(1)
    x = _random(device, 9, 2 * 18944)
    judge(row, [(ops_for(torch.device(device), DTYPE).silu_and_mul(x.clone()), TorchOps().silu_and_mul(x.float()))])


def _rope(device: str, row: Row) -> None:
    torch.manual_seed(2)
    pairs: list[Pair] = []
    for dim in (64, 128, 72, 80):  # of decoders, of towers
        heads = _random(device, 40, 7 + 2, dim)
        angles = torch.rand(40, dim // 2, device=device) * 5000
        ours, exact = ops_for(torch.device(device), DTYPE), TorchOps()
        want = exact.rope(heads.float(), 7, 1, exact.rope_table(angles.cos(), angles.sin()))
        got = ours.rope(heads.clone(), 7, 1, ours.rope_table(angles.cos(), angles.sin()))
        pairs += zip(got, want, strict=True)
    judge(row, pairs)


def _quick_gelu(device: str, row: Row) -> None:
    torch.manual_seed(3)
    x = _random(device, 33, 5120)
    judge(row, [(ops_for(torch.device(device), DTYPE).quick_gelu(x.clone()), TorchOps().quick_gelu(x.float()))])


OPS: dict[str, Callable[[str, Row], None]] = {
    "norms": _norms,
    "silu and mul": _silu,
    "quick gelu": _quick_gelu,
    "rope": _rope,
}


# --- sampling -------------------------------------------------------------------------------------------------------


def _noise(device: str, row: Row) -> None:
    """The integers are the same; the two logarithms may differ in their last digits."""
    keys = hash_positions(hash_choices(list(range(50)), [0] * 50), list(range(50)))
    token_ids = torch.arange(20000)
    want = gumbel_noise(keys, token_ids)
    got = gumbel_noise(keys.to(device), token_ids.to(device)).cpu()
    row.at_most(((got - want).abs() / want.abs().clamp_min(1)).max().item(), 1e-5)


@torch.inference_mode()
def _draws(device: str, row: Row) -> None:
    """All settings at once. A token may differ only where two are equally good to float32's last digits."""
    torch.manual_seed(4)
    settings: list[dict[str, Any]] = [
        {"temperature": 0},
        {},
        {"temperature": 0.7, "top_k": 40},
        {"top_p": 0.9},
        {"min_p": 0.05, "temperature": 1.5},
        {"top_k": 200, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.3, "top_p": 0.95},
        {"frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": ((5, 4.0), (9, -100.0))},
    ]
    rows = [
        SampleRow(SamplingParams(8, seed=seed, **given), choice=0, position=seed, seen=np.arange(seed, seed + 300))
        for seed, given in enumerate(settings * 20)
    ]
    logits = torch.randn(len(rows), 32000) * 3
    want = sample(logits.clone(), rows).token_ids
    got = sample(logits.to(device), rows).token_ids.cpu()
    row.at_least((got == want).float().mean().item(), 0.99)
