"""Scenes: one to four coloured shapes on a 2x2 grid, as facts (`Scene`) and as pixels (`render`).

A scene is a pure function of its random generator. One layout in ten (by a checksum of its words) is held out:
`draw_scene` never returns one for training and nothing else for evaluation, so that no evaluated layout was trained on.
"""

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLOURS = {
    "red": (222, 32, 38),
    "orange": (248, 134, 20),
    "yellow": (244, 214, 34),
    "green": (32, 158, 68),
    "blue": (36, 84, 220),
    "purple": (140, 48, 180),
    "gray": (130, 130, 130),
    "black": (18, 18, 18),
}
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")

HELD_OUT_SHARE = 10  # one layout in so many
SUPERSAMPLING = 2  # drawn so much larger, then averaged: smooth edges


@dataclass(frozen=True)
class Thing:
    """One shape and the index of its place in `PLACES`."""

    size: str
    colour: str
    shape: str
    place_idx: int

    @property
    def words(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.place_idx]


@dataclass(frozen=True)
class Scene:
    """The things of one picture, in reading order."""

    things: tuple[Thing, ...]

    @property
    def key(self) -> str:
        return "; ".join(f"{thing.words} {thing.place}" for thing in self.things)

    @property
    def is_held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % HELD_OUT_SHARE == 0

    def at(self, place_idx: int) -> Thing | None:
        return next((thing for thing in self.things if thing.place_idx == place_idx), None)


def draw_scene(rng: random.Random, held_out: bool = False, max_things: int = 4) -> Scene:
    """A random layout from the training share, or from the held-out share."""
    while True:
        places = sorted(rng.sample(range(4), min(max_things, rng.choice((1, 2, 2, 3, 3, 4, 4)))))
        scene = Scene(
            tuple(Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES), place) for place in places)
        )
        if scene.is_held_out == held_out:
            return scene


@dataclass(frozen=True)
class Spot:
    """Where a thing is drawn, in pixels, and in which exact colour."""

    thing: Thing
    x: float
    y: float
    radius: float
    fill: tuple[int, ...]


def lay_out(scene: Scene, width: int, height: int, rng: random.Random) -> list[Spot]:
    """Places the things at random within their cells of an image of this size, each a little off its plain colour."""
    cell_width, cell_height = width / 2, height / 2
    cell = min(cell_width, cell_height)
    spots = []
    for thing in scene.things:
        radius = cell * (rng.uniform(0.36, 0.42) if thing.size == "large" else rng.uniform(0.19, 0.23))
        column, row = thing.place_idx % 2, thing.place_idx // 2
        slack_x, slack_y = (cell_width / 2 - radius) * 0.8, (cell_height / 2 - radius) * 0.8
        x = (column + 0.5) * cell_width + rng.uniform(-slack_x, slack_x)
        y = (row + 0.5) * cell_height + rng.uniform(-slack_y, slack_y)
        fill = tuple(min(255, max(0, value + rng.randint(-12, 12))) for value in COLOURS[thing.colour])
        spots.append(Spot(thing, x, y, radius, fill))
    return spots


def draw(spots: list[Spot], width: int, height: int, rng: random.Random) -> Image.Image:
    """The spots on a light ground, as an RGB image."""
    scale = SUPERSAMPLING if width * height < 400 * 400 else 1
    light = rng.randint(232, 255)
    tint = tuple(min(255, max(225, light + rng.randint(-6, 6))) for _ in range(3))
    ground = tint if rng.random() < 0.6 else (255, 255, 255)
    image = Image.new("RGB", (width * scale, height * scale), ground)
    pen = ImageDraw.Draw(image)
    for spot in spots:
        _draw_shape(pen, spot.thing.shape, spot.x * scale, spot.y * scale, spot.radius * scale, spot.fill)
    return image.reduce(scale) if scale > 1 else image


def render(scene: Scene, width: int, height: int, rng: random.Random) -> Image.Image:
    """The scene as an RGB image of this size."""
    return draw(lay_out(scene, width, height, rng), width, height, rng)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, fill: tuple[int, ...]) -> None:
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    elif shape == "cross":
        arm = radius * 0.34
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        pen.polygon([(x + radius * dx, y + radius * dy) for dx, dy in _OUTLINES[shape]], fill=fill)


def _star() -> list[tuple[float, float]]:
    tips = [(math.pi * (idx / 5 - 0.5), 1.0 if idx % 2 == 0 else 0.42) for idx in range(10)]
    return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in tips]


_OUTLINES: dict[str, Sequence[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "star": _star(),
}
