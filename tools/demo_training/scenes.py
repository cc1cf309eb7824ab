"""Scenes: one to six coloured shapes at named places, as facts (`Scene`) and as marks on an image (`lay_out`, `draw`).

One layout in ten (by a checksum of its words) is held out: `draw_scene` never returns one for training and nothing else
for evaluation, so that no evaluated layout was trained on. The same rule (`is_held_out`) divides words and charts.
"""

import itertools
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
# For each colour what designers draw it with, and what CSS and image editors call by its name.
COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((222, 32, 38), (255, 0, 0), (204, 20, 20)),
    "orange": ((248, 134, 20), (255, 165, 0), (255, 127, 14)),
    "yellow": ((244, 214, 34), (255, 255, 0), (250, 230, 60)),
    "green": ((32, 158, 68), (0, 128, 0), (0, 200, 60)),
    "blue": ((36, 84, 220), (0, 0, 255), (31, 119, 200)),
    "purple": ((140, 48, 180), (128, 0, 128), (148, 70, 200)),
    "pink": ((250, 150, 190), (255, 192, 203), (255, 105, 180)),
    "brown": ((130, 76, 32), (139, 69, 19), (150, 75, 40)),
    "gray": ((130, 130, 130), (128, 128, 128), (150, 150, 150)),
    "black": ((18, 18, 18), (0, 0, 0), (35, 35, 35)),
}
SIZES = ("small", "medium", "large")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CENTERS = (0.2, 0.5, 0.8)  # of the columns and rows of places, as shares of width and height
RADII = {"small": (0.06, 0.074), "medium": (0.1, 0.114), "large": (0.148, 0.178)}  # as shares of `unit`
MAX_TURN = {"square": 0.3, "diamond": 0.25, "heart": 0.5}  # radians; other shapes are turned at will
MIN_RADIUS = 5.5  # pixels; below it shapes cannot be told apart
NUM_TRIES = 20  # for one thing, before all are laid out anew
MIN_SHRINK = 0.88  # of crowded layouts; sizes stay apart
ALIKE_SHARE = 0.5  # of scenes have a kind that so many of their things are of: people count such
NUM_THINGS = (1, 2, 2, 3, 3, 4, 4, 5, 6)
CROWD = (6, 7, 8)  # things of a scene that is only named

HELD_OUT_SHARE = 10  # one layout in so many


def is_held_out(key: str) -> bool:
    """Whether what is described so is kept for evaluation."""
    return zlib.crc32(key.encode()) % HELD_OUT_SHARE == 0


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

    def at(self, place_idx: int) -> Thing | None:
        return next((thing for thing in self.things if thing.place_idx == place_idx), None)


def unit(width: int, height: int) -> float:
    """The length that sizes are shares of: the shorter side, or what leaves a single row or column its room."""
    return min(
        width, height, *([2.2 * height] if height < 0.6 * width else [2.2 * width] if width < 0.6 * height else [])
    )


def places_of(width: int, height: int) -> list[int]:
    """The places that an image of this shape has: all nine, or one row or column of three where it is too flat."""
    if height < 0.6 * width:
        return [3, 4, 5]
    return [1, 4, 7] if width < 0.6 * height else list(range(9))


def draw_scene(
    rng: random.Random,
    width: int = 168,
    height: int = 168,
    held_out: bool = False,
    num_things: Sequence[int] = NUM_THINGS,
) -> Scene:
    """A random layout for an image of this size, from the training share or from the held-out share."""
    places = places_of(width, height)
    sizes = [size for size in SIZES if RADII[size][0] * unit(width, height) >= MIN_RADIUS] or ["large"]
    while True:
        alike = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
        share = ALIKE_SHARE if rng.random() < ALIKE_SHARE else 0.0
        things = []
        for place in sorted(rng.sample(places, min(len(places), rng.choice(num_things)))):
            any_kind = rng.choice(tuple(COLOURS)), rng.choice(SHAPES)
            things.append(Thing(rng.choice(sizes), *(alike if rng.random() < share else any_kind), place))
        scene = Scene(tuple(things))
        if is_held_out(scene.key) == held_out:
            return scene


@dataclass(frozen=True)
class Spot:
    """Where a thing is drawn, in pixels, in which exact colour, and how far it is turned (radians)."""

    thing: Thing
    x: float
    y: float
    radius: float
    fill: tuple[int, ...]
    turn: float = 0.0


