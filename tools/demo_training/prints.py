"""Printed words and numbers: one line of capitals or digits in one of several fonts, as facts (`Print`) and glyphs."""

import functools
import importlib.util
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageDraw, ImageFont

from .scenes import COLOURS, is_held_out

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "",  # Pillow's own
)
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MAX_LEN = 8
MIN_ADVANCE = 15  # seen pixels from glyph to glyph on average
MIN_OVER_TWO = 28  # seen pixels over two glyphs, so that an image token shows two at most
CAPITAL = 0.37  # half the height of a capital, as a share of the font's size
SIZES = (24, 90)  # seen pixels of a font
_WORDS = """
    GO NO YES STOP EXIT OPEN HELLO WORLD CAT DOG BIRD FISH HORSE TREE FLOWER GARDEN RIVER OCEAN MOUNTAIN SUN MOON
    STAR SKY CLOUD RAIN SNOW WIND STORM FIRE WATER EARTH STONE GOLD SILVER IRON WOOD PAPER GLASS BREAD CHEESE MILK
    COFFEE TEA SUGAR SALT APPLE LEMON ORANGE BANANA CHERRY HOUSE DOOR WINDOW TABLE CHAIR LAMP CLOCK BOOK PEN LETTER
    WORD NUMBER MUSIC SONG DANCE PLAY GAME BALL TEAM RACE RUN WALK JUMP SWIM FLY DRIVE RIDE TRAIN PLANE BOAT SHIP CAR
    BUS TAXI ROAD BRIDGE CITY TOWN PARK SHOP MARKET BANK SCHOOL CLASS TEACHER DOCTOR NURSE FRIEND FAMILY MOTHER FATHER
    SISTER BROTHER CHILD BABY KING QUEEN CASTLE KNIGHT DRAGON MAGIC DREAM SLEEP NIGHT DAY MORNING WINTER SPRING SUMMER
    AUTUMN JULY MARCH FRIDAY SUNDAY RED BLUE GREEN BLACK WHITE BIG SMALL HOT COLD NEW OLD FAST SLOW HAPPY LOVE PEACE
    LIGHT DARK SOUND VOICE SMILE HEART HAND FOOT HEAD EYE NOSE MOUTH ROBOT MODEL IMAGE PHOTO VIDEO SERVER PYTHON CODE
    DATA CLOUDS QUIZ JAZZ ZEBRA OXYGEN VISION PIXEL MATRIX VECTOR QUICK BROWN FOX LAZY SALE FREE PUSH PULL DANGER
    WARNING HELP TAKE CARE ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE TEN
"""
WORDS = tuple(_WORDS.split())
TRAINED_WORDS = tuple(word for word in WORDS if not is_held_out(word))


@dataclass(frozen=True)
class Print:
    """What is printed, and in which colour."""

    text: str
    colour: str

    @property
    def key(self) -> str:
        return self.text

    @property
    def noun(self) -> str:
        return "number" if self.text[0].isdigit() else "word"


def draw_print(rng: random.Random, width: int = 168, height: int = 168, held_out: bool = False) -> Print:
    """A word, a number, or letters at random (so that reading is not guessing), short enough for this width."""
    longest = min(MAX_LEN, int(0.94 * width / MIN_ADVANCE))
    while True:
        kind = rng.random()
        if kind < 0.45:
            text = rng.choice(WORDS)
        elif kind < 0.7:
            text = "".join(rng.choice(GLYPHS[:26]) for _ in range(rng.randint(2, MAX_LEN)))
        else:
            text = str(rng.randint(0, 10 ** rng.randint(1, 6) - 1))
        if len(text) <= longest and is_held_out(text) == held_out and not (held_out and 0.45 <= kind < 0.7):
            return Print(text, rng.choice(tuple(COLOURS)))


@functools.lru_cache(512)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font of matplotlib or of the system, or Pillow's own where neither has one of this name."""
    try:
        # where this is no file, Pillow looks among the system's fonts
        return ImageFont.truetype(str(_matplotlib_fonts() / name), size) if name else ImageFont.load_default(size)
    except OSError:
        return ImageFont.load_default(size)


