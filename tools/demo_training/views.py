"""Pictures as the tower takes them: patches in the processor's order, with the labels of each image token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .labels import name_weights, token_labels
from .pictures import UNIT, Picture

MERGE = 2
PATCH = UNIT // MERGE


class OnDevice:
    """A dataclass whose tensors (alone, in lists, in dicts, or in such dataclasses) move together."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{entry.name: _each(getattr(self, entry.name), change) for entry in fields(self)})

    def pin_memory(self) -> Self:  # torch's DataLoader calls this
        return self.each(Tensor.pin_memory)

    def to(self, device: torch.device) -> Self:
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    match value:
        case Tensor():
            return change(value)
        case OnDevice():
            return value.each(change)
        case list():
            return [_each(entry, change) for entry in value]
        case dict():
            return {key: _each(entry, change) for key, entry in value.items()}
    return value


@dataclass(frozen=True)
class ImageGroup(OnDevice):
    """Images of one grid of patches."""

    grid: tuple[int, int]  # patches, rows and columns
    patches: Tensor  # uint8 (images, patches, 3 * PATCH * PATCH), in the processor's order
    labels: Tensor  # int64 (images, tokens, fields)
    weights: Tensor  # float32, as the labels: what each name weighs in the loss of naming; their sum is 1
    shown: Tensor  # int64 (images, tokens, MAX_SHOWN): marks


def by_grid(groups: Sequence[ImageGroup]) -> list[list[int]]:
    """Which of the groups have the same grid."""
    idxs: dict[tuple[int, int], list[int]] = {}
    for idx, group in enumerate(groups):
        idxs.setdefault(group.grid, []).append(idx)
    return list(idxs.values())


def join(groups: Sequence[ImageGroup]) -> ImageGroup:
    """Groups of one grid as one; the sum of its weights is their number."""
    if len(groups) == 1:
        return groups[0]
    columns = ([getattr(group, name) for group in groups] for name in ("patches", "labels", "weights", "shown"))
    return ImageGroup(groups[0].grid, *(torch.cat(column) for column in columns))


def image_group(pictures: Sequence[Picture]) -> ImageGroup:
    """Pictures of one size, whose sides are multiples of UNIT."""
    width, height = pictures[0].image.size
    labels, shown = zip(*(token_labels(picture) for picture in pictures), strict=True)
    patches = np.stack([patchify(picture.image) for picture in pictures])
    return make_group((height // PATCH, width // PATCH), patches, np.stack(labels), np.stack(shown))


def make_group(grid: tuple[int, int], patches: np.ndarray, labels: np.ndarray, shown: np.ndarray) -> ImageGroup:
    arrays = (patches, labels, name_weights(labels), shown)
    return ImageGroup(grid, *(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


def patchify(image: Image.Image) -> np.ndarray:
    """RGB image (sides multiples of UNIT) -> uint8 (patches, 3 * PATCH * PATCH), in Qwen2-VL's order."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // UNIT, pixels.shape[1] // UNIT
    blocks = pixels.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * MERGE**2, -1)
