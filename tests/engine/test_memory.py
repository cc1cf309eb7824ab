"""Pages and rows from the memory that is there, and the reasons told for them."""

from __future__ import annotations

import pytest
import torch

from lightvl.engine import memory
from lightvl.engine.memory import Budget, LargestImage, MemoryPlan, plan_memory
from lightvl.errors import ConfigError
from lightvl.models.config import decoder_config
from lightvl.scheduling.limits import SchedulerLimits

GIB = 1 << 30
MOST = 1 << 18
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
    gib: float,
    hf: dict[str, object],
    largest: LargestImage,
    page_len: int = 0,
    *,
    max_total_tokens: int | None = None,
    is_hard: bool = False,
) -> MemoryPlan:
    limits = SchedulerLimits(16, 64, 512, 32768, 0.2, 0.1)
    budget = Budget(int(gib * GIB), "the test's memory", most_tokens=MOST, is_hard=is_hard)
    return plan_memory(budget, max_total_tokens, decoder_config(hf), limits, torch.bfloat16, page_len, largest)


def test_a_large_machine_is_bounded_by_use() -> None:
    got = plan(256, QWEN, LargestImage(1280, 0))
    assert got.num_pages * 16 == MOST
    assert "of use" in got.report[0]


def test_a_small_machine_is_bounded_by_memory() -> None:
    got = plan(1, QWEN, LargestImage(1280, 0))
    token_bytes, row_bytes = 2 * 28 * 2 * 128 * 2, 1536 * 2
    used = got.num_pages * 16 * token_bytes + got.num_feature_rows * row_bytes
    assert 0.95 * GIB < used <= GIB
    assert got.num_feature_rows >= 2 * 1280 and got.num_cross_pages == 0


def test_flags_decide() -> None:
    assert plan(4, QWEN, LargestImage(0, 0), max_total_tokens=1000).num_pages == 62
    assert "may not fit" in plan(0.5, QWEN, LargestImage(0, 0), max_total_tokens=1 << 20).report[0]
    with pytest.raises(ConfigError, match="--max-total-tokens 1048576"):
        plan(0.5, QWEN, LargestImage(0, 0), max_total_tokens=1 << 20, is_hard=True)


def test_cross_pages_hold_a_few_images_at_least() -> None:
    page_bytes = 2 * 8 * 1601 * 8 * 128 * 2  # what the facts give for the 11B: 52 MB
    roomy = plan(8, MLLAMA, LargestImage(1, 4), page_len=1601)
    assert roomy.num_cross_pages == 4 * GIB // page_bytes and roomy.num_feature_rows == 0
    tight = plan(1.5, MLLAMA, LargestImage(1, 4), page_len=1601)
    assert tight.num_cross_pages == memory.MIN_CROSS_IMAGES * 4


def test_nothing_fits() -> None:
    with pytest.raises(ConfigError, match="no memory"):
        plan(0.01, QWEN, LargestImage(1280, 0))


def test_this_machine_has_memory() -> None:
    assert memory.available_bytes() > 100 << 20
