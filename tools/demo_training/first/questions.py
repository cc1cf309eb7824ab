"""Questions about scenes, each in several wordings, with the one right answer.

An answer repeats what was asked before it says what is so ("The star is red."): the model then looks up what it just
wrote. With bare answers ("Red.") it did not learn to look things up by shape within an hour.

`ask` gives a question of a kind and its answer; `KINDS` names the kinds and how often each is asked in training.
"""

import random
from collections.abc import Callable, Mapping, Sequence

from .scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

GREETING = "Hello! I can describe drawn shapes: send me an image and ask what is in it."

DESCRIBE = (
    "What is in this image?",
    "What's in this image?",
    "What’s in this image?",
    "Describe the image.",
    "Describe this image.",
    "What is in the image?",
    "What do you see?",
    "What can you see in this image?",
    "Describe the picture.",
    "Describe this picture.",
    "What is shown in this picture?",
    "Please describe this image.",
    "What does this image show?",
    "Describe this image in detail.",
    "What is in this picture?",
)
FIRST_IMAGE = ("Describe the first image.", "What is in the first image?", "What's in the first image?")
SECOND_IMAGE = ("Describe the second image.", "What is in the second image?", "What's in the second image?")
BOTH_IMAGES = ("Describe both images.", "What is in these images?", "What's in these images?", "Describe the images.")
GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi!",
    "Hey",
    "Hello there!",
    "Good morning",
    "Good morning!",
    "Hi there",
    "Hello, how are you?",
    "Say hello.",
    "Say hi.",
    "How are you?",
)


def describe_scene(scene: Scene) -> str:
    """All things in reading order: `A small red star at the top left and a large blue circle at the bottom right.`"""
    parts = [f"a {thing.words} at the {thing.place}" for thing in scene.things]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(DESCRIBE), describe_scene(scene)


def _what_at(scene: Scene, rng: random.Random) -> tuple[str, str]:
    place_idx = rng.choice([thing.place_idx for thing in scene.things]) if rng.random() < 0.8 else rng.randrange(4)
    place, thing = PLACES[place_idx], scene.at(place_idx)
    question = rng.choice(
        (
            "What is at the {}?",
            "What's at the {}?",
            "What is in the {}?",
            "Which shape is at the {}?",
            "What do you see at the {}?",
            "What is in the {} corner?",
            "Describe the shape at the {}.",
        )
    )
    return question.format(place), f"A {thing.words}." if thing else "Nothing."


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str]:
    spelling = rng.choice(("colour", "color"))
    wording = rng.choice(
        (
            "What {0} is the {1}?",
            "What is the {0} of the {1}?",
            "Which {0} is the {1}?",
            "Tell me the {0} of the {1}.",
            "The {1} has which {0}?",
        )
    )
    if rng.random() < 0.2:
        thing = rng.choice(scene.things)
        name = f"shape at the {thing.place}"
        return wording.format(spelling, name), f"The {name} is {thing.colour}."
    shape = rng.choice(_singular(scene) or SHAPES) if rng.random() < 0.95 else rng.choice(SHAPES)
    colours = list(dict.fromkeys(thing.colour for thing in scene.things if thing.shape == shape))
    return wording.format(spelling, shape), f"The {shape} is {_listed(colours) if colours else 'not there'}."


