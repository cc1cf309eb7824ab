"""The evaluation of the embedded model: what it counts as right, what it tells, and where photographs come from."""

import io
import random
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import eval_demo
from demo_training import photographs
from demo_training.cases import Case


def outcome(number, kind, right, said, error=""):
    image = Image.new("RGB", (60, 80), (200, 30, 30))
    return eval_demo.Outcome(number, Case(kind, (("user", (image, "What colour?")),), right), said, error)


OUTCOMES = [
    outcome(1, "colour", "The star is red.", "The star is red."),
    outcome(2, "colour", "The star is red.", "The star is pink."),
    outcome(3, "where", "The star is at the top left.", "The star is at the top."),
    outcome(4, "where", "The star is at the top.", "", "HTTPError: 500"),
    outcome(5, "photograph", "I cannot say.", "A red star."),
    outcome(6, "by_hand", "The star is red.", "The star is red."),
]


def test_confusions_tell_which_word_was_taken_for_which():
    assert eval_demo.confusions(OUTCOMES) == {("red.", "pink."): 1, ("top", "top."): 1, ("left.", ""): 1}


def test_the_order_of_several_images_is_told_where_asked():
    images = [Image.new("RGB", (60 + i, 60)) for i in range(2)]
    several = Case("same", (("user", (*images, "Are they the same?")),), "")
    alone = Case("colour", (("user", (images[0], "What colour?")),), "")

    def kinds(case, tell_order):
        (message,) = eval_demo.as_openai(case, tell_order)
        return [part.get("text", "image") for part in message["content"]]

    told = ["This is the first image:", "image", "This is the second image:", "image", "Are they the same?"]
    assert kinds(several, True) == told
    assert kinds(several, False) == ["image", "image", "Are they the same?"]
    assert kinds(alone, True) == ["image", "What colour?"]


def test_the_report_counts_by_kind_and_apart_from_photographs_and_questions_by_hand(capsys):
    numbers = eval_demo.report(OUTCOMES, show_wrong=5)
    assert numbers["by_kind"] == {"colour": [1, 2], "where": [0, 2]}
    assert (numbers["cases"], numbers["right"], numbers["errors"]) == (4, 1, 1)
    assert (numbers["photographs_declined"], numbers["by_hand"]) == ([0, 1], [1, 1])
    assert "HTTPError: 500" in capsys.readouterr().out


def test_the_sheet_of_failures_is_drawn(tmp_path):
    eval_demo.draw_failures(OUTCOMES, tmp_path / "wrong.png")
    assert Image.open(tmp_path / "wrong.png").height == eval_demo.CELL[1]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([b'data: {"choices": [{"delta": {"content": "A"}}]}\n'], "without"),
        ([b'data: {"error": {"message": "broken"}}\n'], "broken"),
    ],
)
def test_a_stream_that_breaks_is_no_answer(lines, problem):
    with pytest.raises(ValueError, match=problem):
        eval_demo.read_stream(io.BytesIO(b"".join(lines)))


def test_a_stream_is_joined():
    events = (
        b'data: {"choices": [{"delta": {"content": "A "}}]}\n\ndata: {"choices": [{"delta": {"content": "b"}}]}\n\n'
    )
    assert eval_demo.read_stream(io.BytesIO(events + b"data: [DONE]\n\n")) == "A b"


def test_crops_are_parts_of_the_sample_photographs(tmp_path):
    folder = tmp_path / "skimage" / "data"
    folder.mkdir(parents=True)
    noise = random.Random(0).randbytes(600 * 500 * 3)
    for name in photographs.SAMPLES["skimage/data"][:2]:
        Image.frombytes("RGB", (600, 500), noise).save(folder / name)
    files = photographs.sample_files([tmp_path])
    assert {path.name for path in files} >= {"astronaut.png"}
    crops = photographs.crops(6, [tmp_path])
    assert len(crops) == 6 and all(max(crop.size) <= photographs.SIDES[1] for crop in crops)
    assert crops[0].tobytes() == photographs.crops(6, [tmp_path])[0].tobytes()
