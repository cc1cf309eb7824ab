"""Pages and rows from the memory that is there, and the reasons told for them."""

from __future__ import annotations

import pytest
import torch

from lightvl.config import ServerConfig
from lightvl.engine import memory
from lightvl.engine.memory import LargestImage, MemoryPlan, plan_memory
from lightvl.errors import ConfigError
from lightvl.models.config import decoder_config
from lightvl.scheduling.limits import SchedulerLimits

GIB = 1 << 30
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
MLLAMA = {"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}


def plan(
    monkeypatch: pytest.MonkeyPatch,
    gib: float,
    hf: dict[str, object],
    largest: LargestImage,
    page_len: int = 0,
    **flags: object,
) -> MemoryPlan:
    monkeypatch.setattr(memory, "available_bytes", lambda: int(gib * GIB))
    limits = SchedulerLimits(16, 64, 512, 32768, 0.2, 0.1)
    return plan_memory(ServerConfig(**flags), decoder_config(hf), limits, torch.bfloat16, page_len, largest)  # type: ignore[arg-type]


def test_a_large_machine_is_bounded_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    got = plan(monkeypatch, 512, QWEN, LargestImage(1280, 0))
    assert got.num_pages * 16 == memory.CPU_MAX_TOTAL_TOKENS
    assert "of use" in got.report[0]


def test_a_small_machine_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    got = plan(monkeypatch, 2, QWEN, LargestImage(1280, 0))
    token_bytes, row_bytes = 2 * 28 * 2 * 128 * 2, 1536 * 2
    used = got.num_pages * 16 * token_bytes + got.num_feature_rows * row_bytes
    assert 0.95 * GIB < used <= GIB
    assert got.num_feature_rows >= 2 * 1280 and got.num_cross_pages == 0


def test_flags_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(monkeypatch, 8, QWEN, LargestImage(0, 0), max_total_tokens=1000).num_pages == 62
    half = plan(monkeypatch, 2, QWEN, LargestImage(0, 0), mem_fraction_static=0.25)
    assert half.num_pages == pytest.approx(plan(monkeypatch, 1, QWEN, LargestImage(0, 0)).num_pages, abs=1)
    assert "may not fit" in plan(monkeypatch, 1, QWEN, LargestImage(0, 0), max_total_tokens=1 << 20).report[0]


def test_cross_pages_hold_a_few_images_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 2 * 8 * 1601 * 8 * 128 * 2  # what the facts give for the 11B: 52 MB
    roomy = plan(monkeypatch, 16, MLLAMA, LargestImage(1, 4), page_len=1601)
    assert roomy.num_cross_pages == 4 * GIB // page_bytes and roomy.num_feature_rows == 0
    tight = plan(monkeypatch, 3, MLLAMA, LargestImage(1, 4), page_len=1601)
    assert tight.num_cross_pages == memory.MIN_CROSS_IMAGES * 4


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no memory"):
        plan(monkeypatch, 0.01, QWEN, LargestImage(1280, 0))


def test_this_machine_has_memory() -> None:
    assert memory.available_bytes() > 100 << 20