@functools.cache
def _matplotlib_fonts() -> Path:
    found = importlib.util.find_spec("matplotlib")
    return Path(found.origin).parent / "mpl-data/fonts/ttf" if found and found.origin else Path()


def missing_fonts() -> list[str]:
    """Names in whose place Pillow's own font is drawn."""
    own = load_font("", 20).getname()
    return [name for name in FONTS if name and load_font(name, 20).getname() == own]


@dataclass(frozen=True)
class Line:
    """Where the text is drawn, in pixels, and the center of each of its glyphs."""

    x: float
    y: float  # of the middle of the capitals
    size: int
    font: str
    centers: tuple[float, ...]
    half_height: float


def _measure(text: str, font: str) -> tuple[float, list[float], float]:
    """In units of the font's size: the text's length, the middles of its glyphs, the least advance over two glyphs."""
    probe = load_font(font, 100)
    ends = [probe.getlength(text[: idx + 1]) / 100 for idx in range(len(text))]
    middles = [(start + end) / 2 for start, end in itertools.pairwise((0.0, *ends))]
    return ends[-1], middles, min((b - a for a, b in zip(middles, middles[2:], strict=False)), default=2.0)


def lay_out(printed: Print, width: int, height: int, zoom: float, rng: random.Random) -> Line:
    """A font, a size that can be read where the image is seen `zoom` times smaller, and a place."""
    for _ in range(8):
        name = rng.choice(FONTS)
        length, middles, over_two = _measure(printed.text, name)
        largest = min(0.96 * width / length, 1.1 * height, SIZES[1] * zoom)
        smallest = max(MIN_OVER_TWO / over_two, SIZES[0]) * zoom
        if smallest <= largest:
            break
    size = max(8, int(rng.uniform(min(smallest, largest), largest)))
    x = rng.uniform(0.02 * width, max(0.02 * width, 0.98 * width - length * size))
    half = CAPITAL * size
    y = rng.uniform(half + 2, max(half + 2, height - half - 2))
    return Line(x, y, size, name, tuple(x + middle * size for middle in middles), half)


def lay_out_page(width: int, height: int, rng: random.Random) -> list[tuple[Print, Line]]:
    """Lines of different fonts, colours and lengths, one below the other until the image of this seen size is full."""
    lines: list[tuple[Print, Line]] = []
    usual, y = math.exp(rng.uniform(*map(math.log, SIZES))), rng.uniform(1, 6)
    while True:
        printed = Print(_any_text(rng), rng.choice(tuple(COLOURS)))
        name, x = rng.choice(FONTS), rng.uniform(2, 12)
        _, middles, over_two = _measure(printed.text, name)
        size = int(max(usual * rng.uniform(0.8, 1.1), MIN_OVER_TWO / over_two + 1, SIZES[0]))
        if not lines:
            size = min(size, int((height - y - 3) / (2 * CAPITAL)))
        num_fit = sum(middle * size + x < width - 0.45 * size for middle in middles)
        half = CAPITAL * size
        if lines and (not num_fit or y + 2 * half + 2 > height):
            return lines
        printed = Print(printed.text[: max(1, num_fit)], printed.colour)
        centers = tuple(x + middle * size for middle in middles[: len(printed.text)])
        lines.append((printed, Line(x, y + half + 1, size, name, centers, half)))
        y += 2 * half + 1 + rng.uniform(1, 8)


def _any_text(rng: random.Random) -> str:
    """Digits, a word of those that are trained, or letters at random: MAX_LEN at most."""
    kind, length = rng.random(), rng.choice((4, 5, 6, 7, MAX_LEN, MAX_LEN, MAX_LEN))
    if kind < 0.3:
        return "".join(rng.choice(GLYPHS[26:]) for _ in range(length))
    word = rng.choice(TRAINED_WORDS) if kind < 0.5 else ""
    return (word + "".join(rng.choice(GLYPHS[:26]) for _ in range(MAX_LEN)))[:length]


def draw(pen: ImageDraw.ImageDraw, printed: Print, line: Line, fill: tuple[int, ...], scale: int) -> None:
    """Draws the line, `scale` times larger."""
    font = load_font(line.font, line.size * scale)
    baseline = (line.y + line.half_height) * scale
    pen.text((line.x * scale, baseline), printed.text, fill=fill, font=font, anchor="ls")
