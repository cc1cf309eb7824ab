"""Several images in one encode: the features that each has alone, and HF's; the work between two pauses is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vision_helpers import family_of, features_of, features_together, noise

from lightvl.attention import cpu
from lightvl.attention.cpu import encoder_attention
from lightvl.models.linear import Linear
from lightvl.models.vision import vit

KINDS = ["qwen2_vl", "qwen2_5_vl", "mllama"]
SIZES = [(300, 200), (57, 333), (1, 1), (28, 28), (641, 82), (112, 112), (112, 112), (30, 31)]


def hf_features(folder: Path, kind: str, model: Any, images: list[Any]) -> list[torch.Tensor]:
    """Of all images in one call."""
    pictures = [Image.fromarray(rgb) for rgb in images]
    with torch.inference_mode():
        if kind == "mllama":
            inputs = MllamaImageProcessorPil.from_pretrained(folder)([[p] for p in pictures], return_tensors="pt")
            num_tiles = inputs.pop("num_tiles")
            states = model.model.vision_model(**inputs).last_hidden_state
            projected = model.model.multi_modal_projector(states)
            return [projected[i, 0, :n].flatten(0, 1) for i, (n,) in enumerate(num_tiles)]
        inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        out = model.model.visual(inputs["pixel_values"], grid_thw=grids).pooler_output
        return list(torch.split(out, (grids.prod(-1) // 4).tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_images_together_are_the_same_as_alone_and_as_hf_s(checkpoints: Any, kind: str) -> None:
    folder, model = checkpoints(kind)
    family = family_of(folder)
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    together = features_together(family, images)
    for rgb, got, want in zip(images, together, hf_features(folder, kind, model, images), strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-5)
        torch.testing.assert_close(got, features_of(family, rgb), atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_any_company(checkpoints: Any, kind: str, seed: int) -> None:
    folder, model = checkpoints(kind)
    rng = np.random.default_rng(seed)
    images = [noise(*map(int, 2 ** rng.uniform(4, 8.7, 2)), seed=i) for i in range(rng.integers(2, 10))]
    together = features_together(family_of(folder), images)
    for got, want in zip(together, hf_features(folder, kind, model, images), strict=True):
        torch.testing.assert_close(got, want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_does_not_touch_the_others(checkpoints: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose rows are not finite from the first layer on."""
    family = family_of(checkpoints(kind)[0])
    images = [noise(*size) for size in ((100, 57), (57, 100), (112, 56))]
    want = features_together(family, images)
    layout = family.plan_image(57, 100, num_images=1)
    bad = family.preprocess(images[1], layout).flatten(0, -2)
    real = vit.PatchEmbedding.forward

    def broken(self: vit.PatchEmbedding, patches: torch.Tensor) -> torch.Tensor:
        rows = patches.flatten(0, -2)
        is_bad = (rows[:, None] == bad).all(-1).any(-1) & (rows.amin(-1) < rows.amax(-1))  # black ones are everyone's
        out = real(self, patches).flatten(0, -2)
        out[is_bad] = torch.nan
        return out.view(*patches.shape[:-1], -1)

    monkeypatch.setattr(vit.PatchEmbedding, "forward", broken)
    got = features_together(family, images)
    assert not got[1].isfinite().all()
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[2], want[2])


class Meter:
    """What an encode did since its last pause, in units of which a pause is due after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = self.scores = 0
        real = Linear.forward

        def forward(linear: Linear, x: torch.Tensor) -> torch.Tensor:
            self.rows += x.shape[:-1].numel()
            return real(linear, x)

        monkeypatch.setattr(Linear, "forward", forward)

    def attention(self, q: Any, k: Any, v: Any, seg_lens: list[int], kv_lens: list[int] | None = None) -> torch.Tensor:
        pairs = zip(seg_lens, seg_lens if kv_lens is None else kv_lens, strict=True)
        self.scores += q.shape[1] * sum(queries * keys for queries, keys in pairs)
        return encoder_attention(q, k, v, seg_lens, kv_lens)

    def pieces(self, encoding: Iterator[Any]) -> list[tuple[int, int]]:
        seen = []
        with torch.inference_mode():
            for _ in encoding:
                seen.append((self.rows, self.scores))
                self.rows = self.scores = 0
        return seen


@pytest.mark.parametrize("kind", KINDS)
def test_many_images_take_many_bounded_pieces(checkpoints: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = family_of(checkpoints(kind)[0])
    images = [noise(*size, seed) for seed, size in enumerate(SIZES)]
    layouts = [family.plan_image(rgb.shape[1], rgb.shape[0], num_images=1) for rgb in images]
    inputs = [(family.preprocess(rgb, layout), layout) for rgb, layout in zip(images, layouts, strict=True)]
    meter = Meter(monkeypatch)
    (num_whole, largest_whole) = _largest(meter.pieces(family.encode(inputs, meter.attention)))
    monkeypatch.setattr(vit, "ROW_CHUNK", 16)
    monkeypatch.setattr(vit, "PAUSE_ROWS", 64)
    monkeypatch.setattr(vit, "PAUSE_SCORES", 1)
    monkeypatch.setattr(cpu, "SCORE_BLOCK", 1000)
    num_small, largest_small = _largest(meter.pieces(family.encode(inputs, meter.attention)))
    assert num_small > 2 * num_whole
    assert largest_small[1] <= largest_whole[1] // 2, "one head at a time"
    # two linears over 64 rows, and one (patch embedding, projection after attention) over all
    num_rows = sum(layout.grid[-1] * layout.grid[-2] for layout in layouts) if kind != "mllama" else 8 * 4 * 8
    assert largest_small[0] <= 2 * 64 + num_rows < largest_whole[0]


def _largest(pieces: list[tuple[int, int]]) -> tuple[int, tuple[int, int]]:
    rows, scores = zip(*pieces, strict=True)
    return len(pieces), (max(rows), max(scores))
