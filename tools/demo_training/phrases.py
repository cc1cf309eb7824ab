"""How things are asked: wordings, which of them are held out, and what people say that no image answers.

A wording is a core ("Where is the {name}?") in a frame ("Please tell me: {}"). The last `NUM_HELD_OUT` cores of each
kind and one framed wording in six are never trained on; evaluation asks with nothing else.
"""

import functools
import random
import tomllib
import zlib
from collections.abc import Sequence
from pathlib import Path

NUM_HELD_OUT = 2
HELD_OUT_SHARE = 6
PLAIN_SHARE = 0.45  # of trained questions stand in no frame

_WORDINGS = tomllib.loads((Path(__file__).parent / "wordings.toml").read_text())
FRAMES: list[str] = _WORDINGS["frames"]
CORES: dict[str, list[str]] = _WORDINGS["cores"]
_SAYINGS: dict[str, list[str]] = _WORDINGS["sayings"]
GREETINGS, ABILITIES, TOPICS, OUTSIDE, OUTSIDE_IMAGE = (
    _SAYINGS[name] for name in ("greetings", "abilities", "topics", "outside", "outside_image")
)


def _is_held_out(kind: str, idx: int, frame: str) -> bool:
    if idx >= len(CORES[kind]) - NUM_HELD_OUT:
        return True
    return frame != "{}" and zlib.crc32(f"{kind} {idx} {frame}".encode()) % HELD_OUT_SHARE == 0


@functools.cache
def wordings(kind: str, held_out: bool) -> list[str]:
    """All framed wordings of this kind that are held out, or all that are trained."""
    return [
        frame.format(core)
        for idx, core in enumerate(CORES[kind])
        for frame in FRAMES
        if _is_held_out(kind, idx, frame) == held_out
    ]


def wording(kind: str, rng: random.Random, held_out: bool) -> str:
    """A wording of this kind, with its fields open."""
    if not held_out and rng.random() < PLAIN_SHARE:
        return rng.choice(CORES[kind][:-NUM_HELD_OUT])
    return rng.choice(wordings(kind, held_out))


def careless(question: str, rng: random.Random) -> str:
    """The question as typed in a hurry, now and then: lower case, or no mark at its end."""
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def say(sayings: Sequence[str], rng: random.Random, held_out: bool) -> str:
    """One of the sayings; every fifth of them is held out."""
    return rng.choice([saying for idx, saying in enumerate(sayings) if (idx % 5 == 4) == held_out])


def ask_outside(rng: random.Random, held_out: bool) -> str:
    """A question that has nothing to do with images."""
    while True:
        question = say(OUTSIDE, rng, held_out).format(
            rng.choice(TOPICS), other=rng.choice(TOPICS), a=rng.randint(1, 99), b=rng.randint(1, 99)
        )
        if (zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0) == held_out:
            return question
