"""PagePool: the law under random use, all-or-nothing, quarantine."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightvl.scheduling.pages import PagePool

OPERATIONS = ["alloc", "share", "release", "cache", "uncache", "step"]


def test_allocate_is_all_or_nothing() -> None:
    pool = PagePool(3)
    assert pool.allocate(4) is None
    pages = pool.allocate(3)
    assert pages is not None and sorted(pages) == [0, 1, 2]
    assert pool.allocate(1) is None and pool.allocate(0) == []
    pool.release(pages[:2])
    assert (pool.num_free, pool.num_held) == (2, 1)
    pool.check()


def test_a_shared_page_is_free_after_its_last_release() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 1
    with pytest.raises(AssertionError):
        pool.release(pages)
    with pytest.raises(AssertionError):
        pool.share(pages)


def test_a_page_that_a_step_may_touch_waits_for_it() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages, last_step=4)
    assert pool.num_free == 1 and pool.num_ready == 0 and pool.allocate(1) is None
    pool.complete_step(3)
    assert pool.allocate(1) is None
    pool.complete_step(4)
    assert pool.allocate(1) == pages


def test_a_cached_page_remembers_the_step_that_may_touch_it() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    assert pages is not None
    pool.enter_cache(pages[0])
    pool.release(pages, last_step=2)
    assert pool.num_cached == 1
    pool.leave_cache(pages[0])
    assert pool.num_free == 1 and pool.num_ready == 0
    pool.complete_step(2)
    assert pool.num_ready == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9))))
def test_the_law_holds(operations: list[tuple[str, int]]) -> None:
    pool, step = PagePool(8), 0
    held: list[int] = []
    cached: list[int] = []
    for name, number in operations:
        if name == "alloc":
            held += pool.allocate(number % 4) or []
        elif name == "share" and held + cached:
            page = (held + cached)[number % len(held + cached)]
            pool.share([page])
            held.append(page)
        elif name == "release" and held:
            pool.release([held.pop(number % len(held))], last_step=step + number % 3)
        elif name == "cache" and held and held[number % len(held)] not in cached:
            pool.enter_cache(held[number % len(held)])
            cached.append(held[number % len(held)])
        elif name == "uncache" and cached:
            pool.leave_cache(cached.pop(number % len(cached)))
        elif name == "step":
            pool.complete_step(step)
            step += 1
        pool.check()
        assert pool.num_held == len(set(held)) and pool.num_cached == len(set(cached) - set(held))
        assert not set(pool.allocate(0) or []) & set(held + cached)
