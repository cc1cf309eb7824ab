"""The parts of tools/gpu_check.py, run dry: on a CPU, over tiny shapes, with the CPU's classes in the place of CUDA's.
So their own code has run before a GPU sees it; and each of them must notice when what it checks is wrong."""

from __future__ import annotations

import importlib
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import devices
from gpu.rooflines import decode_bytes, encode_flops, prefill_flops
from gpu.rows import Context, Row
from gpu.served import Served
from make_random_model import ARCHITECTURES, write_json
from parity_helpers import Bfloat16Errors

from lightvl.attention.store import KVShape
from lightvl.engine import cuda
from lightvl.engine.graphs import DecodeGraphs
from lightvl.models.config import decoder_config
from lightvl.models.family import ImageLayout
from lightvl.models.vision.config import mllama_vision_config, qwen_vision_config


def dry(part: str, only: str = "", **given: Any) -> list[Row]:
    """The rows of a part whose checks begin with `only`."""
    told: list[dict[str, Any]] = []

    class Some(Context):
        def check(self, name: str, body: Any, *, seconds: float = 1.0) -> None:
            if name.startswith(only):
                super().check(name, body, seconds=seconds)

    importlib.import_module(f"gpu.{part}").run(Some(part, "cpu", 600, told.append, **given))
    return [Row(**message["row"]) for message in told if "row" in message]


def assert_passed(rows: list[Row]) -> None:
    assert rows and [(row.check, row.note) for row in rows if row.verdict not in ("pass", "told")] == []


def test_sampling_dry_notices_settings_that_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import sampling

    from lightvl.engine import sampler

    assert_passed(dry("sampling"))
    calls = itertools.count()
    change = sampler._change
    monkeypatch.setattr(sampler, "_change", lambda *args: change(*args) if next(calls) % 2 else None)
    lost = {row.check for row in dry("sampling") if row.verdict == "fail"}
    assert lost == {*sampling.GREEDY} - {"greedy"} | {"all filters"}


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


def test_families_dry() -> None:
    rows = dry("families")
    assert_passed(rows)
    assert len(rows) >= 2 and all(row.value is not None for row in rows)


def test_families_notice_twice_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Bfloat16Errors.ours.fget
    monkeypatch.setattr(Bfloat16Errors, "ours", property(lambda self: 3 * ours(self)))
    assert {row.verdict for row in dry("families", "qwen2_vl")} == {"fail"}


def test_speed_dry() -> None:
    rows = dry("speed")
    assert_passed(rows)
    values = {row.check: row.value for row in rows}
    assert len(values) == 2 + 2 * (1 + 2 + 1 + 2)
    assert all(value is not None and value > 0 for value in values.values())


def test_speed_tells_what_took_the_time(capfd: pytest.CaptureFixture[str]) -> None:
    (row,) = dry("speed", "qwen2-vl-tiny: prefill", profiles=True)
    assert row.verdict == "told" and f"-- {row.check}\n" in capfd.readouterr().out


def test_memory_dry() -> None:
    rows = dry("memory")
    assert_passed(rows)
    assert len(rows) == 3 and "12 requests" in rows[1].note


def test_memory_notices_a_request_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def submit(self: Any, prompts: Any, params: Any) -> list[Exception | None]:
        return [None, MemoryError("too large")]

    monkeypatch.setattr(Served, "submit", submit)
    (row,) = dry("memory", "qwen2-vl-tiny: the largest")
    assert row.verdict == "fail" and "too large" in row.note


def test_rooflines_of_the_real_models(tmp_path: Path) -> None:
    """Against the published sizes: 7.62 and 10.67 billion parameters, of which a step reads what it must."""
    configs = {}
    for name in ("qwen2-vl-7b", "llama-3.2-11b-vision"):
        configs[name] = decoder_config(ARCHITECTURES[name].config)
    qwen, llama = configs["qwen2-vl-7b"], configs["llama-3.2-11b-vision"]
    one = decode_bytes(qwen, [1000], num_cross_pages=0, cross_page_len=0)
    assert one == pytest.approx(2 * (7.615e9 - 152064 * 3584) + 1000 * 57344, rel=1e-3)
    assert decode_bytes(qwen, [10, 20], num_cross_pages=0, cross_page_len=0) - one == (30 - 1000) * 57344
    text = decode_bytes(llama, [0], num_cross_pages=0, cross_page_len=1601)
    assert text == pytest.approx(2 * 7.5e9, rel=5e-3), "Llama-3.1-8B without its embedding"
    seen = decode_bytes(llama, [0], num_cross_pages=2, cross_page_len=1601)
    kv = 2 * 2 * 8 * 1601 * 8 * 128 * 2
    assert seen - text - kv == 2 * 8 * 4096 * (2 * 4096 + 3 * 14336)
    # 2 operations per weight and token; attention adds an eighth at 8k
    assert prefill_flops(qwen, 8192) == pytest.approx(2 * 8192 * 6.525e9 * 1.126, rel=2e-3)
    # weights that each patch passes, for mllama with projector and cross K,V; and scores, that grow with its square
    for name, vision_config, grid, pages, patches, params in (
        ("qwen2-vl-7b", qwen_vision_config, (1, 80, 80), 0, 6400, 0.641e9),
        ("llama-3.2-11b-vision", mllama_vision_config, (6, 2, 2), 4, 6404, 0.886e9),
    ):
        write_json(tmp_path / "preprocessor_config.json", ARCHITECTURES[name].preprocessor_config)
        vision = vision_config(ARCHITECTURES[name].config, tmp_path)
        scores = 4 * patches**2 * 1280 * (32 if not pages else 40)
        flops = encode_flops(vision, configs[name], ImageLayout(1600, pages, 1120, 1120, grid))
        assert (flops - scores) / (2 * patches) == pytest.approx(params, rel=2e-3)


def test_graphs_dry() -> None:
    rows = dry("graphs")
    assert_passed(rows)
    assert {row.verdict for row in rows if "graph equals" in row.check} == {"pass"}
    assert any("preempted" in row.note for row in rows)


def test_graphs_notice_what_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that goes on with the step before."""
    monkeypatch.setattr(DecodeGraphs, "forward", lambda self, inputs: self._logits[: len(inputs.token_ids)])
    rows = dry("graphs", "llama: graph")
    assert {row.verdict for row in rows} == {"fail"}


@pytest.mark.full
def test_server_dry() -> None:
    """A server and two tools, each a process that loads torch."""
    rows = dry("server")
    assert_passed(rows)
    assert [row.verdict for row in rows] == ["told", "told", "pass"]


def test_what_stands_for_cuda_takes_the_same_arguments() -> None:
    """Only its code is new to a GPU: the names are there, and they take what the stand-ins take."""
    shape = KVShape(1, 2, 64, num_heads=2)
    given = {"num_pages": 1, "page_size": 1, "dtype": torch.bfloat16, "num_cross_pages": 0, "cross_page_len": 0}
    for make in (devices.make_attention, devices.make_graph_attention):
        on_cuda = make("cuda")
        inspect.signature(on_cuda.func).bind(shape, **given, **on_cuda.keywords)
        inspect.signature(make("cpu")).bind(shape, **given)
    here, there = (inspect.signature(devices.tower_attention(device)) for device in ("cpu", "cuda"))
    assert here == there
    assert hasattr(devices.make_graph_attention("cuda").func, "fixed_decode")
    assert callable(cuda.graphs_pool)
