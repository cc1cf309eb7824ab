"""Bar charts: two to five bars of different colours and clearly different heights, as facts (`Chart`) and boxes."""

import random
from dataclasses import dataclass

from PIL import ImageDraw

from .scenes import COLOURS, is_held_out

HEIGHTS = (1, 2, 3, 4, 5, 6)  # no two bars of a chart are equally high


@dataclass(frozen=True)
class Chart:
    """The bars' colours and heights, from left to right."""

    colours: tuple[str, ...]
    heights: tuple[int, ...]

    @property
    def key(self) -> str:
        return "; ".join(f"{colour} {height}" for colour, height in zip(self.colours, self.heights, strict=True))

    @property
    def tallest(self) -> int:
        return self.heights.index(max(self.heights))

    @property
    def shortest(self) -> int:
        return self.heights.index(min(self.heights))

    def rank(self, idx: int) -> int:
        """How many bars are taller."""
        return sum(height > self.heights[idx] for height in self.heights)


def draw_chart(rng: random.Random, width: int = 168, height: int = 168, held_out: bool = False) -> Chart:
    """A random chart for an image of this size."""
    most = max(2, min(5, width // 28))
    while True:
        num_bars = rng.randint(2, most)
        chart = Chart(tuple(rng.sample(tuple(COLOURS), num_bars)), tuple(rng.sample(HEIGHTS, num_bars)))
        if is_held_out(chart.key) == held_out:
            return chart


def lay_out(chart: Chart, width: int, height: int, rng: random.Random) -> list[tuple[float, float, float, float]]:
    """A box (left, top, right, bottom) for each bar, all on one base line."""
    left, right = rng.uniform(0.05, 0.14) * width, rng.uniform(0.88, 0.97) * width
    base, top = rng.uniform(0.88, 0.96) * height, rng.uniform(0.05, 0.12) * height
    slot, share = (right - left) / len(chart.colours), rng.uniform(0.6, 0.85)
    step = (base - top) / (max(chart.heights) if rng.random() < 0.7 else max(HEIGHTS))
    boxes = []
    for idx, bar_height in enumerate(chart.heights):
        start = left + slot * (idx + (1 - share) / 2)
        boxes.append((start, base - step * bar_height, start + slot * share, base))
    return boxes


def draw(
    pen: ImageDraw.ImageDraw,
    boxes: list[tuple[float, float, float, float]],
    fills: list[tuple[int, ...]],
    scale: int,
    rng: random.Random,
) -> None:
    """Draws the bars, `scale` times larger, most often with axes and now and then with grid lines."""
    base, left = boxes[0][3] * scale, (boxes[0][0] - 4) * scale
    right, top = boxes[-1][2] * scale, min(box[1] for box in boxes) * scale
    axis = (60, 60, 60)
    if rng.random() < 0.3:
        for idx in range(1, 5):
            y = base + (top - base) * idx / 4
            pen.line((left, y, right, y), (200, 200, 200), scale)
    for box, fill in zip(boxes, fills, strict=True):
        pen.rectangle(tuple(round(side * scale) for side in box), fill)
    if rng.random() < 0.75:
        pen.line((left, base, right, base), axis, scale)
        pen.line((left, top, left, base), axis, scale)
