"""Questions by hand, about pictures as an image editor draws them: its palette, soft shadows, tinted grounds.

Only for evaluation. No drawing is shared with the pictures of training, and answers are written down, not made.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from .cases import Case
from .dialogues import ABILITY, GREETING
from .questions import DECLINE
from .scenes import SHAPES

SCALE = 4  # drawn so many times larger: edges are smooth
# An editor's swatches
SWATCHES = {
    "red": "#e53935", "orange": "#fb8c00", "yellow": "#fdd835", "green": "#43a047", "blue": "#1e60e5",
    "purple": "#8e24aa", "pink": "#f48fb1", "brown": "#795030", "gray": "#8a8a8a", "black": "#1c1c1c",
}  # fmt: skip
CORNERS = {
    "top left": (0.21, 0.21),
    "top right": (0.79, 0.21),
    "bottom left": (0.21, 0.79),
    "bottom right": (0.79, 0.79),
}

Mark = tuple[str, str, float, float, float]  # shape, colour, center (shares of width and height), radius in pixels
Pen = ImageDraw.ImageDraw


def polygon(num_corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star with that inner radius, the first one at the top."""
    num = num_corners if inner == 1 else 2 * num_corners
    angles = [math.tau * idx / num - math.pi / 2 for idx in range(num)]
    lengths = [1 if idx % 2 == 0 else inner for idx in range(num)]
    return [(length * math.cos(angle), length * math.sin(angle)) for length, angle in zip(lengths, angles, strict=True)]


POLYGONS = {
    "triangle": polygon(3),
    "diamond": polygon(4),
    "star": polygon(5, 0.42),
    "heart": [(0, -0.4), (0.9, -0.02), (0, 0.98), (-0.9, -0.02)],  # below its two circles
}


def draw_shape(pen: Pen, shape: str, x: float, y: float, radius: float, fill: str) -> None:
    def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
        return (x + left * radius, y + top * radius, x + right * radius, y + bottom * radius)

    match shape:
        case "circle":
            pen.ellipse(box(-1, -1, 1, 1), fill)
        case "ring":
            pen.ellipse(box(-1, -1, 1, 1), None, fill, round(0.32 * radius))
        case "square":
            pen.rounded_rectangle(box(-0.85, -0.85, 0.85, 0.85), 0.12 * radius, fill)
        case "cross":
            pen.rectangle(box(-0.3, -0.95, 0.3, 0.95), fill)
            pen.rectangle(box(-0.95, -0.3, 0.95, 0.3), fill)
        case "heart":
            pen.ellipse(box(-0.98, -0.85, 0.05, 0.18), fill)
            pen.ellipse(box(-0.05, -0.85, 0.98, 0.18), fill)
    if shape in POLYGONS:
        pen.polygon([(x + dx * radius, y + dy * radius) for dx, dy in POLYGONS[shape]], fill)


def sketch(width: int, height: int, marks: Sequence[Mark], ground: str = "white", shadow: bool = False) -> Image.Image:
    """The marks on a ground of one colour, each with a soft shadow or none."""

    def draw(pen: Pen) -> None:
        for shape, colour, x, y, radius in marks:
            draw_shape(pen, shape, x * width * SCALE, y * height * SCALE, radius * SCALE, SWATCHES[colour])

    return rendered(width, height, draw, ground, shadow)


def rendered(
    width: int, height: int, draw: Callable[[Pen], None], ground: str = "white", shadow: bool = False
) -> Image.Image:
    image = Image.new("RGB", (width * SCALE, height * SCALE), ground)
    layer = Image.new("RGBA", image.size)
    draw(ImageDraw.Draw(layer))
    if shadow:
        dark = Image.new("RGBA", image.size, (0, 0, 0, 255))
        soft = layer.getchannel("A").point(lambda value: value * 0.35).filter(ImageFilter.GaussianBlur(2 * SCALE))
        image.paste(dark, (SCALE, 2 * SCALE), soft)
    image.paste(layer, (0, 0), layer)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def label(text: str, colour: str, size: int, width: int = 220, height: int = 120, ground: str = "white") -> Image.Image:
    """A line of text in the middle, as on a sign."""

    def draw(pen: Pen) -> None:
        font = ImageFont.load_default(size * SCALE)
        pen.text((width * SCALE / 2, height * SCALE / 2), text, SWATCHES[colour], font, anchor="mm")

    return rendered(width, height, draw, ground)


