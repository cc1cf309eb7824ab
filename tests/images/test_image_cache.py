from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightvl.images.cache import ByteLRU, MediaCounters, SharedWork


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 12)), max_size=60))
def test_lru_is_bounded_and_keeps_the_latest(puts: list[tuple[int, int]]) -> None:
    cache: ByteLRU[int, bytes] = ByteLRU(20, len)
    order: list[int] = []  # the law, written the slow way
    sizes: dict[int, int] = {}
    for key, size in puts:
        cache.put(key, bytes(size))
        order = [*(k for k in order if k != key), key]
        sizes[key] = size
        while sum(sizes[k] for k in order) > 20:
            order.pop(0)
        assert cache.num_bytes == sum(sizes[k] for k in order) <= 20
        assert [k for k in range(7) if k in cache] == sorted(order)


def test_lru_reads_refresh_and_count() -> None:
    cache: ByteLRU[str, bytes] = ByteLRU(3, len)
    for key in "abc":
        cache.put(key, b"x")
    assert cache.get("a") == b"x"
    cache.put("d", b"x")
    assert cache.get("b") is None and cache.get("a") == b"x"
    assert (cache.num_hits, cache.num_misses) == (2, 1)
    cache.put("huge", b"xxxx")
    assert "huge" not in cache and len(cache) == 3


def test_lru_entries_grow_old() -> None:
    now = [0.0]
    cache: ByteLRU[str, bytes] = ByteLRU(10, len, ttl_s=5, clock=lambda: now[0])
    cache.put("a", b"12")
    now[0] = 5.0
    assert cache.get("a") == b"12"
    now[0] = 5.1
    assert cache.get("a") is None and cache.num_bytes == 0


async def test_shared_work_runs_once_and_survives_a_cancelled_caller() -> None:
    work: SharedWork[str, int] = SharedWork()
    started, go = 0, asyncio.Event()

    async def make() -> int:
        nonlocal started
        started += 1
        await go.wait()
        return 7

    callers = [asyncio.create_task(work.run("k", make)) for _ in range(4)]
    await asyncio.sleep(0)
    callers[0].cancel()  # the one that started it
    await asyncio.sleep(0)
    go.set()
    results = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [7, 7, 7] and started == 1 and len(work) == 0


async def test_shared_work_ends_when_nobody_waits_and_starts_anew() -> None:
    work: SharedWork[str, int] = SharedWork()
    ended: list[str] = []

    async def make() -> int:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("cancelled")
        return 0

    async def quick() -> int:
        return 1

    caller = asyncio.create_task(work.run("k", make))
    await asyncio.sleep(0.01)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert await work.run("k", quick) == 1
    assert ended == ["cancelled"]


async def test_shared_work_passes_errors_on() -> None:
    work: SharedWork[str, int] = SharedWork()

    async def fail() -> int:
        await asyncio.sleep(0)
        raise ValueError("no")

    results = await asyncio.gather(*(work.run("k", fail) for _ in range(3)), return_exceptions=True)
    assert [str(result) for result in results] == ["no"] * 3 and len(work) == 0


def test_counters() -> None:
    counters = MediaCounters()
    counters.add("downloads")
    counters.add("downloads")
    assert counters == MediaCounters(downloads=2)
