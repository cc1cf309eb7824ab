"""Decode rows through all layers in one call of C: to the bit what the layers give one operation after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import Drive, DriveRow, load_model, random_decoder, tiny_llama, tiny_qwen2

from lightvl.attention.cpu import CpuAttention
from lightvl.kernels.cpu import CpuKernels, cpu_kernels
from lightvl.models.config import DecoderConfig
from lightvl.models.decoder import Decoder
from lightvl.models.layers import SelfRun

pytestmark = pytest.mark.skipif(cpu_kernels() is None, reason="needs LightVL's kernels and a CPU that runs them")

SHAPE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_hidden_layers": 3}
MODELS: dict[str, Callable[[Path], object]] = {
    "llama": lambda d: tiny_llama(d, **SHAPE, num_key_value_heads=4),
    "grouped_with_bias": lambda d: tiny_qwen2(d, **SHAPE, num_key_value_heads=2),
    "one_head": lambda d: tiny_llama(d, **SHAPE | {"num_attention_heads": 1, "head_dim": 96}, num_key_value_heads=1),
}
PAGE_LEN = 5


def config_of(name: str, folder: Path) -> DecoderConfig:
    MODELS[name](folder)
    return load_model(folder, torch.bfloat16).config


def drive(decoder: Decoder) -> Drive:
    backend = CpuAttention(
        decoder.config.kv_shape,
        num_pages=600,
        page_size=4,
        dtype=torch.bfloat16,
        num_cross_pages=3,
        cross_page_len=PAGE_LEN,
    )
    return Drive(decoder, backend, page_size=4, num_pages=600)


def rows_of(num_rows: int, num_tokens: int, seed: int, sees_image: bool = False) -> list[DriveRow]:
    """Prompts of different lengths where `num_tokens` is more than 1; with cross attention, of every other one."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(num_rows):
        ids = torch.randint(0, 320, (num_tokens + (row % 7 if num_tokens > 1 else 0),), generator=generator).tolist()
        cross = [(0, len(ids), (0, 2))] if sees_image and row % 2 == 0 else []
        rows.append(DriveRow(str(row), ids, cross=cross))
    return rows


def decoded(decoder: Decoder, num_rows: int, features: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Logits of three decode steps after a prompt, and the K,V that they left."""
    driven = drive(decoder)
    assert isinstance(driven.attention, CpuAttention)
    if features is not None:
        with torch.inference_mode():
            decoder.write_cross(features, (0, 2), driven.attention)
    driven.step(rows_of(num_rows, 3, seed=1, sees_image=features is not None))
    steps = [driven.step(rows_of(num_rows, 1, seed, features is not None)) for seed in (2, 3, 4)]
    return [
        torch.cat([row for step in steps for row in step]),
        driven.attention.pages.keys,
        driven.attention.pages.values,
    ]


def check(
    decoder: Decoder, num_rows: int, monkeypatch: pytest.MonkeyPatch, features: torch.Tensor | None = None
) -> None:
    together = decoded(decoder, num_rows, features)
    assert all(part._stack is not None for part in decoder._parts if isinstance(part, SelfRun))
    with monkeypatch.context() as patched:
        patched.setattr(SelfRun, "_made_stack", lambda _: None)
        apart = decoded(decoder, num_rows, features)
    for mine, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_rows", [1, 2, 9, 33])
def test_same_bits(name: str, num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(random_decoder(config_of(name, tmp_path)), num_rows, monkeypatch)


def test_same_bits_where_weights_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuKernels, "pack", lambda *_: None)
    check(random_decoder(config_of("grouped_with_bias", tmp_path)), 3, monkeypatch)


@pytest.mark.parametrize("cross_layers", [(0,), (2,), (0, 1, 4), (1, 3)])
def test_cross_layers_between(cross_layers: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config_of("llama", tmp_path), num_layers=5, cross_layers=cross_layers)
    features = torch.randn(2 * PAGE_LEN, 256, generator=torch.Generator().manual_seed(5)).bfloat16()
    decoder = random_decoder(config)
    check(decoder, 4, monkeypatch, features)
    check(decoder, 4, monkeypatch)


def test_values_become_finite_when_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's next owner reads them with weight 0. A row that is not a number breaks no other."""
    decoder = random_decoder(config_of("llama", tmp_path))
    assert decoder._embedding is not None
    broken = rows_of(3, 1, seed=2)[1].ids[0]
    with torch.inference_mode():
        decoder._embedding[broken] = torch.nan
    check(decoder, 3, monkeypatch)
    logits, keys, values = decoded(decoder, 3)
    assert keys.isnan().any() and values.isfinite().all()
    assert logits.view(3, 3, -1).isnan().all(-1)[:, [0, 2]].sum() == 0 and logits[1].isnan().all()


def test_greatest_logits_alone(tmp_path: Path) -> None:
    decoder = random_decoder(config_of("grouped_with_bias", tmp_path))
    driven = drive(decoder)
    driven.step(rows_of(4, 3, seed=1))
    inputs = driven.inputs(rows_of(4, 1, seed=2))
    driven.attention.prepare(inputs)
    with torch.inference_mode():
        everything = decoder.forward(inputs, driven.attention)
        inputs.best_only = True
        best = decoder.forward(inputs, driven.attention)
    assert everything is not None and best is not None
    assert (best == -torch.inf).any() and everything.isfinite().all()
    assert torch.equal(best.argmax(-1), everything.argmax(-1))
