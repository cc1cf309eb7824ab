"""Both embedded models by what they say: pictures that no training code has drawn, of several sizes and proportions,
two in one message, second turns. So native resolution, M-RoPE, cross attention and its spans are seen to work."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_helpers import Running, chat, end, image_part, launch, says, text_part
from PIL import Image, ImageDraw, ImageFont

import lightvl.demo

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from demo_training.by_hand import questions_by_hand, second_turns
from demo_training.cases import Case
from eval_demo import as_openai

RED, BLUE, GREEN = (226, 30, 30), (30, 60, 220), (20, 150, 60)


@pytest.fixture(scope="module", params=list(lightvl.demo.FOLDERS))
def model(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = launch("--model-path", f"demo:{request.param}")
    yield running
    end(running)


def picture(width: int, height: int, draw: Any = None) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    if draw is not None:
        draw(ImageDraw.Draw(image))
    return image


def circle(x: int, y: int, radius: int, fill: tuple[int, int, int]) -> Any:
    return lambda pen: pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill)


def square(x: int, y: int, half: int, fill: tuple[int, int, int]) -> Any:
    return lambda pen: pen.rectangle((x - half, y - half, x + half, y + half), fill)


def test_the_sample_is_described(model: Running) -> None:
    told = says(model, image_part(lightvl.demo.SAMPLE), text_part("What is in this image?"))
    for thing in ("blue circle at the left", "red star at the top right", "green square at the bottom right"):
        assert thing in told


@pytest.mark.parametrize(("width", "height"), [(160, 160), (400, 130), (130, 400), (60, 60), (448, 448)])
def test_sizes_and_proportions(model: Running, width: int, height: int) -> None:
    image = picture(width, height, circle(width // 2, height // 2, min(width, height) // 7, RED))
    assert "red circle" in says(model, image_part(image), text_part("What do you see?"))


def test_a_word_is_read(model: Running) -> None:
    font = ImageFont.load_default(40)
    image = picture(200, 100, lambda pen: pen.text((100, 50), "TREE", (20, 20, 20), font, anchor="mm"))
    assert '"TREE"' in says(model, image_part(image), text_part("What does it say?"))


def test_two_images_in_their_order(model: Running) -> None:
    first, second = picture(160, 160, circle(80, 80, 18, BLUE)), picture(200, 140, square(100, 70, 16, GREEN))
    parts = [text_part("This is the first image:"), image_part(first)]
    parts += [text_part("This is the second image:"), image_part(second)]
    seen = {"first": "blue circle", "second": "green square"}
    if "mllama" in model.greeting:
        del seen["first"]  # text sees the last image only; this model does not carry the first one's content over
    for nth, thing in seen.items():
        assert thing in says(model, *parts, text_part(f"What is in the {nth} image?"))


def test_a_second_turn_about_the_same_image(model: Running) -> None:
    image = picture(160, 160, circle(34, 34, 18, BLUE))
    turns = [
        {"role": "user", "content": [image_part(image), text_part("What colour is the circle?")]},
        {"role": "assistant", "content": "The circle is blue."},
        {"role": "user", "content": "Where is the circle?"},
    ]
    assert "top left" in chat(model, [], messages=turns, temperature=0)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("make_cases", [questions_by_hand, second_turns])
def test_questions_by_hand(model: Running, make_cases: Callable[[], list[Case]]) -> None:
    """One may be wrong: a near tie of two words may end otherwise on another processor."""
    wrong = []
    for case in make_cases():
        messages = as_openai(case, tell_order=True)
        told = chat(model, [], messages=messages, temperature=0, max_tokens=60)["choices"][0]["message"]["content"]
        if told != case.answer:
            wrong.append((case.messages[-1][1][-1], case.answer, told))
    assert len(wrong) <= 1, wrong


def test_what_it_does_not_know_is_declined(model: Running) -> None:
    assert "I only know" in says(model, text_part("What is the capital of France?"))


def test_jpeg_and_png_say_the_same(model: Running) -> None:
    image = picture(160, 160, square(126, 34, 16, RED))
    packed = io.BytesIO()
    image.save(packed, "JPEG", quality=80)
    question = text_part("Where is the square?")
    for form in (image, packed.getvalue()):
        assert "top right" in says(model, image_part(form), question)
