"""RGB bytes to RGB bytes: the sizes that image processors choose, Pillow resizing, tiles and patches.

Called by the model families (`plan_image` for sizes, `preprocess` for pixels) from worker threads; everything is pure.
Images are (height, width, 3) uint8 arrays. Knows nothing about models: patch sizes and limits are arguments. Sizes and
pixels equal those of transformers' PIL-backed processors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from lightvl.errors import BadRequest

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Grid = tuple[int, int]
"""(high, wide), in tiles."""

MAX_ASPECT_RATIO = 200


def resize(rgb: Pixels, width: int, height: int, resample: int) -> Pixels:
    """`resample` is Pillow's number of the filter, as preprocessor_config.json gives it. May return `rgb` itself."""
    if rgb.shape[:2] == (height, width):
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((width, height), Image.Resampling(resample)))


def shrink(rgb: Pixels, max_side: int) -> Pixels:
    """The same shape, with no side over `max_side` pixels. May return `rgb` itself."""
    height, width = rgb.shape[:2]
    scale = min(1.0, max_side / max(width, height))
    return resize(rgb, max(1, round(width * scale)), max(1, round(height * scale)), Image.Resampling.BICUBIC)


def smart_size(width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Qwen2-VL's rule: (width, height) as multiples of `factor`, about the same shape, within both pixel counts where
    one multiple a side allows it. Raises BadRequest when one side is over 200 times the other."""
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadRequest(
            f"an image of {width}x{height} pixels is too narrow: one side may be at most "
            f"{MAX_ASPECT_RATIO} times the other",
            param="messages",
        )
    # Python rounds halves to even, as the reference does
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
    elif new_width * new_height < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_width = math.ceil(width * grow / factor) * factor
        new_height = math.ceil(height * grow / factor) * factor
    return new_width, new_height


def tile_grids(max_tiles: int) -> list[Grid]:
    """All grids of at most `max_tiles` tiles, in the order that numbers mllama's aspect ratios (from 1)."""
    sides = range(1, max_tiles + 1)
    return [(high, wide) for high in sides for wide in sides if high * wide <= max_tiles]


def best_grid(width: int, height: int, grids: list[Grid], tile: int) -> Grid:
    """The grid that enlarges the image least while showing all of its pixels; when none shows all, the one that shrinks
    it least. Of equals the smallest, then the first."""
    scales = [min(high * tile / height, wide * tile / width) for high, wide in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    return min((grid for grid, scale in zip(grids, scales, strict=True) if scale == chosen), key=math.prod)


def fit_size(width: int, height: int, grid: Grid, tile: int) -> tuple[int, int]:
    """(width, height) of the image inside its grid: no larger than the grid, enlarged no further than to one tile."""
    target_width = min(max(width, tile), grid[1] * tile)
    target_height = min(max(height, tile), grid[0] * tile)
    scale_width, scale_height = target_width / width, target_height / height
    if scale_width < scale_height:
        return target_width, min(math.floor(height * scale_width) or 1, target_height)
    return min(math.floor(width * scale_height) or 1, target_width), target_height


def split_tiles(rgb: Pixels, grid: Grid, tile: int) -> Pixels:
    """Pad with black at the right and bottom to the grid's size, then cut: (tiles, tile, tile, 3), row by row."""
    high, wide = grid
    canvas = np.zeros((high * tile, wide * tile, 3), np.uint8)
    canvas[: rgb.shape[0], : rgb.shape[1]] = rgb
    cut = canvas.reshape(high, tile, wide, tile, 3).swapaxes(1, 2)
    return np.ascontiguousarray(cut).reshape(high * wide, tile, tile, 3)


def patchify(rgb: Pixels, patch: int, merge: int = 1) -> Pixels:
    """(patches, patch * patch * 3): each patch row by row, channels last, as whole runs of 3 * patch bytes are faster
    copied than the single bytes of the channels-first order that checkpoints have. Patches go row by row over squares
    of `merge` x `merge` patches, and row by row inside each square."""
    high, wide = rgb.shape[0] // (patch * merge), rgb.shape[1] // (patch * merge)
    cut = rgb.reshape(high, merge, patch, wide, merge, patch * 3).transpose(0, 3, 1, 4, 2, 5)
    return np.ascontiguousarray(cut).reshape(high * wide * merge * merge, patch * patch * 3)
