"""For tests of towers: noise images, and families built from checkpoint folders, with the CPU's encoder attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightvl.attention.base import EncoderAttention
from lightvl.attention.cpu import encoder_attention
from lightvl.models.families import build_family
from lightvl.models.load import WeightPart, load_weights

Rgb = np.ndarray[Any, np.dtype[np.uint8]]
CPU = torch.device("cpu")
OTHERS = WeightPart(
    "decoder", (r"((?!(?:model\.)?(?:visual|vision_model|multi_modal_projector)\.).+)",), {}, excused=".+"
)


def noise(width: int, height: int, seed: int = 0) -> Rgb:
    return np.random.default_rng((seed, width, height)).integers(0, 256, (height, width, 3), np.uint8)


def family_of(
    folder: Path, *, dtype: torch.dtype = torch.float32, max_image_tokens: int | None = None, load: bool = True
) -> Any:
    """With the weights of its own parts; the decoder's are left out."""
    config = json.loads((folder / "config.json").read_text())
    family: Any = build_family(config, folder, dtype=dtype, device=CPU, max_image_tokens=max_image_tokens)
    if load:
        with torch.inference_mode():
            load_weights([*family.weight_parts(), OTHERS], folder)
    return family


def features_of(family: Any, rgb: Rgb, num_images: int = 1) -> torch.Tensor:
    return features_together(family, [rgb], num_images=num_images)[0]


def features_together(
    family: Any, images: list[Rgb], *, num_images: int = 1, attention: EncoderAttention = encoder_attention
) -> list[torch.Tensor]:
    """Of images in one encode; `num_images` is that of each one's prompt."""
    layouts = [family.plan_image(rgb.shape[1], rgb.shape[0], num_images=num_images) for rgb in images]
    done: dict[int, torch.Tensor] = {}
    num_pauses = 0
    with torch.inference_mode():
        inputs = [(family.preprocess(rgb, layout), layout) for rgb, layout in zip(images, layouts, strict=True)]
        for features in family.encode(inputs, attention):
            num_pauses += features is None
            assert not done.keys() & (features or {}).keys(), "an image is done twice"
            done |= features or {}
    assert num_pauses and done.keys() == set(range(len(images)))
    for image_idx, layout in enumerate(layouts):
        assert len(done[image_idx]) == (layout.num_cross_pages * family.cross_page_len or layout.num_tokens)
    return [done[image_idx] for image_idx in range(len(images))]
