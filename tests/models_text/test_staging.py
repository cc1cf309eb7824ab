"""Weights on their way to a GPU, with plain memory in place of pinned."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lightvl.errors import ConfigError
from lightvl.models import load, staging
from lightvl.models.load import Target, WeightPart, load_weights

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 300), max_size=25), piece=st.sampled_from([8, 64, 1000]), seed=st.integers(0, 99))
def test_all_tensors_arrive_in_order(sizes: list[int], piece: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).to(DTYPES[i % len(DTYPES)]) for i, size in enumerate(sizes)]
    got = list(staging.stage(list(enumerate(tensors)), CPU, piece_bytes=piece))
    assert [label for label, _ in got] == list(range(len(sizes)))
    for (_, staged), tensor in zip(got, tensors, strict=True):
        assert staged.dtype == tensor.dtype and torch.equal(staged, tensor)


def test_odd_shapes_and_strides() -> None:
    tensors = [torch.tensor(3.0), torch.zeros(0, 4), torch.arange(12.0).view(3, 4).T, torch.ones(2, 3, 4)]
    got = [staged for _, staged in staging.stage(list(enumerate(tensors)), CPU, piece_bytes=8)]
    assert [tuple(staged.shape) for staged in got] == [(), (0, 4), (4, 3), (2, 3, 4)]
    assert all(torch.equal(a, b) for a, b in zip(got, tensors, strict=True))


@torch.inference_mode()
def test_threads_may_write_what_was_made_in_inference_mode() -> None:
    tensors = [torch.arange(20.0), torch.ones(3)]
    got = [staged for _, staged in staging.stage(list(enumerate(tensors)), CPU, piece_bytes=16)]
    assert all(torch.equal(a, b) for a, b in zip(got, tensors, strict=True))


def test_files_are_read_ahead_of_what_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    read = threading.Semaphore(0)
    original = staging._Buffer.read

    def count(self: staging._Buffer, source: torch.Tensor) -> None:
        original(self, source)
        read.release()

    monkeypatch.setattr(staging._Buffer, "read", count)
    items = [(i, torch.ones(16)) for i in range(staging.NUM_BUFFERS + 2)]
    staged = staging.stage(items, CPU, piece_bytes=64)
    next(staged)
    assert all(read.acquire(timeout=5) for _ in range(staging.NUM_BUFFERS)), "buffers stand empty"
    assert len(list(staged)) == len(items) - 1


def test_an_error_of_the_source_is_told() -> None:
    def items():  # type: ignore[no-untyped-def]
        yield 0, torch.ones(4)
        raise ConfigError("damaged")

    with pytest.raises(ConfigError, match="damaged"):
        list(staging.stage(items(), CPU))


def test_a_checkpoint_is_filled_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {f"w{i}": torch.randn(7, i + 1) for i in range(9)}
    save_file(dict(list(weights.items())[:4]), tmp_path / "model-1.safetensors")
    save_file(dict(list(weights.items())[4:]), tmp_path / "model-2.safetensors")
    filled: dict[str, torch.Tensor] = {}
    targets = {
        name: Target(tuple(w.shape), lambda tensor, name=name: filled.update({name: tensor.clone()}))  # type: ignore[misc]
        for name, w in weights.items()
    }
    seen = []

    def stage_on_cpu(items, device):  # type: ignore[no-untyped-def]
        seen.append(device.type)
        return staging.stage(items, CPU, piece_bytes=32)

    monkeypatch.setattr(load, "stage", stage_on_cpu)
    load_weights([WeightPart("test", (r"(.+)",), targets)], tmp_path, device=torch.device("meta"))
    assert seen == ["meta", "meta"] and filled.keys() == weights.keys()
    assert all(torch.equal(filled[name], w) for name, w in weights.items())
