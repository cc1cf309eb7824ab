"""What is asked of several images in their order, and what is said without an image."""

import random
from collections.abc import Sequence
from dataclasses import replace

from . import questions
from .charts import Chart
from .phrases import ABILITIES, GREETINGS, ask_outside, careless, say, wording
from .pictures import Facts, draw_facts
from .prints import GLYPHS, Print
from .questions import DECLINE, DIFFERENT, ORDINALS, SAME, Asked, Said, Seen, describe, fill, heading, of_image
from .scenes import COLOURS, Scene, draw_scene, is_held_out, places_of

GREETING = "Hello! Send me an image of drawn shapes, a printed word or a bar chart, and ask about it."
ABILITY = "I describe drawn shapes, read printed words and numbers, and answer questions about bar charts."
NO_IMAGE = "Please send me an image of drawn shapes, a printed word or a bar chart."
MAX_THINGS_OF_MANY = 2  # things in a scene that stands beside others
MANY_KINDS = {"nth_image": 20, "all_images": 10, "same": 15, "which_image": 30, "in_nth": 25}  # percent of questions
MANY_SHARES = {"scene": 70, "print": 15, "chart": 15}  # percent of the images of such messages
IMAGE_LEADS = ("Image {n}:", "The {nth} image:", "This is the {nth} image:", "Here is the {nth} image:")  # before it
ORDINAL_LEADS = ("In the {} image:", "About the {} image:", "Look at the {} image.", "In the {} picture:")


def talk(rng: random.Random, held_out: bool = False) -> Asked:
    """A message without an image, and its right answer."""
    which = rng.random()
    if which < 0.25:
        return (careless(say(GREETINGS, rng, held_out), rng),), (GREETING,)
    if which < 0.45:
        return (careless(say(ABILITIES, rng, held_out), rng),), (ABILITY,)
    if which < 0.65:
        kind = rng.choice(("describe", "read", "colour", "count", "where", "exists", "what_at", "tallest"))
        facts = draw_facts({"read": "print", "tallest": "chart"}.get(kind, "scene"), 168, 168, rng)
        return (questions.plain(questions.ask(kind, facts, rng, held_out)[0]),), (NO_IMAGE,)
    return (careless(ask_outside(rng, held_out), rng),), (DECLINE,)


def draw_many(sizes: Sequence[tuple[int, int]], rng: random.Random, held_out: bool = False) -> list[Facts]:
    """Facts for images that stand beside each other: simple ones."""
    all_facts: list[Facts] = []
    for size in sizes:
        kind = rng.choices(tuple(MANY_SHARES), tuple(MANY_SHARES.values()))[0]
        while True:
            facts = draw_facts(kind, *size, rng, held_out)
            if not isinstance(facts, Scene) or len(facts.things) <= MAX_THINGS_OF_MANY:
                break
        all_facts.append(facts)
    return all_facts


def may_be_twice(facts: Facts, size: tuple[int, int]) -> bool:
    """Whether these facts fit an image of that size too (for asking whether two images show the same)."""
    return not isinstance(facts, Scene) or all(thing.place_idx in places_of(*size) for thing in facts.things)


def vary(facts: Facts, rng: random.Random) -> Facts:
    """Nearly the same: one thing, letter or bar is another. For training."""
    while True:
        match facts:
            case Scene(things):
                idx = rng.randrange(len(things))
                other = questions.random_thing(rng)
                change = rng.choice(({"size": other.size}, {"colour": other.colour}, {"shape": other.shape}))
                varied: Facts = Scene((*things[:idx], replace(things[idx], **change), *things[idx + 1 :]))
            case Print(text, colour):
                idx = rng.randrange(len(text))
                glyphs = GLYPHS[26:] if text.isdigit() else GLYPHS[:26]
                varied = Print(text[:idx] + rng.choice(glyphs) + text[idx + 1 :], colour)
            case Chart(colours, heights):
                idx = rng.randrange(len(colours))
                other_colour = rng.choice([colour for colour in COLOURS if colour not in colours])
                varied = Chart((*colours[:idx], other_colour, *colours[idx + 1 :]), heights)
            case _:
                return facts
        if varied != facts and not is_held_out(varied.key):
            return varied


