"""Sizes and bytes equal those of transformers' PIL-backed processors, on noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.mllama import image_processing_pil_mllama as hf_mllama
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf_qwen
from vision_helpers import noise

from lightvl.errors import BadRequest
from lightvl.images.transforms import best_grid, fit_size, patchify, resize, shrink, smart_size, split_tiles, tile_grids

SIZES = [(300, 200), (57, 333), (28, 28), (1, 1), (3, 2), (1000, 40), (41, 999), (640, 481), (112, 56)]
LARGE = [(1923, 1081), (4000, 3000), (777, 2345)]
sides = st.integers(1, 5000)


@pytest.mark.parametrize(
    "size, shrunk", [((512, 300), (512, 300)), ((513, 300), (512, 299)), ((40, 1024), (20, 512)), ((4000, 1), (512, 1))]
)
def test_shrinking_keeps_the_shape_and_what_is_small(size: tuple[int, int], shrunk: tuple[int, int]) -> None:
    rgb = noise(*size, 3)
    assert shrink(rgb, 512).shape == (*shrunk[::-1], 3)
    assert (shrink(rgb, 512) is rgb) == (size == shrunk)


@given(sides, sides, st.sampled_from([56 * 56, 28 * 28]), st.sampled_from([28 * 28 * 16, 28 * 28 * 1280]))
@example(14, 2800, 56 * 56, 28 * 28 * 1280)  # exactly 200 times
@example(42, 70, 28 * 28, 28 * 28 * 16)  # halves, rounded to even
def test_smart_size_is_hf_s(width: int, height: int, min_pixels: int, max_pixels: int) -> None:
    limits = {"factor": 28, "min_pixels": min_pixels, "max_pixels": max_pixels}
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(BadRequest, match="too narrow"):
            smart_size(width, height, **limits)
        return
    high, wide = hf_qwen.smart_resize(height, width, **limits)
    assert smart_size(width, height, **limits) == (wide, high)


@given(sides, sides, st.sampled_from([28, 224, 560]), st.integers(1, 6))
@example(28, 28, 28, 4)
@example(56, 57, 28, 4)
@example(1, 5000, 560, 4)
def test_grid_and_fit_are_hf_s(width: int, height: int, tile: int, max_tiles: int) -> None:
    assert tile_grids(max_tiles) == hf_mllama.get_all_supported_aspect_ratios(max_tiles)
    canvas = hf_mllama.get_optimal_tiled_canvas(height, width, max_tiles, tile)
    grid = best_grid(width, height, tile_grids(max_tiles), tile)
    assert (grid[0] * tile, grid[1] * tile) == canvas
    high, wide = hf_mllama.get_image_size_fit_to_canvas(height, width, *canvas, tile)
    assert fit_size(width, height, grid, tile) == (wide, high)


@pytest.mark.parametrize("size", [*SIZES, *(pytest.param(size, marks=pytest.mark.full) for size in LARGE)])
def test_qwen_bytes_are_hf_s(size: tuple[int, int]) -> None:
    rgb = noise(*size)
    processor = hf_qwen.Qwen2VLImageProcessorPil(do_rescale=False, do_normalize=False)
    want = processor(Image.fromarray(rgb), return_tensors="np")
    _, high, wide = want["image_grid_thw"][0].tolist()
    width, height = smart_size(*size, factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    assert (width, height) == (wide * 14, high * 14)
    got = patchify(resize(rgb, width, height, Image.Resampling.BICUBIC), 14, 2)
    frames = want["pixel_values"].reshape(-1, 3, 2, 14, 14)
    for frame in (0, 1):
        np.testing.assert_array_equal(got.reshape(-1, 14, 14, 3), frames[:, :, frame].transpose(0, 2, 3, 1))


@pytest.mark.parametrize("size", [*SIZES, *(pytest.param(size, marks=pytest.mark.full) for size in LARGE)])
@pytest.mark.parametrize("tile", [28, 560])
def test_mllama_bytes_are_hf_s(size: tuple[int, int], tile: int) -> None:
    rgb = noise(*size)
    processor = hf_mllama.MllamaImageProcessorPil(
        do_rescale=False, do_normalize=False, size={"height": tile, "width": tile}
    )
    want = processor(Image.fromarray(rgb), return_tensors="np")
    grid = best_grid(*size, tile_grids(4), tile)
    assert want["aspect_ratio_ids"].item() == tile_grids(4).index(grid) + 1
    got = split_tiles(resize(rgb, *fit_size(*size, grid, tile), Image.Resampling.BILINEAR), grid, tile)
    assert len(got) == math.prod(grid) == want["num_tiles"][0][0]
    np.testing.assert_array_equal(got, want["pixel_values"][0, 0, : len(got)].transpose(0, 2, 3, 1))


def test_patches_of_stacked_tiles_stay_apart() -> None:
    tiles = split_tiles(noise(56, 28), (1, 2), 28)
    stacked = patchify(tiles.reshape(-1, 28, 3), 14).reshape(2, 4, -1)
    for tile, patches in zip(tiles, stacked, strict=True):
        np.testing.assert_array_equal(patches, patchify(tile, 14))
