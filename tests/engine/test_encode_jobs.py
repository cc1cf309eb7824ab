"""FeatureStore: which images share a job, and that every one of them ends once, whatever is dropped, bad or broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.core import PromptImage
from lightvl.engine.features import FeatureStore
from lightvl.scheduling.plan import EncodeWork

SIZE = 3  # feature rows of an image


@dataclass
class FakeMedia:
    key: int
    num_patches: int = 4
    error: Exception | None = None
    layout: Any = None
    num_calls: int = 0

    def __post_init__(self) -> None:
        self.layout = self

    def pixels(self) -> torch.Tensor:
        self.num_calls += 1
        if self.error is not None:
            raise self.error
        return torch.full((self.num_patches, 2), self.key % 256, dtype=torch.uint8)


@dataclass
class FakeFamily:
    """Three pieces an image, all at the end; `breaks`: keys whose company raises, `bad`: keys with wrong features."""

    jobs: list[list[int]] = field(default_factory=list)
    num_pieces: int = 0
    breaks: frozenset[int] = frozenset()
    bad: frozenset[int] = frozenset()
    one_by_one: bool = False

    def encode(self, images: Any, attention: Any) -> Iterator[dict[int, torch.Tensor] | None]:
        keys = [layout.key for _, layout in images]
        assert [int(pixels[0, 0]) for pixels, _ in images] == keys
        self.jobs.append(keys)
        for _ in range(3):
            self.num_pieces += 1
            yield None
        if self.breaks & set(keys):
            raise RuntimeError("the tower broke")
        shared = torch.cat([torch.full((SIZE, 2), torch.nan if key in self.bad else float(key)) for key in keys])
        parts = dict(enumerate(shared.split(SIZE)))
        yield from ([{idx: part} for idx, part in parts.items()] if self.one_by_one else [parts])


class Lane:
    """A FeatureStore over fakes."""

    def __init__(self, max_patches: int = 1000, **family: Any) -> None:
        self.family = FakeFamily(**family)
        self.written: list[tuple[int, tuple[int, ...]]] = []
        model: Any = type("Model", (), {"family": self.family, "decoder": self, "device": torch.device("cpu")})
        self.store = FeatureStore(model, None, None)  # type: ignore[arg-type]
        self.store._job_patches = max_patches

    def write_cross(self, features: torch.Tensor, pages: tuple[int, ...], attention: Any) -> None:
        self.written.append((int(features[0, 0]), pages))

    def advance(self, works: list[EncodeWork], budget_s: float = 0.0) -> tuple[list[int], dict[int, Exception]]:
        """Keys that ended well, and errors, as the runner tells them."""
        advanced = self.store.advance(works, budget_s)
        errors = dict(advanced.errors)
        errors |= {key: ArithmeticError() for key, is_finite in advanced.ended.items() if not is_finite}
        return [key for key in advanced.ended if key not in errors], errors

    def finish(self, works: list[EncodeWork]) -> tuple[list[int], dict[int, Exception]]:
        """Advance piece by piece until all have ended."""
        left, ended, errors = list(works), [], {}
        for _ in range(100 * len(works)):
            now_ended, now_errors = self.advance(left)
            ended += now_ended
            errors |= now_errors
            left = [work for work in left if work.image.key not in {*now_ended, *now_errors}]
            if not left:
                return ended, errors
        raise AssertionError(f"never ended: {left}")


def work(key: int, pages: tuple[int, ...] = (), **media: Any) -> EncodeWork:
    return EncodeWork(PromptImage(key, 0, SIZE, SIZE, FakeMedia(key, **media)), pages)


def test_waiting_images_share_one_job_and_no_storage() -> None:
    lane = Lane()
    works = [work(key) for key in range(8)]
    assert lane.finish(works) == (list(range(8)), {})
    assert lane.family.jobs == [list(range(8))] and lane.family.num_pieces == 3
    for key in range(8):
        assert (lane.store[key] == key).all() and lane.store[key].untyped_storage().nbytes() == SIZE * 2 * 4
        assert works[key].image.media.num_calls == 1


def test_a_job_takes_as_many_patches_as_pay() -> None:
    lane = Lane(max_patches=10)
    lane.finish([work(1), work(2, num_patches=6), work(3, num_patches=1), work(4, num_patches=99), work(5)])
    assert lane.family.jobs == [[1, 2], [3], [4], [5]]


def test_images_that_come_later_form_the_next_job_and_needed_ones_go_first() -> None:
    lane = Lane()
    first, later = [work(1), work(2)], [work(3), work(4)]
    for _ in range(3):
        lane.advance(first)  # both images' pixels, and a piece
    ended, _ = lane.finish([*later, *first])
    assert lane.family.jobs == [[1, 2], [3, 4]] and ended == [3, 4, 1, 2]


def test_one_piece_for_each_step_that_has_no_time() -> None:
    lane = Lane()
    works = [work(key) for key in range(5)]
    for num_pieces in (0, 0, 0, 0, 0, 1, 2, 3):  # first the pixels, which may have to be decoded again
        assert lane.advance(works) == ([], {}) and lane.family.num_pieces == num_pieces
    assert lane.advance(works)[0] == list(range(5))


def test_what_is_named_again_by_a_step_planned_earlier_is_not_encoded_again() -> None:
    lane = Lane(bad=frozenset({2}))
    works = [work(1, pages=(7,)), work(2), work(3, error=ValueError("cut off"))]
    assert lane.advance(works, 1.0)[0] == [1]
    assert lane.advance(works, 1.0) == ([], {})
    assert len(lane.family.jobs) == 1 and lane.written == [(1, (7,))]
    lane.store.drop([1, 2, 3])
    lane.advance([work(1, pages=(9,))], 1.0)
    assert lane.written == [(1, (7,)), (1, (9,))]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_dropped_image_leaves_its_job_to_the_others(one_by_one: bool) -> None:
    lane = Lane(one_by_one=one_by_one)
    works = [work(key) for key in range(3)]
    for _ in range(4):
        lane.advance(works)
    lane.store.drop([1])
    again = work(1)
    ended, errors = lane.finish([works[0], works[2], again])
    assert sorted(ended) == [0, 1, 2] and not errors
    assert lane.family.jobs == [[0, 1, 2], [1]], "what was begun again has nothing to do with the old job"
    lane.store.drop([0, 1, 2])
    with pytest.raises(KeyError):
        lane.store[1]
    assert not lane.store._jobs and not lane.store._ended


def test_a_job_of_which_all_is_dropped_stops() -> None:
    lane = Lane()
    works = [work(1), work(2)]
    for _ in range(3):
        lane.advance(works)
    lane.store.drop([1, 2])
    assert lane.advance([]) == ([], {}) and not lane.store._jobs and lane.family.num_pieces < 3


def test_a_bad_image_fails_alone() -> None:
    lane = Lane(bad=frozenset({1}))
    error = ValueError("cut off")
    ended, errors = lane.finish([work(0), work(1), work(2, error=error), work(3, pages=(5, 6))])
    assert ended == [0, 3] and errors.keys() == {1, 2} and errors[2] is error
    assert lane.family.jobs == [[0, 1, 3]] and lane.written == [(3, (5, 6))]


def test_images_of_a_job_that_breaks_are_tried_one_by_one() -> None:
    lane = Lane(breaks=frozenset({1}))
    ended, errors = lane.finish([work(0), work(1), work(2)])
    assert ended == [0, 2] and str(errors[1]) == "the tower broke"
    assert lane.family.jobs == [[0, 1, 2], [0], [1], [2]]
    assert lane.finish([work(3), work(4)])[0] == [3, 4] and lane.family.jobs[-1] == [3, 4]


def test_an_encode_without_features_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Lane()
    monkeypatch.setattr(lane.family, "encode", lambda images, attention: iter([None, {}]))
    assert "without features" in str(lane.finish([work(1), work(2)])[1][2])


@given(data=st.data(), max_patches=st.sampled_from([1, 8, 1000]), one_by_one=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_image_ends_exactly_once(data: st.DataObject, max_patches: int, one_by_one: bool) -> None:
    """Arrivals, drops, and budgets of a piece or of all, in any order; a dropped key may come again."""
    draw: Callable[[Any], Any] = data.draw
    keys = st.integers(0, 9)
    bad, breaks, undecodable = (draw(st.frozensets(keys, max_size=2)) for _ in range(3))
    lane = Lane(max_patches, bad=bad, breaks=breaks, one_by_one=one_by_one)
    encoding: dict[int, EncodeWork] = {}
    ready: set[int] = set()
    for _ in range(draw(st.integers(1, 40))):
        match draw(st.sampled_from(["begin", "begin", "drop", "step", "step", "all"])):
            case "begin":
                key = draw(keys)
                if key not in encoding and key not in ready:
                    error = ValueError() if key in undecodable else None
                    encoding[key] = work(key, num_patches=1 + key, error=error)
            case "drop":
                key = draw(keys)
                lane.store.drop([key])
                encoding.pop(key, None)
                ready.discard(key)
            case budget:
                stale = [work(key) for key in ready]  # named by a step that was planned before they ended
                works = sorted([*stale, *encoding.values()], key=lambda work: work.image.key)
                ended, errors = lane.advance(works, 9.0 if budget == "all" else 0.0)
                assert len(set(ended)) == len(ended) and not set(ended) & errors.keys()
                for key in (*ended, *errors):
                    del encoding[key]  # it was begun, and has not ended before
                    assert (key in errors) == (key in bad | breaks | undecodable)
                ready |= set(ended)
                lane.store.drop(list(errors))
                assert budget != "all" or not encoding
    for key in ready:
        assert (lane.store[key] == key).all()
    lane.store.drop(list(range(10)))
    assert not (lane.store._jobs or lane.store._ready or lane.store._ended or lane.store._alone or lane.store._pixels)
