"""Pictures as the tower takes them: patches in the processor's order, with the labels of each image token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .labels import token_labels
from .pictures import UNIT, Picture

PATCH, MERGE = 14, 2


@dataclass
class ImageGroup:
    """Images of one grid of patches."""

    grid: tuple[int, int]  # patches, rows and columns
    patches: np.ndarray  # uint8 (images, patches, 3 * PATCH * PATCH), in the processor's order
    labels: np.ndarray  # int64 (images, tokens, fields)
    shown: np.ndarray  # int64 (images, tokens, MAX_SHOWN): marks


def image_group(pictures: Sequence[Picture]) -> ImageGroup:
    """Pictures of one size, whose sides are multiples of UNIT."""
    width, height = pictures[0].image.size
    labels, shown = zip(*(token_labels(picture) for picture in pictures), strict=True)
    patches = np.stack([patchify(picture.image) for picture in pictures])
    return ImageGroup((height // PATCH, width // PATCH), patches, np.stack(labels), np.stack(shown))


def patchify(image: Image.Image) -> np.ndarray:
    """RGB image (sides multiples of UNIT) -> uint8 (patches, 3 * PATCH * PATCH), in Qwen2-VL's order."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // UNIT, pixels.shape[1] // UNIT
    blocks = pixels.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * MERGE**2, -1)
