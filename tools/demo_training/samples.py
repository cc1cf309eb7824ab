"""Training batches: scenes and questions as token ids, positions, patches and answer positions (numpy only).

A sample is a list of segments. Segment 0 is the shared prefix; each further segment is a branch that continues it on
its own: several questions about one image cost one image, yet no question sees another's answer. All samples of a
batch have images of the same sizes.
"""

import random
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from . import questions
from .labels import UNIT, token_labels
from .scenes import Scene, draw, draw_scene, lay_out, through_jpeg
from .tokenizer import OTHER_SYSTEMS, SYSTEM

PATCH, MERGE = 14, 2
IMAGE = "<|vision_start|>{}<|vision_end|>"
SMALL_SIDES, SIDES, LARGE_SIDES = (84, 112, 140), (84, 112, 140, 168, 196), (196, 224, 252, 280, 308, 336, 392)
MAX_LARGE_PIXELS = 336 * 336
KINDS = {"branches": 58, "image_last": 16, "turns": 10, "pair": 13, "talk": 3}  # percent of batches
NUM_BRANCHES = 5
# Of the questions of a branch: most of those that look a thing up by its shape or colour, the hardest to learn.
BRANCH_KINDS = {"describe": 2, "what_at": 2, "colour": 6, "count": 4, "where": 4, "exists": 3, "size": 1}
FIRST_STEPS = (150, 300, 450)  # at most 1, 2, 3 things and one kind of sample until these steps
FEW_STEPS = 4200  # half of the batches have at most 2 things, until this step
SMALL_STEPS = 800  # small images only, until this step


@dataclass
class ImageGroup:
    """Images of one grid of patches."""

    grid: tuple[int, int]
    patches: np.ndarray  # uint8 (images, patches, 3 * PATCH * PATCH), in the processor's order
    labels: np.ndarray | None = None  # int64 (images, tokens, fields)


@dataclass
class Batch:
    """One step's data. Slots count through the flattened (rows, length)."""

    ids: np.ndarray  # int64 (rows, length)
    positions: np.ndarray  # int64 (3, rows, length): M-RoPE
    branches: np.ndarray  # int64 (rows, length): 0 prefix, then 1..n, -1 padding
    has_branches: bool
    answer_slots: np.ndarray  # int64: where the next token is one of an answer
    answer_ids: np.ndarray  # int64: which token it is
    answer_weights: np.ndarray  # float32: its weight in the loss
    images: list[ImageGroup]
    image_slots: np.ndarray  # int64: where image features go, in the order of `images`


@dataclass
class Segment:
    """Token ids, their weights in the loss (0: not learned), and the grids (in tokens) of the images within."""

    ids: list[int] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)


class Writer:
    """Writes messages in the qwen2-vl chat template, as token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._known: dict[str, list[int]] = {}
        self.image_id: int = tokenizer.token_to_id("<|image_pad|>")

    def add(self, segment: Segment, text: str) -> None:
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = self._encode(text).ids
        ids = self._known[text]
        segment.ids += ids
        segment.learned += [0.0] * len(ids)

    def add_image(self, segment: Segment, grid: tuple[int, int]) -> None:
        self.add(segment, "<|vision_start|>")
        segment.ids += [self.image_id] * (grid[0] * grid[1])
        segment.learned += [0.0] * (grid[0] * grid[1])
        segment.grids.append(grid)
        self.add(segment, "<|vision_end|>")

    def answer(self, segment: Segment, text: str) -> None:
        """Ends the user's message and gives the answer, whose tokens weigh one together."""
        self.add(segment, "<|im_end|>\n<|im_start|>assistant\n")
        start = len(segment.ids)
        self.add(segment, text)
        self.add(segment, "<|im_end|>")
        num_tokens = len(segment.ids) - start
        segment.learned[start:] = [1 / num_tokens] * num_tokens
        self.add(segment, "\n")

    def start(self, rng: random.Random) -> Segment:
        """A segment with the system block (most often the default one, sometimes none) and the user's header."""
        segment, kind = Segment(), rng.random()
        if kind < 0.92:
            system = SYSTEM if kind < 0.82 else rng.choice(OTHER_SYSTEMS)
            self.add(segment, f"<|im_start|>system\n{system}<|im_end|>\n")
        self.add(segment, "<|im_start|>user\n")
        return segment


def patchify(image: Image.Image) -> np.ndarray:
    """RGB image (sides multiples of UNIT) -> uint8 (patches, 3 * PATCH * PATCH), in Qwen2-VL's order."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // UNIT, pixels.shape[1] // UNIT
    blocks = pixels.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns * MERGE**2, -1)


def picture(scene: Scene, width: int, height: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Patches and labels of the scene at this size; three in ten through a resize, one in ten through JPEG."""
    drawn_width, drawn_height = width, height
    if rng.random() < 0.3:
        zoom = rng.choice((1, 1, 2, 3)) if width * height > 200 * 200 else 1
        drawn_width, drawn_height = width * zoom + rng.randint(-13, 13), height * zoom + rng.randint(-13, 13)
    spots = lay_out(scene, drawn_width, drawn_height, rng)
    image = draw(spots, drawn_width, drawn_height, rng)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        across, down = width / drawn_width, height / drawn_height
        spots = [
            replace(spot, x=spot.x * across, y=spot.y * down, radius=spot.radius * min(across, down)) for spot in spots
        ]
    if rng.random() < 0.1:
        image = through_jpeg(image, rng.randint(75, 95))
    return patchify(image), token_labels(spots, width, height)


