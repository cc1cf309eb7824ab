"""ImageStore: room, pins, prefetches that give way, encodes in flight, and cross views against brute force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightvl.core import OPEN_END, PromptImage
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.rows import cross_views, largest_union, overlapping


def image(key: int, size: int = 4, first: int = 0, end: int = OPEN_END) -> PromptImage:
    return PromptImage(key, first, end, size, media=None)


def encode(store: ImageStore, step_id: int, *keys: int, failed: tuple[int, ...] = ()) -> None:
    works = store.launch_encodes(step_id)
    store.complete_encodes(works, keys, failed)
    store.complete_step(step_id)


def test_an_image_is_encoded_once_and_evicted_when_room_is_needed() -> None:
    store = ImageStore(8)
    first = store.reserve(image(1))
    assert first is not None and not first.ready
    store.pin(first)
    encode(store, 0)
    assert [work.image.key for work in store.launch_encodes(1)] == [1]  # goes on until it is ready
    store.complete_encodes((first.work,), (1,), ())
    assert first.ready and store.launch_encodes(2) == ()
    second = store.reserve(image(2))
    assert second is not None and store.reserve(image(3)) is not None  # the encode of 2 is unpinned: it gives way
    assert store.take_dropped() == (2,) and store.get(2) is None
    assert store.reserve(image(4, size=8)) is None  # 1 is pinned
    store.unpin(first, 1)
    assert store.reserve(image(4, size=8)) is not None
    assert set(store.take_dropped()) == {1, 3}
    store.check({})


def test_a_prefetch_takes_only_what_nobody_wants() -> None:
    store = ImageStore(8)
    assert store.prefetch(image(1), {}) and store.prefetch(image(2), {})
    encode(store, 0, 1, 2)
    assert not store.prefetch(image(3), {1: ()})  # 1 is least recently used, and wanted
    assert store.prefetch(image(3), {2: ()})
    assert store.get(1) is None and store.get(2) is not None
    store.check({})


def test_an_encode_in_flight_is_neither_dropped_nor_begun_again() -> None:
    store = ImageStore(8)
    store.prefetch(image(1), {})
    works = store.launch_encodes(0)
    store.drop_encode(1)
    assert store.get(1) is not None
    store.complete_encodes(works, (), ())
    works = store.launch_encodes(1) + store.launch_encodes(2)
    store.complete_encodes(works[:1], (), (1,))  # failed, while step 2 still works on it
    assert store.get(1) is None and store.reserve(image(1)) is None and store.room_is_coming(image(1))
    assert store.take_dropped() == (1,)
    store.complete_encodes(works[1:], (1,), ())  # and it even succeeds there
    assert store.take_dropped() == (1,)
    assert store.reserve(image(1)) is not None
    store.drop_encode(1)
    assert store.get(1) is None and store.take_dropped() == (1,)


def test_cross_pages_wait_for_the_steps_that_read_them() -> None:
    store = ImageStore(4, paged=True)
    entry = store.reserve(image(1))
    assert entry is not None and len(entry.work.cross_pages) == 4
    store.pin(entry)
    encode(store, 0, 1)
    store.unpin(entry, last_step=3)
    assert store.reserve(image(2)) is None and store.room_is_coming(image(2))
    store.complete_step(3)
    assert store.reserve(image(2)) is not None
    store.check({})


@st.composite
def spans(draw: st.DrawFn) -> tuple[PromptImage, ...]:
    firsts = sorted(draw(st.lists(st.integers(0, 20), max_size=5)))
    return tuple(
        image(key, 1 + key % 3, first, draw(st.one_of(st.integers(first + 1, 25), st.just(OPEN_END))))
        for key, first in enumerate(firsts)
    )


@given(spans(), st.integers(0, 20), st.integers(1, 8))
def test_cross_views_against_brute_force(images: tuple[PromptImage, ...], start: int, length: int) -> None:
    def pages_of(key: int) -> tuple[int, ...]:
        return tuple(10 * key + tile for tile in range(1 + key % 3))

    views = cross_views(images, start, start + length, pages_of)
    seen: dict[int, tuple[int, ...]] = {}
    last_end = start
    for view in views:
        assert last_end <= view.first_row < view.end_row <= start + length and view.cross_pages
        last_end = view.end_row
        seen.update((row, view.cross_pages) for row in range(view.first_row, view.end_row))
    for row in range(start, start + length):
        right = tuple(page for i in images if i.first_row <= row < i.end_row for page in pages_of(i.key))
        assert seen.get(row, ()) == right
        assert overlapping(images, row, row + 1) == tuple(i for i in images if i.first_row <= row < i.end_row)
    most = max((sum(i.size for i in images if i.first_row <= row < i.end_row) for row in range(40)), default=0)
    assert largest_union(images) == most
