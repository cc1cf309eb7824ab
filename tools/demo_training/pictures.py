"""Pictures: facts drawn on a ground, with the marks that tell which pixels show what.

`make_picture` is the one way from facts to pixels, for training and for evaluation.
"""

import functools
import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw

from . import charts, prints, scenes
from .charts import Chart
from .others import draw_other
from .prints import GLYPHS, Line, Print
from .scenes import COLOURS, SHAPES, SIZES, Scene

KINDS = ("scene", "print", "chart", "other")
Facts = Scene | Print | Chart | None  # None: an image of no kind that the model knows
UNIT = 16  # one image token is UNIT x UNIT pixels
MIN_PIXELS, MAX_PIXELS = 144 * 144, 160 * 160  # every image is brought to about this area before it is seen
MIN_SIDE, MAX_SIDE = 56, 448
SHARES = (52, 31, 12, 5)  # percent of training pictures of each of KINDS; others are soon known, and cost most
PROPER_SHARE = 0.4  # of them are drawn at another size than the model sees, and resized
SUPERSAMPLING = 2  # drawn so much larger, then averaged: smooth edges


@dataclass(frozen=True)
class Mark:
    """Something to see: its box in pixels, and what is true of it, by the fields of `labels`."""

    left: float
    top: float
    right: float
    bottom: float
    values: dict[str, int] = field(default_factory=dict)

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(frozen=True)
class Picture:
    """An image, what it shows, and where. `marks` follow the order in which the facts are told."""

    facts: Facts
    image: Image.Image
    marks: tuple[Mark, ...]

    @property
    def kind(self) -> str:
        return kind_of(self.facts)


def kind_of(facts: Facts) -> str:
    match facts:
        case Scene():
            return "scene"
        case Print():
            return "print"
        case Chart():
            return "chart"
    return "other"


def draw_facts(kind: str, width: int, height: int, rng: random.Random, held_out: bool = False) -> Facts:
    """Facts of this kind that fit an image of this size."""
    if kind == "scene":
        return scenes.draw_scene(rng, width, height, held_out)
    if kind == "print":
        return prints.draw_print(rng, *seen_size(width, height), held_out)
    return charts.draw_chart(rng, width, height, held_out) if kind == "chart" else None


def make_picture(facts: Facts, width: int, height: int, rng: random.Random) -> Picture:
    """The facts as an RGB image of this size, on a plain, gradient or noisy ground, now and then through JPEG."""
    if facts is None:
        image: Image.Image = draw_other(width, height, rng)
        return Picture(None, through_jpeg(image, rng.randint(40, 95)) if rng.random() < 0.5 else image, ())
    scale = SUPERSAMPLING if width * height < 300 * 300 else 1
    image, is_noisy = _ground(width * scale, height * scale, rng)
    pen = ImageDraw.Draw(image)
    marks: list[Mark] = []
    if isinstance(facts, Scene):
        spots = scenes.lay_out(facts, width, height, rng)
        scenes.draw(pen, spots, scale, rng)
        for order, spot in enumerate(spots):
            values = {
                "colour": list(COLOURS).index(spot.thing.colour),
                "shape": SHAPES.index(spot.thing.shape),
                "size": SIZES.index(spot.thing.size),
                "place": spot.thing.place_idx,
                "order": order,
            }
            box = (spot.x - spot.radius, spot.y - spot.radius, spot.x + spot.radius, spot.y + spot.radius)
            marks.append(Mark(*box, values))
    elif isinstance(facts, Print):
        zoom = max(width, height) / max(seen_size(width, height))
        line = prints.lay_out(facts, width, height, zoom, rng)
        fill = scenes.shade(facts.colour, rng)
        prints.draw(pen, facts, line, fill, scale)
        marks += _glyph_marks(facts, line)
    else:
        boxes = charts.lay_out(facts, width, height, rng)
        charts.draw(pen, boxes, [scenes.shade(colour, rng) for colour in facts.colours], scale, rng)
        for order, (box, colour) in enumerate(zip(boxes, facts.colours, strict=True)):
            values = {"colour": list(COLOURS).index(colour), "order": order, "rank": facts.rank(order)}
            marks.append(Mark(*box, values))
    return Picture(facts, _finish(image, scale, is_noisy, rng), tuple(marks))


def _glyph_marks(printed: Print, line: Line) -> Iterator[Mark]:
    for order, (glyph, x) in enumerate(zip(printed.text, line.centers, strict=True)):
        values = {"colour": list(COLOURS).index(printed.colour), "glyph": GLYPHS.index(glyph), "order": order}
        yield Mark(x - 6, line.y - line.half_height, x + 6, line.y + line.half_height, values)