def pick_size(rng: random.Random, step: int) -> tuple[int, int]:
    """Width and height: small ones at first, later all, now and then large."""
    if step < SMALL_STEPS:
        return rng.choice(SMALL_SIDES), rng.choice(SMALL_SIDES)
    if rng.random() > 0.08:
        return rng.choice(SIDES), rng.choice(SIDES)
    while True:
        width, height = rng.choice(LARGE_SIDES), rng.choice(LARGE_SIDES)
        if width * height <= MAX_LARGE_PIXELS:
            return width, height


def make_batch(writer: Writer, seed: int, step: int, num_rows: int) -> Batch:
    """The batch of this step: rows of one kind (fewer where they are long), easier in the first steps."""
    rng = random.Random(f"{seed} {step}")
    max_things = 1 + sum(step >= first for first in FIRST_STEPS)
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0] if max_things == 4 else "branches"
    if step < FEW_STEPS and rng.random() < 0.5:
        max_things = min(max_things, 2)
    sizes = [] if kind == "talk" else [pick_size(rng, step) for _ in range(2 if kind == "pair" else 1)]
    num_pixels = sum(width * height for width, height in sizes)
    num_rows = max(
        4,
        num_rows // 3 if num_pixels > 200 * 200 * len(sizes) else num_rows if kind == "branches" else num_rows * 3 // 2,
    )
    samples: list[list[Segment]] = []
    views: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in sizes]
    for _ in range(num_rows):
        scenes = [draw_scene(rng, max_things=max_things) for _ in sizes]
        for row, scene, (width, height) in zip(views, scenes, sizes, strict=True):
            row.append(picture(scene, width, height, rng))
        samples.append(make_sample(writer, kind, scenes, [(h // UNIT, w // UNIT) for w, h in sizes], rng))
    images = [
        ImageGroup((h // PATCH, w // PATCH), np.stack([view[0] for view in row]), np.stack([view[1] for view in row]))
        for row, (w, h) in zip(views, sizes, strict=True)
    ]
    return collate(samples, images, writer.image_id)


def make_sample(
    writer: Writer, kind: str, scenes: list[Scene], grids: list[tuple[int, int]], rng: random.Random
) -> list[Segment]:
    """One conversation of this kind as segments."""
    first = writer.start(rng)
    if kind == "talk":
        question, answer = questions.talk(rng)
        writer.add(first, question)
        writer.answer(first, answer)
        return [first]
    if kind == "branches":
        writer.add_image(first, grids[0])
        if rng.random() < 0.05:
            writer.add(first, "\n")
        branches = []
        for _ in range(NUM_BRANCHES):
            branch = Segment()
            question, answer = questions.ask_any(scenes[0], rng, BRANCH_KINDS)
            writer.add(branch, question)
            writer.answer(branch, answer)
            branches.append(branch)
        return [first, *branches]
    image_first = rng.random() < (0.0 if kind == "image_last" else 0.5)
    if kind == "pair":
        question, answer = questions.ask_pair(scenes[0], scenes[1], rng)
    else:
        question, answer = questions.ask_any(scenes[0], rng)
    if not image_first:
        writer.add(first, question)
    for grid in grids:
        writer.add_image(first, grid)
    if image_first:
        writer.add(first, question)
    writer.answer(first, answer)
    for _ in range(rng.randint(1, 3) if kind == "turns" else 0):
        question, answer = questions.ask_any(scenes[0], rng)
        writer.add(first, "<|im_start|>user\n" + question)
        writer.answer(first, answer)
    return [first]


def collate(samples: list[list[Segment]], images: list[ImageGroup], image_id: int) -> Batch:
    """Pads samples to one length and lays out positions, branches, answers and image slots."""
    length = max(sum(len(segment.ids) for segment in sample) for sample in samples)
    shape = (len(samples), length)
    ids, branches = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    learned = np.zeros(shape, np.float32)
    for row, sample in enumerate(samples):
        start, prefix_end = 0, 0
        for branch, segment in enumerate(sample):
            end = start + len(segment.ids)
            ids[row, start:end], branches[row, start:end], learned[row, start:end] = (
                segment.ids,
                branch,
                segment.learned,
            )
            positions[:, row, start:end] = segment_positions(segment, image_id, prefix_end)
            if branch == 0:
                prefix_end = int(positions[:, row, start:end].max()) + 1
            start = end
    slots = np.flatnonzero(learned)  # never at a row's start, so that the slot before it is of the same row
    pads = [np.flatnonzero(row == image_id) + idx * length for idx, row in enumerate(ids)] if images else []
    image_slots, start = [], 0
    for group in images:
        num_tokens = group.grid[0] * group.grid[1] // MERGE**2
        image_slots += [row[start : start + num_tokens] for row in pads]
        start += num_tokens
    return Batch(
        ids,
        positions,
        branches,
        any(len(sample) > 1 for sample in samples),
        slots - 1,
        ids.reshape(-1)[slots],
        learned.reshape(-1)[slots],
        images,
        np.concatenate(image_slots) if images else np.zeros(0, np.int64),
    )


def segment_positions(segment: Segment, image_id: int, start: int) -> np.ndarray:
    """M-RoPE positions (3, tokens): text counts on, an image spans its rows and columns from one start."""
    parts: list[np.ndarray] = []
    grids = iter(segment.grids)
    idx = 0
    while idx < len(segment.ids):
        if segment.ids[idx] == image_id:
            rows, columns = next(grids)
            row, column = np.divmod(np.arange(rows * columns), columns)
            parts.append(np.stack([np.zeros_like(row), row, column]) + start)
            idx, start = idx + rows * columns, start + max(rows, columns)
        else:
            end = idx
            while end < len(segment.ids) and segment.ids[end] != image_id:
                end += 1
            parts.append(np.broadcast_to(np.arange(start, start + end - idx), (3, end - idx)))
            idx, start = end, start + end - idx
    return np.concatenate(parts, 1)
