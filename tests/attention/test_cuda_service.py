"""Whole services as on CUDA, against HF: the engine's graphs and late results, CudaAttention, fused operations and the
towers' attention, all over a stand-in for flashinfer that computes in float32, so that the answers are HF's exactly."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_helpers
import flashinfer_helpers
import pytest
import torch
from attention_helpers import dense_attention
from cuda_helpers import LateCudaPlatform
from parity_helpers import Oracle, Turns, ask, assert_same, question, serving

from lightvl.attention import cuda, cuda_encoder
from lightvl.attention.cuda import CudaAttention
from lightvl.attention.cuda_ops import FlashinferOps
from lightvl.engine import build
from lightvl.models import decoder

WITH_FLOAT32 = (torch.float16, torch.bfloat16, torch.float32)
QWEN_TEXT = {
    "hidden_size": 7 * 64,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}
SIZES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"text": QWEN_TEXT, "hidden_size": 7 * 64},
    "mllama": {"text": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}},  # heads of 64
}
pytestmark = pytest.mark.usefixtures("flashinfer")


def dense_varlen(q: Any, k: Any, v: Any, q_ends: Any, k_ends: Any, max_q: int, max_k: int) -> torch.Tensor:
    parts = zip(*(x.split(e.diff().tolist()) for x, e in ((q, q_ends), (k, k_ends), (v, k_ends))), strict=True)
    return torch.cat([dense_attention(*part, causal=False) for part in parts]).to(q.dtype)


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> LateCudaPlatform:
    def make_attention(*args: Any, **kwargs: Any) -> CudaAttention:
        made = CudaAttention(*args, device=torch.device("cpu"), max_decode_rows=8, **kwargs)
        for store in (made.pages, made.cross_pages):  # what nobody has written must not be read
            store.keys.fill_(torch.nan)
            store.values.fill_(torch.nan)
        return made

    monkeypatch.setattr(cuda_helpers, "FixedCpuAttention", make_attention)
    monkeypatch.setattr(cuda_helpers, "encoder_attention", cuda_encoder.encoder_attention)
    monkeypatch.setattr(cuda_encoder, "varlen_attn", dense_varlen)
    monkeypatch.setattr(decoder, "ops_for", lambda *_: FlashinferOps())
    monkeypatch.setattr(cuda, "DTYPES", WITH_FLOAT32)
    monkeypatch.setattr(flashinfer_helpers, "HALF", WITH_FLOAT32)
    platform = LateCudaPlatform(delay_s=lambda step: 0.001 * (step % 3))
    platform.defaults = replace(platform.defaults, mix_rows=False, max_steps_in_flight=2)
    monkeypatch.setattr(build, "_pick_platform", lambda config: platform)
    return platform


@pytest.mark.parametrize("family", ["qwen2_vl", "mllama"])
async def test_answers_are_hfs(family: str, platform: LateCudaPlatform, tmp_path: Path) -> None:
    """Several images, rows before any, prompts in chunks, a batch that shrinks, then the same prefixes again."""
    oracle = Oracle(family, tmp_path, **SIZES[family])
    all_turns = [question(i % 3, i) for i in range(4)]
    again: list[Turns] = [[*turns, ("assistant", ["Yes."]), ("user", ["Why?"])] for turns in all_turns]
    flags = {"chunked_prefill_size": 32, "max_running_requests": 6, "mem_fraction_static": None}
    async with serving(oracle, **flags) as service:
        for asked in (all_turns, again):
            answers = await asyncio.gather(
                *(ask(service, turns, max_tokens=6 + 2 * i) for i, turns in enumerate(asked))
            )
            for turns, (answer,) in zip(asked, answers, strict=True):
                assert_same(oracle, turns, answer)
        assert sum(graph.num_replays for graph in platform.graphs) > 10