def make_page(width: int, height: int, rng: random.Random) -> Picture:
    """Print all over, line by line: as many letters to name as fit. `facts` tell the first line alone."""
    image, is_noisy = _ground(width * SUPERSAMPLING, height * SUPERSAMPLING, rng)
    pen = ImageDraw.Draw(image)
    lines = prints.lay_out_page(width, height, rng)
    for printed, line in lines:
        prints.draw(pen, printed, line, scenes.shade(printed.colour, rng), SUPERSAMPLING)
    marks = tuple(mark for printed, line in lines for mark in _glyph_marks(printed, line))
    return Picture(lines[0][0], _finish(image, SUPERSAMPLING, is_noisy, rng), marks)


def make_crowd(width: int, height: int, rng: random.Random) -> Picture:
    """A scene of more things than are ever asked about."""
    return make_picture(scenes.draw_scene(rng, width, height, num_things=scenes.CROWD), width, height, rng)


def _finish(image: Image.Image, scale: int, is_noisy: bool, rng: random.Random) -> Image.Image:
    """What was drawn `scale` times larger at its size, with noise where the ground has some, now and then as JPEG."""
    image = image.reduce(scale) if scale > 1 else image
    if is_noisy:
        noise = _noise(*image.size, rng) * rng.uniform(3, 14)
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return through_jpeg(image, rng.randint(45, 95)) if rng.random() < 0.2 else image


@functools.cache
def _all_noise() -> np.ndarray:
    """Drawing numbers for each picture takes longer than drawing the picture."""
    return np.random.default_rng(0).standard_normal(1 << 21, np.float32)


def _noise(width: int, height: int, rng: random.Random) -> np.ndarray:
    """(height, width, 3), normal."""
    size = width * height * 3
    start = rng.randrange((1 << 21) - size)
    return _all_noise()[start : start + size].reshape(height, width, 3)


def _ground(width: int, height: int, rng: random.Random) -> tuple[Image.Image, bool]:
    """A light ground, and whether noise shall be added to the finished picture."""
    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGB", (width, height), (255, 255, 255)), kind < 0.06
    light = rng.randint(222, 252)
    first, second = (tuple(min(255, light + rng.randint(-14, 14)) for _ in range(3)) for _ in range(2))
    if kind < 0.7:
        return Image.new("RGB", (width, height), first), kind < 0.5
    steps = Image.linear_gradient("L") if kind < 0.9 else Image.radial_gradient("L")
    mask = steps.rotate(rng.choice((0, 90, 180, 270))).resize((width, height), Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", mask.size, second), Image.new("RGB", mask.size, first), mask), kind > 0.85


def through_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """The same picture after lossy compression."""
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=quality)
    return Image.open(packed).convert("RGB")


def seen_size(width: int, height: int) -> tuple[int, int]:
    """To which size the processor of the Qwen2-VL family brings an image: sides are multiples of UNIT."""
    across, down = (max(UNIT, round(side / UNIT) * UNIT) for side in (width, height))
    if across * down > MAX_PIXELS:
        shrink = math.sqrt(width * height / MAX_PIXELS)
        across, down = (max(UNIT, math.floor(side / shrink / UNIT) * UNIT) for side in (width, height))
    elif across * down < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (width * height))
        across, down = (math.ceil(side * grow / UNIT) * UNIT for side in (width, height))
    return across, down


def resized(picture: Picture, width: int, height: int) -> Picture:
    """The same picture at another size, as the processor resizes it."""
    if picture.image.size == (width, height):
        return picture
    across, down = width / picture.image.width, height / picture.image.height
    marks = tuple(
        replace(
            mark, left=mark.left * across, right=mark.right * across, top=mark.top * down, bottom=mark.bottom * down
        )
        for mark in picture.marks
    )
    return Picture(picture.facts, picture.image.resize((width, height), Image.Resampling.BICUBIC), marks)


def pick_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of an image as people send them: any aspect ratio, sides of 56 to 448 pixels."""
    while True:
        side, aspect = math.exp(rng.uniform(math.log(MIN_SIDE), math.log(MAX_SIDE))), math.exp(rng.gauss(0, 0.45))
        width, height = round(side * math.sqrt(aspect)), round(side / math.sqrt(aspect))
        if min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE:
            return width, height


def training_picture(kind: str, width: int, height: int, rng: random.Random) -> Picture:
    """A picture of this kind from the training share, at the size that the model sees."""
    drawn_width, drawn_height = width, height
    if rng.random() < PROPER_SHARE:
        zoom = rng.choice((0.4, 0.6, 0.8, 1.2, 1.6, 2.2)) * rng.uniform(0.9, 1.1)
        drawn_width = min(MAX_SIDE, max(MIN_SIDE, round(width * zoom * rng.uniform(0.95, 1.05))))
        drawn_height = min(MAX_SIDE, max(MIN_SIDE, round(height * zoom * rng.uniform(0.95, 1.05))))
    facts = draw_facts(kind, drawn_width, drawn_height, rng)
    return resized(make_picture(facts, drawn_width, drawn_height, rng), width, height)