def conclude(rng: random.Random) -> Asked:
    """A question whose answer concludes from what it says before: for that nothing need be seen. For training."""
    if rng.random() < 0.5:
        while "relation" not in questions.kinds_of(scene := draw_scene(rng, num_things=(2, 3))):
            pass
        return questions.ask("relation", scene, rng)
    one, other = draw_many([(168, 168)] * 2, rng)
    likeness = rng.random()
    return ask_many((one, one if likeness < 0.5 else vary(one, rng) if likeness < 0.8 else other), rng, kind="same")


def ask_many(all_facts: Sequence[Facts], rng: random.Random, held_out: bool = False, kind: str | None = None) -> Asked:
    """A question about several images of one message, and its right answer."""
    kind = kind or rng.choices(tuple(MANY_KINDS), tuple(MANY_KINDS.values()))[0]
    if kind == "same" and len(all_facts) > 2:
        kind = "all_images"
    idx = rng.randrange(len(all_facts))
    if kind == "nth_image":
        asked: Said = fill(wording(kind, rng, held_out), nth=ORDINALS[idx])
        return asked, of_image(describe(all_facts[idx]), idx)
    if kind == "in_nth":
        asked, told = questions.ask_any(all_facts[idx], rng, held_out)
        lead, first = rng.choice(ORDINAL_LEADS).format(ORDINALS[idx]), asked[0]
        joined = (f"{lead} {first}",) if isinstance(first, str) else (lead, Seen(f" {first.text}", first.marks))
        return of_image((*joined, *asked[1:]), idx), of_image(told, idx)
    if kind == "which_image":
        return _which_image(all_facts, rng, held_out)
    told = ()
    for number, facts in enumerate(all_facts):
        told += (heading(number), *of_image(_lower(describe(facts)), number))
    if kind == "same":
        told += (SAME if all_facts[0] == all_facts[1] else DIFFERENT,)
    return (wording(kind, rng, held_out),), told


def _lower(said: Said) -> Said:
    """Said within a sentence, with the space before it: ` a small red star...`."""
    first = said[0]
    if isinstance(first, Seen):
        return (Seen(f" {first.text[0].lower()}{first.text[1:]}", first.marks, first.image), *said[1:])
    return (f" {first[0].lower()}{first[1:]}", *said[1:])


def _which_image(all_facts: Sequence[Facts], rng: random.Random, held_out: bool) -> Asked:
    """`A red star is in the second image.`"""
    idx = rng.randrange(len(all_facts))
    facts = all_facts[idx]
    if isinstance(facts, Scene):
        thing = rng.choice(facts.things)
        name = rng.choice((thing.shape, f"{thing.colour} {thing.shape}", f"{thing.colour} shape"))
    else:
        name = facts.noun if isinstance(facts, Print) else "bar chart"
    found = []
    for other in all_facts:
        if isinstance(other, Scene):
            found.append(tuple(i for i, thing in enumerate(other.things) if questions.fits(thing, name)))
        elif isinstance(other, Print):
            found.append(tuple(range(len(other.text))) if name == other.noun else ())
        else:
            found.append(tuple(range(len(other.colours))) if name == "bar chart" and other is not None else ())
    full = questions.a(name)
    holders = [number for number, marks in enumerate(found) if marks]
    also = tuple((number, mark) for number in holders[1:] for mark in found[number])
    named = Seen(full, found[holders[0]], holders[0], also)
    asked = fill(wording("which_image", rng, held_out), a_name=named)
    places = [
        Seen((" the" if order == 0 else " and the") + f" {ORDINALS[number]}", found[number], number)
        for order, number in enumerate(holders)
    ]
    return asked, (f"{full[0].upper()}{full[1:]} is in", *places, " image." if len(places) == 1 else " images.")
