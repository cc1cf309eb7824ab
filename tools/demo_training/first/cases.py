"""Held-out cases of the first world: chat messages about scenes never trained on, with the one right answer."""

import random

from PIL import Image

from ..cases import Case
from . import questions
from .scenes import Scene, draw_scene, render

SIDES = (84, 196)  # pixels, any size between
LARGE_SIDES = (224, 336)
CASE_KINDS = (*questions.KINDS, "pair", "second_turn", "large", "hello")


def held_out_case(number: int, kind: str | None = None) -> Case:
    """Case `number`, always the same; kinds take turns unless one is given."""
    rng = random.Random(f"held out {number}")
    kind = kind or CASE_KINDS[number % len(CASE_KINDS)]
    if kind == "hello":
        return Case(kind, (("user", (rng.choice(questions.GREETINGS),)),), questions.GREETING)
    scene = draw_scene(rng, held_out=True)
    image = _picture(scene, rng, LARGE_SIDES if kind == "large" else SIDES)
    if kind == "pair":
        other = draw_scene(rng, held_out=True)
        question, answer = questions.ask_pair(scene, other, rng)
        return Case(kind, (("user", _in_some_order(question, [image, _picture(other, rng, SIDES)], rng)),), answer)
    if kind == "second_turn":
        earlier, later = questions.ask_any(scene, rng), questions.ask_any(scene, rng)
        first = ("user", _in_some_order(earlier[0], [image], rng))
        return Case(kind, (first, ("assistant", (earlier[1],)), ("user", (later[0],))), later[1])
    question, answer = questions.ask_any(scene, rng) if kind == "large" else questions.ask(kind, scene, rng)
    return Case(kind, (("user", _in_some_order(question, [image], rng)),), answer)


def _picture(scene: Scene, rng: random.Random, sides: tuple[int, int]) -> Image.Image:
    return render(scene, rng.randint(*sides), rng.randint(*sides), rng)


def _in_some_order(text: str, images: list[Image.Image], rng: random.Random) -> tuple[str | Image.Image, ...]:
    return (text, *images) if rng.random() < 0.5 else (*images, text)
