"""Where the pixels and features of a tiled LLaVA image go: which grid of tiles, what of it is padding, how many rows.

Pure functions, called by families/llava.py. The rules and their roundings are transformers' (LLaVA-NeXT, OneVision).
Sizes in pixels are (width, height); grids and everything in patches are (high, wide).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from lightvl.images.transforms import Grid, Pixels, resize

MAX_WIDE, MAX_TALL = 1 << 16, 1 << 13
"""Longest wide and tall image that is padded to a square, in pixels; longer ones are scaled down to it first."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What of a grid's features is shown: `skip` patches are left out at both ends of a side, the rest is scaled to
    `size`."""

    skip: Grid
    size: Grid


def best_grid(width: int, height: int, grids: Sequence[Grid], side: int) -> Grid | None:
    """The grid that keeps most of the image's pixels, then wastes least, then comes first. None: the image is so narrow
    that nothing of it would be left in any."""
    chosen, best = None, (0, 0)
    for high, wide in grids:
        scale = min(wide * side / width, high * side / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        rank = (kept, kept - high * wide * side * side)
        if kept > 0 and (chosen is None or rank > best):
            chosen, best = (high, wide), rank
    return chosen


def fit_in_grid(width: int, height: int, grid: Grid, side: int) -> tuple[int, int]:
    """(width, height) of the image resized to touch the grid's sides."""
    full_width, full_height = grid[1] * side, grid[0] * side
    scale_width, scale_height = full_width / width, full_height / height
    if scale_width < scale_height:
        return full_width, min(math.ceil(height * scale_width), full_height)
    return min(math.ceil(width * scale_height), full_width), full_height


def shown_part(width: int, height: int, grid: Grid, patches: int, max_tiles: int) -> Shown:
    """`patches`: along a tile's side. `max_tiles` 0: never scaled down."""
    high, wide = grid[0] * patches, grid[1] * patches
    skip_high = skip_wide = 0
    if width / height > wide / high:
        skip_high = (high - int(round(height * (wide / width), 7))) // 2
    else:
        skip_wide = (wide - int(round(width * (high / height), 7))) // 2
    high, wide = high - 2 * skip_high, wide - 2 * skip_wide
    if max_tiles:
        ratio = math.sqrt(high * wide / (max_tiles * patches**2))
        if ratio > 1.1:
            return Shown((skip_high, skip_wide), (int(high // ratio), int(wide // ratio)))
    return Shown((skip_high, skip_wide), (high, wide))


def cut_tiles(rgb: Pixels, high: int, wide: int, side: int) -> Pixels:
    """The image in the middle of black, cut: (tiles, side, side, 3), row by row."""
    height, width = rgb.shape[:2]
    canvas = np.zeros((high * side, wide * side, 3), np.uint8)
    top, left = (high * side - height) // 2, (wide * side - width) // 2
    canvas[top : top + height, left : left + width] = rgb
    return canvas.reshape(high, side, wide, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def join_tiles(tiles: torch.Tensor, grid: Grid, patches: int) -> torch.Tensor:
    """(tiles, patches * patches, size) to the whole picture's (high, wide, size)."""
    high, wide = grid
    picture = tiles.view(high, wide, patches, patches, -1).transpose(1, 2)
    return picture.reshape(high * patches, wide * patches, -1)


def show(picture: torch.Tensor, shown: Shown) -> torch.Tensor:
    """(high, wide, size) to (*shown.size, size)."""
    high, wide = picture.shape[:2]
    (skip_high, skip_wide) = shown.skip
    part = picture[skip_high : high - skip_high, skip_wide : wide - skip_wide]
    if part.shape[:2] == shown.size:
        return part
    scaled = F.interpolate(part.permute(2, 0, 1)[None].float(), list(shown.size), mode="bilinear")
    return scaled[0].permute(1, 2, 0).to(part.dtype)


def padded_view(rgb: Pixels, side: int, background: tuple[int, int, int], resample: int) -> Pixels:
    """The image in the middle of a square of its longer side, resized to (side, side, 3)."""
    height, width = rgb.shape[:2]
    is_wide = width > height
    scale = (MAX_WIDE if is_wide else MAX_TALL) / max(width, height)
    if scale < 1:  # a long narrow image would fill the memory with padding
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
        rgb = resize(rgb, width, height, resample)
    if is_wide:  # Pillow resizes along the rows first, and a row of padding stays what it is: add it afterwards
        rgb = resize(rgb, side, height, resample)
    square = np.empty((max(width, height), side if is_wide else height, 3), np.uint8)
    square[:] = background
    top, left = (square.shape[0] - rgb.shape[0]) // 2, (square.shape[1] - rgb.shape[1]) // 2
    square[top : top + rgb.shape[0], left : left + rgb.shape[1]] = rgb
    return resize(square, side, side, resample)
