"""Questions about pictures, each in several wordings, with the one right answer and what it looks at.

An answer repeats what was asked before it says what is so ("The star is red."): the model then looks up what it just
wrote. A count tells the places first ("Number of stars: top left, right, so 2."). Where words speak of marks of an
image they are `Seen`: `guide` teaches one head of the text model to look there.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .charts import Chart
from .phrases import OUTSIDE_IMAGE, careless, say, wording
from .pictures import Facts
from .prints import Print
from .scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

DECLINE = "I only know drawn shapes, printed words and bar charts, so I cannot say."
NO_TEXT = "There is no text."
NO_BARS = "There are no bars."
SAME, DIFFERENT = " The images are the same.", " The images are different."
YES, NO = ": yes.", ": no."  # after both places of a relation
CONCLUSIONS = (SAME, DIFFERENT, YES, NO)  # from what the answer has said before
ORDINALS = ("first", "second", "third", "fourth", "fifth")
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@dataclass(frozen=True)
class Seen:
    """Words that speak of these marks of that image, and `also` of marks of other images."""

    text: str
    marks: tuple[int, ...]
    image: int = 0
    also: tuple[tuple[int, int], ...] = ()  # (image, mark) each

    @property
    def shown(self) -> tuple[tuple[int, int], ...]:
        """Every (image, mark) that the words speak of."""
        return (*((self.image, mark) for mark in self.marks), *self.also)


Said = tuple[str | Seen, ...]
Asked = tuple[Said, Said]  # a question and its answer


def plain(said: Said) -> str:
    return "".join(part if isinstance(part, str) else part.text for part in said)


def of_image(said: Said, image: int) -> Said:
    """The same, said of another image of the message."""
    return tuple(part if isinstance(part, str) else Seen(part.text, part.marks, image) for part in said)


def heading(image: int) -> str:
    """What stands before the description of one of several images."""
    return f"{' ' if image else ''}{ORDINALS[image].capitalize()}:"


def of_nothing(said: Said) -> Said:
    """The same where there is no image to look at."""
    return tuple(part if isinstance(part, str) else Seen(part.text, ()) for part in said)


def fill(template: str, **words: str | Seen) -> Said:
    """The template with its {fields} filled; a field that is Seen stays so."""
    parts: list[str | Seen] = []
    while "{" in template:
        before, _, rest = template.partition("{")
        name, _, template = rest.partition("}")
        word = words[name]
        if isinstance(word, str):
            template = before + word + template if "{" not in word else template
            continue
        # a word and the space before it are one token
        stripped = before.removesuffix(" ")
        parts += [stripped, replace(word, text=before[len(stripped) :] + word.text)]
    return tuple(part for part in (*parts, template) if part)


def describe(facts: Facts) -> Said:
    """`A small red star at the top left and a large blue circle at the bottom right.`"""
    match facts:
        case Scene(things):
            parts: list[str | Seen] = []
            for idx, thing in enumerate(things):
                joint = "A" if idx == 0 else " and a" if idx == len(things) - 1 else ", a"
                parts.append(Seen(f"{joint} {thing.words} at the {thing.place}", (idx,)))
            return (*parts, ".")
        case Print():
            return read(facts)
        case Chart(colours):
            bars = [
                Seen(("" if idx == 0 else " and" if idx == len(colours) - 1 else ",") + f" {colour}", (idx,))
                for idx, colour in enumerate(colours)
            ]
            best = Seen(f" {colours[facts.tallest]}", (facts.tallest,))
            return ("A bar chart with", *bars, " bars. The tallest bar is", best, ".")
    return (DECLINE,)


def read(printed: Print) -> Said:
    return ('It says "', *(Seen(glyph, (idx,)) for idx, glyph in enumerate(printed.text)), '".')


def fits(thing: Thing, name: str) -> bool:
    """Whether every word of `name` (such as "red star") is true of the thing; "shape" is true of all."""
    return all(word in ("shape", thing.size, thing.colour, thing.shape) for word in name.split())


def _fitting(facts: Facts, name: str) -> tuple[int, ...]:
    """Which things or bars have this name."""
    if isinstance(facts, Scene):
        return tuple(idx for idx, thing in enumerate(facts.things) if fits(thing, name))
    if isinstance(facts, Chart) and name.endswith("bar"):
        return tuple(idx for idx, colour in enumerate(facts.colours) if name in ("bar", f"{colour} bar"))
    return ()


def random_thing(rng: random.Random) -> Thing:
    return Thing(rng.choice(SIZES), rng.choice(tuple(COLOURS)), rng.choice(SHAPES), 0)


def _some_name(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """A name that fits this thing alone, most often the shortest."""
    names = [thing.shape, f"{thing.colour} {thing.shape}", f"{thing.size} {thing.shape}", f"{thing.colour} shape"]
    single = [name for name in names if len(_fitting(scene, name)) == 1]
    if not single:
        return thing.words
    return single[0] if rng.random() < 0.5 else rng.choice(single)


def plural(name: str) -> str:
    return name + ("es" if name.endswith("ss") else "s")


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _spelled(rng: random.Random) -> str:
    return rng.choice(("colour", "color"))


def _about_scene(kind: str, scene: Scene, rng: random.Random, held_out: bool) -> Asked:
    template, thing = wording(kind, rng, held_out), rng.choice(scene.things)
    idx = scene.things.index(thing)
    name = _some_name(scene, thing, rng)
    if kind == "what_at":
        place = thing.place_idx if rng.random() < 0.8 else rng.randrange(len(PLACES))
        found = next((i for i, other in enumerate(scene.things) if other.place_idx == place), None)
        asked = fill(template, place=Seen(PLACES[place], () if found is None else (found,)))
        return asked, ("Nothing.",) if found is None else (Seen(f"A {scene.things[found].words}", (found,)), ".")
    if kind == "colour":
        if rng.random() < 0.15:
            name = f"shape at the {thing.place}"
        elif rng.random() < 0.08:
            name = next((shape for shape in SHAPES if not _fitting(scene, shape)), thing.shape)
        elif thing.colour in name:
            single = [shape for shape in (thing.shape, f"{thing.size} {thing.shape}", f"{thing.size} shape")
                      if len(_fitting(scene, shape)) == 1]  # fmt: skip
            name = rng.choice(single) if single else f"shape at the {thing.place}"
        marks = (idx,) if " at the " in name else _fitting(scene, name)
        asked = fill(template, colour=_spelled(rng), name=Seen(name, marks))
        if not marks:
            return asked, (f"The {name} is not there.",)
        return asked, (f"The {name} is", Seen(f" {scene.things[marks[0]].colour}", marks), ".")
    if kind == "shape":
        single = [key for key in (thing.colour, f"{thing.size} and {thing.colour}", thing.size)
                  if len(_fitting(scene, key.replace(" and", ""))) == 1]  # fmt: skip
        if not single:  # by its place, which is asked, and answered, in another way
            return _about_scene("what_at", scene, rng, held_out)
        key = rng.choice(single)
        return fill(template, name=Seen(key, (idx,))), (
            f"The shape that is {key} is a",
            Seen(f" {thing.shape}", (idx,)),
            ".",
        )
    if kind == "size":
        name = name.replace(f"{thing.size} ", "") if thing.size in name else name
        if len(_fitting(scene, name)) != 1:
            name = f"shape at the {thing.place}"
        return fill(template, name=Seen(name, (idx,))), (f"The {name} is", Seen(f" {thing.size}", (idx,)), ".")
    if kind == "where":
        marks = _fitting(scene, name)
        places = _listed([(scene.things[i].place, i) for i in marks], " at the ")
        return fill(template, name=Seen(name, marks)), (f"The {name} is", *places, ".")
    return _relation(scene, template, rng)


def _listed(words: Sequence[tuple[str, int]], lead: str) -> list[Seen]:
    """` at the left, top and right`, each word with its mark."""
    joints = [lead, *[", "] * (len(words) - 2), *([" and "] if len(words) > 1 else [])]
    return [Seen(joint + word, (mark,)) for joint, (word, mark) in zip(joints, words, strict=True)]


def _alone(scene: Scene) -> list[int]:
    """The things that no other thing is like."""
    return [idx for idx, thing in enumerate(scene.things) if len(_fitting(scene, thing.words)) == 1]


def _relation(scene: Scene, template: str, rng: random.Random) -> Asked:
    """Whether one thing is left of, right of, above or below another; never of two in one column or row."""
    one, other = rng.sample(_alone(scene), 2)
    ways = []
    for relation, (axis, sign) in RELATIONS.items():
        at = [scene.things[i].place_idx % 3 if axis == 0 else scene.things[i].place_idx // 3 for i in (one, other)]
        if at[0] != at[1]:
            ways.append((relation, (at[0] - at[1]) * sign > 0))
    relation, is_so = rng.choice(ways)
    first, second = (_some_name(scene, scene.things[i], rng) for i in (one, other))
    asked = fill(template, name=Seen(first, (one,)), relation=relation, other=Seen(second, (other,)))
    places = [Seen(f" {scene.things[i].place}", (i,)) for i in (one, other)]
    told = (f"The {first} is at the", places[0], f", the {second} at the", places[1], YES if is_so else NO)
    return asked, told


def _count(facts: Facts, rng: random.Random, held_out: bool) -> Asked:
    """`Number of red stars: top left, bottom right, so 2.`"""
    if isinstance(facts, Chart):
        name, words = "bar", list(facts.colours)
    else:
        things = facts.things if isinstance(facts, Scene) else ()
        share_there = 0.8 if held_out else 0.7  # training asks more about what is not there
        thing = rng.choice(things) if things and rng.random() < share_there else random_thing(rng)
        name = rng.choice(
            ("shape", "shape", f"{thing.colour} shape", f"{thing.colour} shape", thing.shape, thing.shape,
             f"{thing.size} shape", f"{thing.colour} {thing.shape}")
        )  # fmt: skip
        words = [other.place for other in things]
    marks = _fitting(facts, name)
    asked = fill(wording("count", rng, held_out), names=Seen(plural(name), marks))
    told = [Seen(f"{',' if order else ''} {words[idx]}", (idx,)) for order, idx in enumerate(marks)]
    return asked, (f"Number of {plural(name)}:", *told, f", so {len(marks)}." if marks else " 0.")


def _exists(facts: Facts, rng: random.Random, held_out: bool) -> Asked:
    """`A red star: yes.`"""
    if isinstance(facts, Chart):
        name = f"{rng.choice(facts.colours) if rng.random() < 0.5 else rng.choice(tuple(COLOURS))} bar"
    else:
        is_scene = isinstance(facts, Scene) and rng.random() < 0.5
        thing = rng.choice(facts.things) if isinstance(facts, Scene) and is_scene else random_thing(rng)
        name = rng.choice((thing.shape, f"{thing.colour} {thing.shape}", f"{thing.colour} shape"))
    marks, full = _fitting(facts, name), a(name)
    asked = fill(wording("exists", rng, held_out), a_name=Seen(full, marks))
    return asked, (full[0].upper() + full[1:] + ":", Seen(" yes", marks) if marks else " no", ".")


def _about_print(kind: str, printed: Print, rng: random.Random, held_out: bool) -> Asked:
    marks = tuple(range(len(printed.text)))
    asked = fill(wording(kind, rng, held_out), colour=_spelled(rng), noun=printed.noun)
    if kind == "ink":
        return asked, ("The text is", Seen(f" {printed.colour}", marks), ".")
    if kind == "sort":
        return asked, (*read(printed)[:-1], f'", a {printed.noun}.')
    return asked, read(printed)


def _about_chart(kind: str, chart: Chart, rng: random.Random, held_out: bool) -> Asked:
    template, colours = wording(kind, rng, held_out), chart.colours
    if kind == "tallest":
        extreme = rng.choice(("tallest", "tallest", "shortest"))
        idx = chart.tallest if extreme == "tallest" else chart.shortest
        return fill(template, extreme=extreme), (f"The {extreme} bar is", Seen(f" {colours[idx]}", (idx,)), ".")
    if kind == "nth_bar":
        idx = rng.randrange(len(colours))
        nth = "last" if idx == len(colours) - 1 and rng.random() < 0.5 else ORDINALS[idx]
        asked = fill(template, colour=_spelled(rng), nth=nth)
        return asked, (f"The {nth} bar is", Seen(f" {colours[idx]}", (idx,)), ".")
    one, other = rng.sample(range(len(colours)), 2)
    higher = one if chart.heights[one] > chart.heights[other] else other
    asked = fill(template, name=Seen(colours[one], (one,)), other=Seen(colours[other], (other,)))
    return asked, ("The", Seen(f" {colours[higher]}", (higher,)), " bar is taller.")


SCENE_KINDS = {"describe": 4, "what_at": 4, "colour": 8, "shape": 3, "size": 3, "where": 6, "count": 7, "exists": 4,
               "relation": 7, "read": 1, "tallest": 1, "outside": 1}  # fmt: skip
PRINT_KINDS = {"describe": 4, "read": 8, "ink": 3, "sort": 2, "count": 1, "exists": 1, "outside": 1}
CHART_KINDS = {"describe": 4, "tallest": 5, "nth_bar": 5, "taller": 3, "count": 3, "exists": 2, "read": 1, "outside": 1}
OTHER_KINDS = {
    "describe": 8,
    "what_at": 1,
    "colour": 2,
    "where": 1,
    "count": 3,
    "exists": 3,
    "read": 2,
    "tallest": 1,
    "outside": 4,
}
TAUGHT_MORE = {"count": 2, "taller": 2}  # the hardest to learn: so many times as often in training


def kinds_of(facts: Facts) -> dict[str, int]:
    """Which kinds of questions are asked of such a picture, and how often in training."""
    match facts:
        case Scene():
            can_relate = len(_alone(facts)) > 1
            return {kind: n for kind, n in SCENE_KINDS.items() if kind != "relation" or can_relate}
        case Print():
            return PRINT_KINDS
        case Chart():
            return CHART_KINDS
    return OTHER_KINDS


def ask(kind: str, facts: Facts, rng: random.Random, held_out: bool = False) -> Asked:
    """A question of this kind about the picture, and its right answer."""
    if kind == "outside":
        return (say(OUTSIDE_IMAGE, rng, held_out),), (DECLINE,)
    if facts is None:  # asked what a person asks of any image
        model_of = {"tallest": Chart(("red", "blue"), (1, 2)), "read": Print("A", "red")}.get(kind)
        scene = Scene((random_thing(rng),))
        return (plain(ask(kind, model_of or scene, rng, held_out)[0]),), (DECLINE,)
    if kind == "describe":
        return (wording(kind, rng, held_out),), describe(facts)
    if kind == "count":
        return _count(facts, rng, held_out)
    if kind == "exists":
        return _exists(facts, rng, held_out)
    if isinstance(facts, Scene):
        if kind == "read":
            return fill(wording("read", rng, held_out), noun=rng.choice(("word", "number"))), (NO_TEXT,)
        if kind == "tallest":
            return fill(wording("tallest", rng, held_out), extreme=rng.choice(("tallest", "shortest"))), (NO_BARS,)
        return _about_scene(kind, facts, rng, held_out)
    if isinstance(facts, Chart):
        if kind == "read":
            return fill(wording("read", rng, held_out), noun=rng.choice(("word", "number"))), (NO_TEXT,)
        return _about_chart(kind, facts, rng, held_out)
    return _about_print(kind, facts, rng, held_out)


def ask_any(facts: Facts, rng: random.Random, held_out: bool = False) -> Asked:
    """A question of a random kind, sometimes carelessly typed, and its right answer."""
    kinds = kinds_of(facts)
    shares = [n * (1 if held_out else TAUGHT_MORE.get(kind, 1)) for kind, n in kinds.items()]
    question, answer = ask(rng.choices(tuple(kinds), shares)[0], facts, rng, held_out)
    return hurried(question, rng), answer


def hurried(question: Said, rng: random.Random) -> Said:
    """Now and then without a capital or a mark at its end."""
    first, last = question[0], question[-1]
    if isinstance(first, str) and isinstance(last, str):
        whole = careless(first + "\0" + last if len(question) > 1 else first, rng)
        head, _, tail = whole.partition("\0")
        question = tuple(part for part in (head, *question[1:-1], tail) if part)
    return question