def shade(colour: str, rng: random.Random) -> tuple[int, ...]:
    """An exact colour of this name."""
    return tuple(min(255, max(0, value + rng.randint(-10, 10))) for value in rng.choice(COLOURS[colour]))


def lay_out(scene: Scene, width: int, height: int, rng: random.Random) -> list[Spot]:
    """Puts the things near the centers of their places, never touching each other or the edge."""
    for attempt in itertools.count():
        spots: list[Spot] = []
        length = unit(width, height) * max(MIN_SHRINK, 0.98**attempt)
        for thing in scene.things:
            spot = next((spot for spot in _tries(thing, width, height, length, rng) if _is_apart(spot, spots)), None)
            if spot is None:
                break
            spots.append(spot)
        else:
            break
    return spots


def _tries(thing: Thing, width: int, height: int, length: float, rng: random.Random) -> Iterator[Spot]:
    """Some spots for a thing, one of which is likely to be free where one can be."""
    for _ in range(NUM_TRIES):
        radius = rng.uniform(*RADII[thing.size]) * length
        x = (CENTERS[thing.place_idx % 3] + rng.uniform(-0.07, 0.07)) * width
        y = (CENTERS[thing.place_idx // 3] + rng.uniform(-0.07, 0.07)) * height
        x, y = min(max(x, radius + 1), width - radius - 1), min(max(y, radius + 1), height - radius - 1)
        turn = rng.uniform(-1, 1) * MAX_TURN.get(thing.shape, math.pi) * rng.choice((0, 1, 1))
        yield Spot(thing, x, y, radius, shade(thing.colour, rng), turn)


def _is_apart(spot: Spot, others: Sequence[Spot]) -> bool:
    return all(math.hypot(spot.x - other.x, spot.y - other.y) > spot.radius + other.radius + 2 for other in others)


def draw(pen: ImageDraw.ImageDraw, spots: Sequence[Spot], scale: int, rng: random.Random) -> None:
    """Draws the spots, `scale` times larger; in some pictures with dark outlines."""
    outline = (30, 30, 30) if rng.random() < 0.15 else None
    line = max(1, round(scale * 1.3))
    for spot in spots:
        x, y, radius = spot.x * scale, spot.y * scale, spot.radius * scale
        box = (x - radius * 0.95, y - radius * 0.95, x + radius * 0.95, y + radius * 0.95)
        if spot.thing.shape == "circle":
            pen.ellipse(box, spot.fill, outline, line)
        elif spot.thing.shape == "ring":
            pen.ellipse(box, outline=spot.fill, width=round(radius * rng.uniform(0.24, 0.46)))
        else:
            cos, sin = math.cos(spot.turn) * radius, math.sin(spot.turn) * radius
            outline_points = _outline(spot.thing.shape, rng)
            points = [(x + dx * cos - dy * sin, y + dx * sin + dy * cos) for dx, dy in outline_points]
            pen.polygon(points, spot.fill, outline, line)


def _outline(shape: str, rng: random.Random) -> Sequence[tuple[float, float]]:
    """Corners within about the unit circle. Not everybody draws a star or a diamond alike; squares are square."""
    if shape == "star":
        return _star(rng.uniform(0.36, 0.52))
    narrow, flat = NARROWEST.get(shape, (1.0, 1.0))
    across, down = (rng.uniform(narrow, 1.0), 1.0) if rng.random() < 0.5 else (1.0, rng.uniform(flat, 1.0))
    return [(dx * across, dy * down) for dx, dy in OUTLINES[shape]]


def _star(inner: float) -> list[tuple[float, float]]:
    tips = [(math.pi * (idx / 5 - 0.5), 1.0 if idx % 2 == 0 else inner) for idx in range(10)]
    return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in tips]


def _heart() -> list[tuple[float, float]]:
    angles = [2 * math.pi * idx / 36 for idx in range(36)]
    return [
        (
            math.sin(angle) ** 3,
            -(13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 17,
        )
        for angle in angles
    ]


NARROWEST = {"triangle": (0.8, 0.8), "diamond": (0.6, 0.65), "heart": (0.85, 0.85)}  # as shares of width and height
ARM = 0.32  # half the width of a cross's arm
OUTLINES: dict[str, Sequence[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.87, 0.6), (-0.87, 0.6)],
    "diamond": [(0, -1), (0.85, 0), (0, 1), (-0.85, 0)],
    "heart": _heart(),
    "cross": [
        *((-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM)),
        *((ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)),
    ],
}
