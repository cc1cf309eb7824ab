"""The parts of tools/gpu_check.py, run dry: on a CPU, over tiny shapes, with the CPU's classes in the place of CUDA's.
So their own code has run before a GPU sees it; and each of them must notice when what it checks is wrong."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from gpu.rows import Context, Row


def dry(part: str, only: str = "") -> list[Row]:
    """The rows of a part whose checks begin with `only`."""
    told: list[dict[str, Any]] = []

    class Some(Context):
        def check(self, name: str, body: Any, *, seconds: float = 1.0) -> None:
            if name.startswith(only):
                super().check(name, body, seconds=seconds)

    importlib.import_module(f"gpu.{part}").run(Some(part, "cpu", 600, told.append))
    return [Row(**message["row"]) for message in told if "row" in message]


def assert_passed(rows: list[Row]) -> None:
    assert rows and [(row.check, row.note) for row in rows if row.verdict not in ("pass", "told")] == []


def test_attention_dry() -> None:
    rows = dry("attention")
    assert_passed(rows)
    assert len(rows) > 20 and all(row.verdict == "pass" for row in rows)


def test_attention_notices_a_wrong_scale_and_a_lost_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightvl.attention.cpu import CpuAttention

    attend = CpuAttention.attend

    def lossy(self: Any, layer_idx: int, q: Any, k: Any, v: Any, inputs: Any) -> torch.Tensor:
        return attend(self, layer_idx, q * 1.05, k, v, inputs)

    monkeypatch.setattr(CpuAttention, "attend", lossy)
    assert {row.verdict for row in dry("attention", "prefill")} == {"fail"}


def test_attention_notices_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightvl.attention.cpu import CpuAttention

    monkeypatch.setattr(CpuAttention, "attend", lambda self, idx, q, *_: (q * float("nan")).flatten(1))
    assert {row.verdict for row in dry("attention", "decode of 5")} == {"fail"}