def bars(colours: Sequence[str], heights: Sequence[float], width: int = 300, height: int = 220) -> Image.Image:
    """A bar chart as a spreadsheet draws it: lines across, bars with rounded tops, a base line."""

    def draw(pen: Pen) -> None:
        base, step = (height - 18) * SCALE, (width - 40) * SCALE / len(colours)
        for line in range(1, 5):
            y = base - line * (height - 40) * SCALE / 4
            pen.line((20 * SCALE, y, (width - 20) * SCALE, y), "#dddddd", SCALE)
        for idx, (colour, share) in enumerate(zip(colours, heights, strict=True)):
            left, top = 20 * SCALE + (idx + 0.18) * step, base - share * (height - 40) * SCALE
            box = (left, top, left + 0.64 * step, base)
            pen.rounded_rectangle(box, 3 * SCALE, SWATCHES[colour], corners=(True, True, False, False))
        pen.line((20 * SCALE, base, (width - 20) * SCALE, base), "#555555", 2 * SCALE)

    return rendered(width, height, draw)


def questions_by_hand() -> list[Case]:
    """Twenty-one questions, of nearly every kind, some without an image."""
    icons = [
        ("star", "yellow", 0.5, 0.2, 26),
        ("triangle", "green", 0.22, 0.78, 26),
        ("heart", "purple", 0.79, 0.79, 26),
    ]
    gems = [("diamond", "orange", side, side, 31) for side in (0.2, 0.5, 0.8)] + [("ring", "black", 0.8, 0.2, 50)]
    pair = [("circle", "red", 0.2, 0.5, 24), ("square", "blue", 0.8, 0.5, 24)]
    icons, gems, pair = sketch(240, 240, icons, "#eef3f8", shadow=True), sketch(300, 300, gems), sketch(320, 220, pair)
    sign, price = label("MENU", "black", 44, ground="#fff7e0"), label("2048", "red", 48, 200, 100)
    sales = bars(("red", "green", "blue", "orange"), (0.45, 0.95, 0.7, 0.25))
    cross = sketch(200, 200, [("cross", "pink", 0.5, 0.5, 22)], "#f3f3f3", shadow=True)
    asked = (
        ((pair, "What colour is the circle?"), "The circle is red."),
        ((pair, "Where is the square?"), "The square is at the right."),
        ((pair, "How many shapes are there?"), "Number of shapes: left, right, so 2."),
        ((pair, "Is the circle left of the square?"), "The circle is at the left, the square at the right: yes."),
        ((icons, "What is at the bottom left?"), "A medium green triangle."),
        ((icons, "Which colour is the heart?"), "The heart is purple."),
        ((icons, "Is there a diamond?"), "A diamond: no."),
        ((icons, "What shape is yellow?"), "The shape that is yellow is a star."),
        ((gems, "How many diamonds do you see?"), "Number of diamonds: top left, center, bottom right, so 3."),
        ((gems, "What size is the ring?"), "The ring is large."),
        ((sign, "What does it say?"), 'It says "MENU".'),
        ((price, "Read the text."), 'It says "2048".'),
        ((price, "What color is the text?"), "The text is red."),
        ((sales, "Which bar is the tallest?"), "The tallest bar is green."),
        ((sales, "How many bars are there?"), "Number of bars: red, green, blue, orange, so 4."),
        ((sales, "What colour is the second bar?"), "The second bar is green."),
        ((cross, icons, "Which image has a heart?"), "A heart is in the second image."),
        ((cross, pair, "Describe the first image."), "A medium pink cross at the center."),
        (("Hello!",), GREETING),
        (("What can you do?",), ABILITY),
        (("Who wrote Hamlet?",), DECLINE),
    )
    return [Case("by_hand", (("user", parts),), answer) for parts, answer in asked]


def second_turns() -> list[Case]:
    """One thing in a corner: its place, after its colour was told. Every shape and colour, since a model may repeat its
    last answer for a few of them only."""
    cases = []
    for shape, colour, corner in product(SHAPES, SWATCHES, CORNERS):
        image = sketch(160, 160, [(shape, colour, *CORNERS[corner], 18)])
        asked, told = f"What colour is the {shape}?", f"The {shape} is {colour}."
        messages = (("user", (image, asked)), ("assistant", (told,)), ("user", (f"Where is the {shape}?",)))
        cases.append(Case("turn_by_hand", messages, f"The {shape} is at the {corner}."))
    return cases
