"""For tests/vision: noise images, and our families built from checkpoint folders, with the CPU's encoder attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightvl.attention.cpu import encoder_attention
from lightvl.models.families import build_family
from lightvl.models.load import WeightPart, load_weights

CPU = torch.device("cpu")
OTHERS = WeightPart(
    "decoder", (r"((?!(?:model\.)?(?:visual|vision_model|multi_modal_projector)\.).+)",), {}, excused=".+"
)


def noise(width: int, height: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
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


def features_of(family: Any, rgb: np.ndarray[Any, np.dtype[np.uint8]], num_images: int = 1) -> torch.Tensor:
    layout = family.plan_image(rgb.shape[1], rgb.shape[0], num_images=num_images)
    with torch.inference_mode():
        *pauses, features = family.encode(family.preprocess(rgb, layout), layout, encoder_attention)
    assert pauses and all(pause is None for pause in pauses)
    assert len(features) == (layout.num_cross_pages * family.cross_page_len or layout.num_tokens)
    return features
