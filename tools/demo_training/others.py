"""Images of none of the kinds that the model is made for: what it must decline. No photograph is used.

Photographs have structure at every scale, shading and grain. So have these: clouds of noise, leaves that cover each
other, blurred patches, textures, blobs before a background, pages of lines; and mixtures of them, lit unevenly.
"""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def draw_other(width: int, height: int, rng: random.Random) -> Image.Image:
    """An RGB image of this size."""
    noise = np.random.default_rng(rng.getrandbits(64))
    picture = _part(width, height, rng, noise)
    if rng.random() < 0.45:  # two things in one picture, divided or blended
        other, weight = _part(width, height, rng, noise), clouds(width, height, rng, noise)[..., :1]
        sharp = rng.choice((1.5, 8.0, 40.0))
        share = 1 / (1 + np.exp(-(sharp * (weight - np.median(weight)) * 4).clip(-30, 30)))
        picture = picture * share + other * (1 - share)
    if rng.random() < 0.4:  # light from somewhere
        picture = picture * (0.35 + clouds(width, height, rng, noise)[..., :1])
    if rng.random() < 0.2:
        picture = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    gain, lift = rng.uniform(0.6, 1.3), rng.uniform(-0.15, 0.2)
    picture = (picture - 0.5) * gain + 0.5 + lift
    if rng.random() < 0.5:
        picture = picture + noise.standard_normal(picture.shape, np.float32) * rng.uniform(0.01, 0.06)
    return Image.fromarray((np.clip(picture, 0, 1) * 255).astype(np.uint8))


def _part(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    make = rng.choice((clouds, clouds, leaves, leaves, patches, texture, blobs, blobs, blobs, page))
    return make(width, height, rng, noise)


def _palette(field: np.ndarray, rng: random.Random) -> np.ndarray:
    """(height, width) in 0..1 -> RGB through three to five colours."""
    num = rng.randint(2, 5)
    dull = rng.random()
    stops = [rng.random() for _ in range(num)]
    colours = np.array([[stop + (rng.random() - 0.5) * dull for _ in range(3)] for stop in stops], np.float32)
    at = np.linspace(0, 1, num)
    return np.stack([np.interp(field, at, colours[:, channel]) for channel in range(3)], -1).astype(np.float32)


def _octaves(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Noise at all scales, in 0..1, (height, width)."""
    fade, size, total = rng.uniform(0.4, 0.85), rng.choice((2, 3, 4, 6)), np.zeros((height, width), np.float32)
    weight = 1.0
    while size < max(width, height):
        across, down = (max(1, round(size * side / max(width, height))) for side in (width, height))
        grid = Image.fromarray(noise.random((down + 1, across + 1), np.float32))
        total += weight * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        weight, size = weight * fade, size * 2
    low, high = float(total.min()), float(total.max())
    return (total - low) / (high - low + 1e-6)


def clouds(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    return _palette(_octaves(width, height, rng, noise), rng)


def patches(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Blurred patches of colour."""
    grid = noise.integers(0, 256, (rng.randint(2, 7), rng.randint(2, 7), 3), np.uint8)
    method = rng.choice((Image.Resampling.BICUBIC, Image.Resampling.BILINEAR))
    return np.asarray(Image.fromarray(grid).resize((width, height), method), np.float32) / 255


def texture(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Stripes or checks, bent by noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    bend = _octaves(width, height, rng, noise) * rng.uniform(0, 6)
    waves = np.sin(x * rng.uniform(0.02, 0.9) + y * rng.uniform(-0.6, 0.6) + bend)
    if rng.random() < 0.5:
        waves = waves * np.sin(y * rng.uniform(0.05, 0.9) + bend)
    return _palette(waves * 0.5 + 0.5, rng)


def leaves(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Discs, boxes and polygons of all sizes that cover each other and the ground."""
    ground = Image.fromarray((clouds(width, height, rng, noise).clip(0, 1) * 255).astype(np.uint8))
    pen, base = ImageDraw.Draw(ground), [rng.randint(0, 255) for _ in range(3)]
    spread, form = rng.choice((40, 120, 255)), rng.random()
    for idx in range(rng.choice((40, 80, 160))):
        radius = max(2.0, 0.45 * max(width, height) * rng.random() ** 2.5 * (1 - idx / 250))
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        fill = tuple(min(255, max(0, value + rng.randint(-spread, spread))) for value in base)
        if form < 0.35:
            down = radius * rng.uniform(0.3, 1)
            pen.ellipse((x - radius, y - down, x + radius, y + down), fill)
        elif form < 0.6:
            pen.rectangle((x - radius, y - radius * rng.random(), x + radius, y + radius * rng.random()), fill)
        else:
            pen.polygon([(x + rng.uniform(-1, 1) * radius, y + rng.uniform(-1, 1) * radius) for _ in range(5)], fill)
    if rng.random() < 0.7:
        ground = ground.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    picture = np.asarray(ground, np.float32) / 255
    return picture * (0.6 + 0.8 * _octaves(width, height, rng, noise)[..., None]) if rng.random() < 0.6 else picture


def blobs(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """A few large shaded things with soft or rough edges before a background, as in a portrait or a still life."""
    picture = clouds(width, height, rng, noise) if rng.random() < 0.6 else patches(width, height, rng, noise)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for _ in range(rng.randint(1, 5)):
        across, down = rng.uniform(0.08, 0.5) * width, rng.uniform(0.08, 0.5) * height
        dx, dy = (x - rng.uniform(0, width)) / across, (y - rng.uniform(0, height)) / down
        rough = _octaves(width, height, rng, noise)
        inside = 1 - dx * dx - dy * dy + (rough - 0.5) * rng.choice((0.2, 1.0, 2.5))
        edge = (1 / (1 + np.exp(-(inside * rng.choice((3.0, 10.0, 30.0))).clip(-30, 30))))[..., None]
        skin = _palette(rough if rng.random() < 0.5 else np.clip(0.5 + 0.3 * dx - 0.3 * dy, 0, 1), rng)
        picture = picture * (1 - edge) + skin * edge
    return picture.astype(np.float32)


def page(width: int, height: int, rng: random.Random, noise: np.random.Generator) -> np.ndarray:
    """Many thin lines: print too small to read, scribbles, wires."""
    light = rng.random() < 0.6
    sheet = Image.new("L", (width, height), rng.randint(190, 255) if light else rng.randint(0, 90))
    pen, ink = ImageDraw.Draw(sheet), rng.randint(0, 90) if light else rng.randint(150, 255)
    if rng.random() < 0.5:
        step, y = rng.randint(5, 11), rng.randint(2, 9)
        while y < height:
            x = rng.randint(2, 12)
            while x < width - 6:
                end = x + rng.randint(3, 26)
                for mark in range(x, min(end, width - 4), 3):
                    pen.line((mark, y, mark + rng.randint(-1, 2), y + step * 0.55), ink)
                x = end + 5
            y += step
    else:
        for _ in range(rng.randint(15, 90)):
            points = [(rng.uniform(0, width), rng.uniform(0, height)) for _ in range(rng.randint(2, 4))]
            pen.line(points, ink, rng.randint(1, 3))
    uneven = clouds(width, height, rng, noise) * 0.5 + 0.6
    return np.asarray(sheet, np.float32)[..., None] / 255 * uneven
