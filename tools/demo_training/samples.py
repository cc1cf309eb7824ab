"""Training batches: conversations as token ids, positions, patches and answer positions.

A sample is a list of segments. Segment 0 is the shared prefix; each further segment is a branch that continues it on
its own: several questions about one image cost one image, yet no question sees another's answer. All samples of a
batch have images of the same sizes.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import dialogues, questions
from .pictures import KINDS as PICTURE_KINDS
from .pictures import SHARES, UNIT, Facts, Picture, make_picture, pick_size, seen_size, training_picture
from .questions import ORDINALS, Asked, Said, Seen
from .tokenizer import OTHER_SYSTEMS, SYSTEM
from .views import ImageGroup, OnDevice, image_group

# Percent of batches beside the main one, which is "branches"; and of those without an image, which cost little.
OTHER_KINDS = {"image_last": 8, "turns": 14, "pair": 44, "triple": 34}
TEXT_KINDS = {"talk": 50, "conclusion": 50}
NUM_BRANCHES = {"branches": 8, "turns": 4, "pair": 6, "triple": 6}  # 1 in all other kinds
NUM_FURTHER_TURNS = 2  # in each branch of "turns", one after the other
# So many of them are asked for another answer that begins as the one before, where one of so many tries finds such:
# "The ring is blue." and "The ring is at the left.". Who rarely has to go on otherwise learns to repeat an answer.
FOLLOW_UP_SHARE, FOLLOW_UP_TRIES = 0.5, 40
NUM_IMAGES = {"pair": 2, "triple": 3, "talk": 0, "conclusion": 0}  # one in all other kinds
# Of the rows of a step: text costs little.
ROWS = {"triple": 0.875, "talk": 3.0, "conclusion": 3.0}
OTHER_SYSTEM_SHARE = 0.1  # of conversations have another system block than the template's
IMAGES_LAST_SHARE = 0.3  # of batches of several images ask before the images, with one question then
TWICE_SHARE, NEARLY_SHARE = 0.35, 0.2  # of pairs show the same twice, or nearly the same
# Which guided head looks (see `guide`): an architecture says which of its layers has it.
WORD_LAYER, NAME_LAYER, NEXT_LAYER = 0, 1, 2  # at image tokens
CARRIED_NAME_LAYER, CARRIED_NEXT_LAYER = 3, 4  # the same of images that are seen no more, at the rows that kept them
COMPARED_LAYER = 5  # a token of the second description, at its counterpart in the first
# beside these, what each row holds: KEPT once it has seen its image, MATCHED once it has looked at its counterpart
KEPT, MATCHED = 6, 7
CONCLUSION_WEIGHT = 3.0  # beside the other words. Nothing that ends a list may weigh more: lists would end early


@dataclass(frozen=True)
class Look:
    """A token that should look at image tokens: its slot in the segment and what they show."""

    slot: int
    layer: int
    shown: tuple[tuple[int, int], ...]  # (image, mark) each (in WORD_LAYER what a row is to keep); none: at bare ground
    counterpart: int = 0  # in COMPARED_LAYER: the slot to look at


@dataclass
class Segment:
    """Token ids, their weights in the loss (0: not learned), the grids (in tokens) of the images within, and looks."""

    ids: list[int] = field(default_factory=list)
    learned: list[float] = field(default_factory=list)
    grids: list[tuple[int, int]] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)


@dataclass(frozen=True)
class Batch(OnDevice):
    """Conversations of one kind. Slots count through the flattened (rows, length)."""

    ids: Tensor  # int64 (rows, length)
    positions: Tensor  # int64 (3, rows, length): M-RoPE
    branches: Tensor  # int64 (rows, length): 0 prefix, then 1..n, -1 padding
    answer_slots: Tensor  # int64: where the next token is one of an answer
    answer_ids: Tensor  # int64: which token it is
    answer_weights: Tensor  # float32: its weight in the loss
    images: list[ImageGroup]
    stands_at: Tensor  # int64 (rows, image tokens of a row): in which column each stands, image after image
    looks: list[tuple[int, int, Look]]  # row, column, look


class Writer:
    """Writes messages in the qwen2-vl chat template, as token ids, and brings pictures to the size that is seen."""

    START, HEADER, END, AFTER_END = "", "<|im_start|>{}\n", "<|im_end|>", "\n"
    IMAGE = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    NEWLINE_SHARE = 0.05  # of messages with one image have a newline after it
    LEAD_SHARE = 0.3  # of messages with several images tell before each which one it is
    CARRIES = False  # whether an image is only seen up to the next one
    SYSTEM = SYSTEM
    NO_SYSTEM_SHARE = 0.08  # of conversations have no system block; by default the template adds SYSTEM

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self._known: dict[str, list[int]] = {}
        self.image_id: int = tokenizer.token_to_id(self.IMAGE[1])

    def fits(self, width: int, height: int) -> tuple[int, int]:
        """The size at which an image is seen."""
        return seen_size(width, height)

    def num_slots(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tokens that an image of this seen size takes in the prompt."""
        return height // UNIT, width // UNIT

    def group(self, pictures: list[Picture]) -> ImageGroup:
        return image_group(pictures)

    def after_image(self, rng: random.Random) -> str:
        """What follows the only image of a message, before its text."""
        return "\n" if rng.random() < self.NEWLINE_SHARE else ""

    def ids_of(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = self._encode(text, add_special_tokens=False).ids
        return self._known[text]

    def add(self, segment: Segment, text: str) -> None:
        ids = self.ids_of(text)
        segment.ids += ids
        segment.learned += [0.0] * len(ids)

    def add_question(self, segment: Segment, said: Said) -> None:
        """Words that are Seen look, at their last token, at what they speak of, which may be nothing."""
        for part in said:
            self.add(segment, part if isinstance(part, str) else part.text)
            if isinstance(part, Seen):
                segment.looks.append(Look(len(segment.ids) - 1, NAME_LAYER, part.shown))

    def add_image(self, segment: Segment, grid: tuple[int, int]) -> None:
        self.add(segment, self.IMAGE[0])
        segment.ids += [self.image_id] * (grid[0] * grid[1])
        segment.learned += [0.0] * (grid[0] * grid[1])
        segment.grids.append(grid)
        self.add(segment, self.IMAGE[2])

    def add_images(
        self, segment: Segment, grids: list[tuple[int, int]], rng: random.Random, are_last: bool = False
    ) -> None:
        """The images of a message, several with or without words before each that tell which one it is."""
        lead = rng.choice(dialogues.IMAGE_LEADS) if len(grids) > 1 and rng.random() < self.LEAD_SHARE else ""
        start = 0
        for number, grid in enumerate(grids):
            self.add(segment, lead.format(nth=ORDINALS[number], n=number + 1))
            if self.CARRIES and number:  # what these rows do not take along is lost: each takes one thing
                slots = range(start, len(segment.ids))
                segment.looks += [Look(slot, WORD_LAYER, ((number - 1, slot - start),)) for slot in slots]
            start = len(segment.ids)
            self.add_image(segment, grid)
        if len(grids) == 1 and not are_last:
            self.add(segment, self.after_image(rng))

    def answer(self, segment: Segment, said: Said, is_given: bool = False) -> None:
        """Ends the user's message and gives the answer; before each token that is Seen the model looks at it, and where
        something could have been Seen, but is not, at nothing. Where the answer `is_given` only its conclusion is
        learned."""
        self.add(segment, f"{self.END}{self.AFTER_END}{self.HEADER.format('assistant')}")
        start = len(segment.ids)
        begins: dict[str, int] = {}
        for part in said:
            first = len(segment.ids)
            begins[questions.plain((part,))] = first
            self.add(segment, part if isinstance(part, str) else part.text)
            if isinstance(part, Seen) and part.shown:
                slots = range(first - 1, len(segment.ids) - 1)
                segment.looks += [Look(slot, NEXT_LAYER, part.shown) for slot in slots]
            elif first > start or len(said) == 1:  # not how an answer of several parts begins
                segment.looks.append(Look(first - 1, NEXT_LAYER, ()))
        self.add(segment, self.END)
        num_tokens = len(segment.ids) - start
        segment.learned[start:] = [num_tokens**-0.5] * num_tokens  # between every token and every answer the same
        if said[-1] in questions.CONCLUSIONS:
            segment.learned[first:] = [CONCLUSION_WEIGHT * num_tokens**-0.5] * (len(segment.ids) - first)
        if is_given:
            segment.learned[start:first] = [0.0] * (first - start)
        if said[-1] in (questions.SAME, questions.DIFFERENT):  # compared word by word
            ones, others = begins[questions.heading(0)], begins[questions.heading(1)]
            for offset in range(min(others - ones, first - others)):
                segment.looks.append(Look(others + offset, COMPARED_LAYER, (), ones + offset))
        self.add(segment, self.AFTER_END)

    def turn(self, segment: Segment) -> None:
        """Begins a message of the user."""
        self.add(segment, self.HEADER.format("user"))

    def start(self, rng: random.Random) -> Segment:
        """A segment with the system block (the default one, another or none) and the user's header."""
        segment, kind = Segment(), rng.random()
        self.add(segment, self.START)
        if kind < 1 - self.NO_SYSTEM_SHARE:
            is_default = kind < 1 - self.NO_SYSTEM_SHARE - OTHER_SYSTEM_SHARE
            system = self.SYSTEM if is_default else rng.choice(OTHER_SYSTEMS)
            self.add(segment, f"{self.HEADER.format('system')}{system}{self.END}{self.AFTER_END}")
        self.turn(segment)
        return segment


def make_batch(writer: Writer, kind: str, seed: str, step: int, num_rows: int) -> Batch:
    """The batch of this step: rows of one kind."""
    rng = random.Random(f"{kind} {seed} {step}")
    sizes = [writer.fits(*pick_size(rng)) for _ in range(NUM_IMAGES.get(kind, 1))]
    is_image_last = rng.random() < IMAGES_LAST_SHARE if len(sizes) > 1 else kind == "image_last"
    samples: list[list[Segment]] = []
    views: list[list[Picture]] = [[] for _ in sizes]
    for _ in range(max(1, round(num_rows * ROWS.get(kind, 1)))):
        if len(sizes) > 1:
            all_facts = dialogues.draw_many(sizes, rng)
            likeness = rng.random()
            if len(sizes) == 2 and likeness < TWICE_SHARE + NEARLY_SHARE:
                second = all_facts[0] if likeness < TWICE_SHARE else dialogues.vary(all_facts[0], rng)
                if dialogues.may_be_twice(second, sizes[1]):
                    all_facts[1] = second
            pictures = [make_picture(facts, *size, rng) for facts, size in zip(all_facts, sizes, strict=True)]
        else:
            pictures = [training_picture(rng.choices(PICTURE_KINDS, SHARES)[0], *size, rng) for size in sizes]
            all_facts = [picture.facts for picture in pictures]
        for row, picture in zip(views, pictures, strict=True):
            row.append(picture)
        grids = [writer.num_slots(*size) for size in sizes]
        samples.append(make_sample(writer, kind, all_facts, grids, rng, is_image_last))
    return collate(samples, [writer.group(row) for row in views], writer.image_id)


def make_sample(
    writer: Writer,
    kind: str,
    all_facts: list[Facts],
    grids: list[tuple[int, int]],
    rng: random.Random,
    is_image_last: bool = False,
) -> list[Segment]:
    """One conversation of this kind as segments."""
    first = writer.start(rng)
    if kind == "talk":
        question, answer = dialogues.talk(rng)
        writer.add_question(first, question)
        writer.answer(first, answer)
        return [first]
    if kind == "conclusion":
        question, answer = (questions.of_nothing(said) for said in dialogues.conclude(rng))
        writer.add_question(first, question)
        writer.answer(first, answer, is_given=True)
        return [first]

    def ask() -> Asked:
        return questions.ask_any(all_facts[0], rng) if len(all_facts) == 1 else dialogues.ask_many(all_facts, rng)

    question, answer = asked = ask()
    is_image_last |= kind == "turns" and rng.random() < 0.4
    if is_image_last:
        writer.add_question(first, tuple(questions.plain((part,)) for part in question))  # nothing to look at yet
    writer.add_images(first, grids, rng, is_image_last)
    if is_image_last or kind == "turns":
        writer.add_question(first, () if is_image_last else question)
        writer.answer(first, answer)
    if is_image_last and kind != "turns":
        return [first]
    branches = [Segment() for _ in range(NUM_BRANCHES[kind])]
    for branch in branches:
        if kind == "turns":
            add_turns(writer, branch, asked, ask, rng)
        else:
            question, answer = ask()
            writer.add_question(branch, question)
            writer.answer(branch, answer)
    return [first, *branches]


def add_turns(writer: Writer, branch: Segment, asked: Asked, ask: Callable[[], Asked], rng: random.Random) -> None:
    """Questions after one that was `asked`: of any kind, and often one whose answer begins alike."""
    for _ in range(NUM_FURTHER_TURNS):
        before, num_tries = asked[1], FOLLOW_UP_TRIES if rng.random() < FOLLOW_UP_SHARE else 1
        for _ in range(num_tries):
            asked = ask()
            if asked[1] != before and asked[1][0] == before[0]:
                break
        writer.turn(branch)
        writer.add_question(branch, asked[0])
        writer.answer(branch, asked[1])


def collate(samples: list[list[Segment]], images: list[ImageGroup], image_id: int) -> Batch:
    """Pads samples to one length and lays out positions, branches, answers, looks and image slots."""
    length = max(sum(len(segment.ids) for segment in sample) for sample in samples)
    shape = (len(samples), length)
    ids, branches = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    learned = np.zeros(shape, np.float32)
    looks = []
    for row, sample in enumerate(samples):
        start, prefix_end = 0, 0
        for branch, segment in enumerate(sample):
            end = start + len(segment.ids)
            ids[row, start:end], branches[row, start:end] = segment.ids, branch
            learned[row, start:end] = segment.learned
            positions[:, row, start:end] = segment_positions(segment, image_id, prefix_end)
            looks += [(row, start + look.slot, look) for look in segment.looks]
            if branch == 0:
                prefix_end = int(positions[:, row, start:end].max()) + 1
            start = end
    slots = np.flatnonzero(learned)  # never at a row's start, so that the slot before it is of the same row
    stands_at = np.stack([np.flatnonzero(row == image_id) for row in ids])
    if stands_at.shape[1] == len(images):  # one token in the prompt for each image: all that it shows stands there
        stands_at = np.repeat(stands_at, [group.labels.shape[1] for group in images], 1)
    arrays = (ids, positions, branches, slots - 1, ids.reshape(-1)[slots], learned.reshape(-1)[slots])
    return Batch(*map(torch.from_numpy, arrays), images, torch.from_numpy(stands_at), looks)


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
