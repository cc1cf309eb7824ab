"""What each image token shows, as class numbers: the truth that `sight` teaches."""

from collections.abc import Sequence

import numpy as np

from .scenes import COLOURS, PLACES, SHAPES, SIZES, Spot

UNIT = 28  # one image token is UNIT x UNIT pixels
FIELDS = (len(COLOURS) + 1, len(SHAPES), len(SIZES), len(PLACES))  # colour (or the ground), shape, size, place
IGNORED = -100


def token_labels(spots: Sequence[Spot], width: int, height: int) -> np.ndarray:
    """(tokens, fields): what each image token shows; the ground is a colour of its own, edges of things are ignored."""
    labels = np.full((height // UNIT, width // UNIT, len(FIELDS)), IGNORED, np.int64)
    y, x = np.meshgrid(np.arange(height // UNIT) + 0.5, np.arange(width // UNIT) + 0.5, indexing="ij")
    away = np.stack([np.maximum(abs(x * UNIT - spot.x), abs(y * UNIT - spot.y)) - spot.radius for spot in spots])
    labels[(away > UNIT / 2).all(0), 0] = len(COLOURS)
    for spot in spots:
        thing = spot.thing
        shown = np.hypot(x * UNIT - spot.x, y * UNIT - spot.y) < spot.radius * 0.85
        shown[int(spot.y // UNIT), int(spot.x // UNIT)] = True
        labels[shown] = (
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            SIZES.index(thing.size),
            thing.place_idx,
        )
    return labels.reshape(-1, len(FIELDS))
