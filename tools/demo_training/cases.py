"""Held-out cases: chat messages about pictures and in wordings never trained on, with the one right answer."""

import random
from dataclasses import dataclass

from PIL import Image

from . import dialogues, questions
from .phrases import GREETINGS, say
from .pictures import Facts, draw_facts, make_picture, pick_size
from .questions import DECLINE, plain

ABOUT_SCENES = ("describe", "what_at", "colour", "shape", "size", "where", "count", "exists", "relation")
ABOUT_PRINTS = {"read": "read", "ink": "ink", "word_or_number": "sort"}
ABOUT_CHARTS = {"tallest": "tallest", "nth_bar": "nth_bar", "taller": "taller", "bars": "count", "chart": "describe"}
ABOUT_MANY = ("nth_image", "all_images", "same", "which_image", "in_nth")
# `read` stands four times: words and numbers of every length
CASE_KINDS = (
    *ABOUT_SCENES, *ABOUT_PRINTS, "read", "read", "read", *ABOUT_CHARTS, *ABOUT_MANY, "second_turn", "second_turn",
    "greeting", "talk", "talk", "decline", "decline",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One conversation to complete. A message's content is a text or a list of texts and images in their order."""

    kind: str
    messages: tuple[tuple[str, tuple[str | Image.Image, ...]], ...]
    answer: str


def held_out_case(number: int, kind: str | None = None) -> Case:
    """Case `number`, always the same; kinds take turns unless one is given."""
    rng = random.Random(f"held out {number}")
    kind = kind or CASE_KINDS[number % len(CASE_KINDS)]
    if kind == "greeting":
        return Case(kind, (("user", (say(GREETINGS, rng, True),)),), dialogues.GREETING)
    if kind == "talk":
        question, answer = dialogues.talk(rng, held_out=True)
        return Case(kind, (("user", (plain(question),)),), plain(answer))
    if kind in ABOUT_MANY:
        return _many(kind, rng)
    if kind == "second_turn":
        size = pick_size(rng)
        facts = draw_facts(rng.choice(("scene", "scene", "print", "chart")), *size, rng, held_out=True)
        image = make_picture(facts, *size, rng).image
        earlier, later = (questions.ask_any(facts, rng, held_out=True) for _ in range(2))
        first = ("user", _in_some_order(plain(earlier[0]), [image], rng))
        messages = (first, ("assistant", (plain(earlier[1]),)), ("user", (plain(later[0]),)))
        return Case(kind, messages, plain(later[1]))
    size = pick_size(rng)
    facts = _facts_for(kind, size, rng)
    image = make_picture(facts, *size, rng).image
    asked = {**ABOUT_PRINTS, **ABOUT_CHARTS}.get(kind, kind)
    if kind == "decline":
        question, answer = questions.ask_any(None, rng, held_out=True)[0], (DECLINE,)
    else:
        question, answer = questions.ask(asked, facts, rng, held_out=True)
    return Case(kind, (("user", _in_some_order(plain(question), [image], rng)),), plain(answer))


def _facts_for(kind: str, size: tuple[int, int], rng: random.Random) -> Facts:
    picture_kind = "print" if kind in ABOUT_PRINTS else "chart" if kind in ABOUT_CHARTS else "scene"
    while True:
        facts = draw_facts("other" if kind == "decline" else picture_kind, *size, rng, held_out=True)
        if kind != "relation" or kind in questions.kinds_of(facts):
            return facts


def _many(kind: str, rng: random.Random) -> Case:
    sizes = [pick_size(rng) for _ in range(2 if kind == "same" or rng.random() < 0.75 else 3)]
    all_facts = dialogues.draw_many(sizes, rng, held_out=True)
    if kind == "same" and rng.random() < 0.5 and dialogues.may_be_twice(all_facts[0], sizes[1]):
        all_facts[1] = all_facts[0]
    images = [make_picture(facts, *size, rng).image for facts, size in zip(all_facts, sizes, strict=True)]
    question, answer = dialogues.ask_many(all_facts, rng, held_out=True, kind=kind)
    return Case(kind, (("user", _in_some_order(plain(question), images, rng)),), plain(answer))


def _in_some_order(text: str, images: list[Image.Image], rng: random.Random) -> tuple[str | Image.Image, ...]:
    return (text, *images) if rng.random() < 0.4 else (*images, text)
