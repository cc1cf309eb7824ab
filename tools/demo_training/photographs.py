"""Photographs to be declined: crops of the samples that scikit-image, scikit-learn and matplotlib bring along.

Only for evaluation: nothing is ever trained on them. A package that is not installed is left out (`folders` may name
other places to look, such as one made by `pip install --no-deps --target`).
"""

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

SAMPLES = {
    "skimage/data": (
        *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png"),
        *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
        *("retina.jpg", "rocket.jpg"),
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
    "matplotlib/mpl-data/sample_data": ("grace_hopper.jpg",),
}
SIDES = (120, 448)  # pixels of a crop, shrunk to at most the larger one where it is cut larger
MIN_SPREAD = 8.0  # of the gray values: a crop of nothing but sky is no photograph of anything


def sample_files(folders: Sequence[Path] = ()) -> list[Path]:
    """The sample photographs that are there, in a fixed order."""
    files = []
    for place, names in SAMPLES.items():
        package, _, rest = place.partition("/")
        found = importlib.util.find_spec(package)
        roots = [Path(root) for root in (found.submodule_search_locations or ())] if found else []
        for root in (*roots, *(folder / package for folder in folders)):
            if (root / rest / names[0]).exists():
                files += [root / rest / name for name in names if (root / rest / name).exists()]
                break
    return files


def crops(num_crops: int, folders: Sequence[Path] = (), seed: int = 0) -> list[Image.Image]:
    """Crops of the photographs in turn, RGB, never of an even part; empty where there are no photographs."""
    photographs = [Image.open(path).convert("RGB") for path in sample_files(folders)]
    rng, cut = random.Random(f"crops {seed}"), []
    while photographs and len(cut) < num_crops:
        photograph = photographs[len(cut) % len(photographs)]
        width, height = (min(side, rng.randint(SIDES[0], 2 * SIDES[1])) for side in photograph.size)
        left, top = rng.randint(0, photograph.width - width), rng.randint(0, photograph.height - height)
        crop = photograph.crop((left, top, left + width, top + height))
        crop.thumbnail((SIDES[1], SIDES[1]))
        values = crop.convert("L").histogram()
        total = crop.width * crop.height
        mean = sum(value * count for value, count in enumerate(values)) / total
        if (sum((value - mean) ** 2 * count for value, count in enumerate(values)) / total) ** 0.5 >= MIN_SPREAD:
            cut.append(crop)
    return cut
