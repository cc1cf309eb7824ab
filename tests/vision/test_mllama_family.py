"""Llama-3.2-Vision: features of real tiles and the rows that see them equal transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)
from vision_helpers import family_of, features_of, noise

from lightvl.core import OPEN_END

# one per aspect ratio of up to 4 tiles of 28 pixels, then tiny, large and odd ones
GRIDS = [(28, 28), (56, 28), (84, 28), (112, 28), (28, 56), (56, 56), (28, 84), (28, 112)]
SIZES = [*GRIDS, (1, 1), (300, 200), (57, 333), (31, 29), (1000, 40)]


def hf_features(folder: Path, model: Any, rgb: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    inputs = MllamaImageProcessorPil.from_pretrained(folder)(Image.fromarray(rgb), return_tensors="pt")
    ((num_tiles,),) = inputs.pop("num_tiles")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.inference_mode():
        states = model.model.vision_model(**inputs).last_hidden_state
        return model.model.multi_modal_projector(states)[0, 0, :num_tiles].flatten(0, 1)


@pytest.mark.parametrize("size", SIZES)
def test_features_are_hf_s(checkpoints: Any, size: tuple[int, int]) -> None:
    folder, model = checkpoints("mllama")
    rgb = noise(*size)
    torch.testing.assert_close(
        features_of(family_of(folder), rgb), hf_features(folder, model, rgb), atol=3e-5, rtol=1e-5
    )


@pytest.mark.parametrize("names", ["published", "memory"])
def test_both_name_styles_load_and_odd_shapes_fit(checkpoints: Any, names: str) -> None:
    odd = {"hidden_size": 36, "attention_heads": 3, "intermediate_size": 52, "hidden_act": "gelu_pytorch_tanh"}
    odd |= {"intermediate_layers_indices": [2, 0, 1], "vision_output_dim": 36 * 4}
    folder, model = checkpoints("mllama", names=names, image_size=42, **odd)
    rgb = noise(120, 61)
    torch.testing.assert_close(
        features_of(family_of(folder), rgb), hf_features(folder, model, rgb), atol=3e-5, rtol=1e-5
    )


def test_bf16_error_is_no_worse_than_twice_hf_s(checkpoints: Any) -> None:
    folder, model = checkpoints("mllama")
    rgb = noise(80, 30)
    exact = hf_features(folder, model, rgb)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    hf_error = (hf_features(folder, half, rgb, torch.bfloat16).float() - exact).square().mean().sqrt()
    ours = (features_of(family_of(folder, dtype=torch.bfloat16), rgb).float() - exact).square().mean().sqrt()
    assert 0 < ours <= 2 * hf_error


@given(st.lists(st.booleans(), min_size=1, max_size=24))
@settings(deadline=None)
def test_rows_that_see_an_image_are_hf_s(checkpoints: Any, is_image: list[bool]) -> None:
    family = family_of(checkpoints("mllama")[0], load=False)
    token_ids = [family.image_token_id if image else 7 for image in is_image]
    layouts = [family.plan_image(28, 28, num_images=1)] * sum(is_image)
    got = family.expand(token_ids, layouts)
    np.testing.assert_array_equal(got.token_ids, token_ids)
    assert got.positions is None and got.rope_delta == 0
    if not layouts:
        assert got.image_rows == []
        return
    sparse = get_cross_attention_token_mask(token_ids, family.image_token_id)
    dense = convert_sparse_cross_attention_mask_to_dense([sparse], [[1] * len(layouts)], 1, len(token_ids))[0, :, :, 0]
    for image_idx, (first_row, end_row) in enumerate(got.image_rows):
        sees = [first_row <= row < end_row for row in range(len(token_ids))]
        assert sees == dense[:, image_idx].astype(bool).tolist()
        # HF repeats the last row's mask for generated tokens
        assert (end_row == OPEN_END) == bool(dense[-1, image_idx])


def test_image_budget_bounds_the_tiles(checkpoints: Any) -> None:
    folder, _ = checkpoints("mllama")
    page_len = family_of(folder, load=False).cross_page_len
    assert page_len == 5
    for budget, max_tiles in ((None, 4), (20, 4), (19, 3), (10, 2), (5, 1), (1, 1)):
        family = family_of(folder, max_image_tokens=budget, load=False)
        layouts = [family.plan_image(*size, num_images=1) for size in SIZES]
        assert max(layout.num_cross_pages for layout in layouts) == max_tiles
        for layout in layouts:
            assert layout.num_tokens == 1
            assert family._vision.grids[layout.grid[0] - 1] == layout.grid[1:]  # ids stay the model's own
