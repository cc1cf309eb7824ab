"""Which encodes are begun together and ahead of need."""

from __future__ import annotations

from scheduling_helpers import Config, FakeEngine, make_prompt

from lightvl.core import SamplingParams

PREFIX = list(range(100, 110))  # two pages and a half


def keys_of_first_plan(engine: FakeEngine) -> list[int]:
    plan = engine.launch()
    assert plan is not None
    return [work.image.key for work in plan.encodes]


def test_all_images_of_a_prompt_are_encoded_together() -> None:
    engine = FakeEngine(Config(num_pages=50, image_units=40))
    engine.submit(make_prompt([[1], *((key, 2) for key in range(8))], cross=False), SamplingParams(max_tokens=2))
    assert keys_of_first_plan(engine) == list(range(8))
    engine.drain()


def test_images_of_those_who_wait_for_a_common_prefix_are_encoded_with_the_first_ones() -> None:
    engine = FakeEngine(Config(num_pages=50, image_units=40, chunk_tokens=64))
    for key in range(8):
        engine.submit(make_prompt([PREFIX, (key, 2), [1]], cross=False), SamplingParams(max_tokens=2, n=1 + key % 2))
    assert keys_of_first_plan(engine) == list(range(8))
    engine.drain()
    assert engine.num_encoded == dict.fromkeys(range(8), 1)


def test_an_image_that_the_first_of_them_has_too_is_left_to_it() -> None:
    """The others find its rows in the prefix cache."""
    engine = FakeEngine(Config(num_pages=50, image_units=4, chunk_tokens=64))
    for text in range(3):
        engine.submit(make_prompt([PREFIX, (7, 2), (8, 2), [text]], cross=False), SamplingParams(max_tokens=2))
    engine.submit(make_prompt([PREFIX, (9, 2)], cross=False), SamplingParams(max_tokens=2))
    assert keys_of_first_plan(engine) == [7, 8]
    engine.drain()
    assert engine.num_encoded == {7: 1, 8: 1, 9: 1}