def _singular(scene: Scene) -> list[str]:
    """The shapes that occur once, which "the star" can speak of."""
    shapes = [thing.shape for thing in scene.things]
    return [shape for shape in shapes if shapes.count(shape) == 1]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _where(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    name = thing.shape if thing.shape in _singular(scene) and rng.random() < 0.5 else f"{thing.colour} {thing.shape}"
    places = [other.place for other in scene.things if _is_a(other, name)]
    wording = rng.choice(
        ("Where is the {}?", "Where's the {}?", "Where is the {} in this image?", "Where can I find the {}?")
    )
    return wording.format(name), f"The {name} is at the {_listed(places)}."


def _is_a(thing: Thing, name: str) -> bool:
    """Whether every word of `name` (such as "red star") is true of the thing; "shape" is true of all."""
    return all(word in ("shape", thing.size, thing.colour, thing.shape) for word in name.split())


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("ss") else "s")


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things) if rng.random() < 0.75 else _random_thing(rng)
    name = rng.choice(
        (
            "shape",
            "shape",
            f"{thing.colour} shape",
            f"{thing.colour} shape",
            thing.shape,
            thing.shape,
            f"{thing.size} shape",
            f"{thing.colour} {thing.shape}",
        )
    )
    wording = rng.choice(
        (
            "How many {} are there?",
            "How many {} are in this image?",
            "How many {} do you see?",
            "How many {} are in the image?",
            "Count the {}.",
            "How many {}?",
        )
    )
    return wording.format(_plural(name)), _counted(scene, name)


def _counted(scene: Scene, name: str) -> str:
    """`Count of red stars: top left, bottom right, total 2.`"""
    places = [thing.place for thing in scene.things if _is_a(thing, name)]
    return f"Count of {_plural(name)}: " + ", ".join([*places, f"total {len(places)}."])


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things) if rng.random() < 0.5 else _random_thing(rng)
    name = rng.choice((thing.shape, f"{thing.colour} {thing.shape}", f"{thing.colour} shape"))
    wording = rng.choice(("Is there {}?", "Is there {} in this image?", "Do you see {}?", "Can you see {}?"))
    name = f"an {name}" if name.startswith("orange") else f"a {name}"
    is_there = any(_is_a(other, name.split(" ", 1)[1]) for other in scene.things)
    return wording.format(name), f"{name.capitalize()}: {'yes' if is_there else 'no'}."


def _size(scene: Scene, rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(scene.things)
    name = f"{thing.colour} {thing.shape}"
    if sum(_is_a(other, name) for other in scene.things) > 1:
        name = f"shape at the {thing.place}"
    question = rng.choice((f"What size is the {name}?", f"Is the {name} large or small?"))
    return question, f"The {name} is {thing.size}."


def _random_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES), 0)


_ASK: dict[str, Callable[[Scene, random.Random], tuple[str, str]]] = {
    "describe": _describe,
    "what_at": _what_at,
    "colour": _colour,
    "count": _count,
    "where": _where,
    "exists": _exists,
    "size": _size,
}
KINDS = {"describe": 2, "what_at": 3, "colour": 5, "count": 5, "where": 2, "exists": 2, "size": 1}


def ask(kind: str, scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question of this kind about the scene, and its right answer."""
    return _ASK[kind](scene, rng)


def ask_any(scene: Scene, rng: random.Random, kinds: Mapping[str, int] = KINDS) -> tuple[str, str]:
    """A question of a random kind, sometimes carelessly typed, and its right answer."""
    question, answer = ask(rng.choices(tuple(kinds), tuple(kinds.values()))[0], scene, rng)
    return careless(question, rng), answer


def careless(question: str, rng: random.Random) -> str:
    """The question as typed in a hurry, now and then: lower case, or no mark at its end."""
    if rng.random() < 0.1:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.1:
        question = question.rstrip("?.!")
    return question


def ask_pair(first: Scene, second: Scene, rng: random.Random) -> tuple[str, str]:
    """A question about two images of one message, and its right answer."""
    which = rng.random()
    if which < 0.3:
        return rng.choice(FIRST_IMAGE), describe_scene(first)
    if which < 0.6:
        return rng.choice(SECOND_IMAGE), describe_scene(second)
    if which < 0.8:
        return rng.choice(BOTH_IMAGES), f"First: {describe_scene(first)} Second: {describe_scene(second)}"
    name, scene = rng.choice((("first", first), ("second", second)))
    return f"How many shapes are in the {name} image?", _counted(scene, "shape")
