"""Computing things once: a byte-bounded LRU, work in flight that callers share, and counters of how often each helped.

Used by fetch.py (downloads) and by prompt/media.py (records of images, pixels). Knows nothing of what it keeps."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

CounterName = Literal["downloads", "download_hits", "decodes", "decode_hits", "preprocesses", "pixel_hits"]


@dataclass(slots=True)
class MediaCounters:
    """How often each piece of image work was done, and how often a cache or work in flight saved it.

    Read by the metrics at any time; counted through `add`, from any thread."""

    downloads: int = 0  # GETs started, redirects not counted
    download_hits: int = 0
    decodes: int = 0
    decode_hits: int = 0  # an image whose size and content digest were known from its bytes
    preprocesses: int = 0
    pixel_hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, name: CounterName) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + 1)


class ByteLRU(Generic[K, V]):
    """Least recently used entries leave once the sum of `size_of` is over `max_bytes`. Safe to call from any thread.

    `ttl_s`: entries older than this count as absent. A value larger than `max_bytes` is not kept."""

    def __init__(
        self,
        max_bytes: int,
        size_of: Callable[[V], int],
        *,
        ttl_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self._size_of = size_of
        self._ttl_s = ttl_s
        self._clock = clock
        self._entries: OrderedDict[K, tuple[V, int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: K) -> bool:
        """Neither counts nor refreshes."""
        with self._lock:
            return self._fresh(key) is not None

    def get(self, key: K) -> V | None:
        with self._lock:
            entry = self._fresh(key)
            if entry is None:
                self.num_misses += 1
                return None
            self.num_hits += 1
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V) -> None:
        size = self._size_of(value)
        with self._lock:
            self._drop(key)
            if size > self.max_bytes:
                return
            self._entries[key] = (value, size, self._clock())
            self.num_bytes += size
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def _fresh(self, key: K) -> tuple[V, int, float] | None:
        entry = self._entries.get(key)
        if entry is not None and self._ttl_s is not None and self._clock() - entry[2] > self._ttl_s:
            self._drop(key)
            return None
        return entry

    def _drop(self, key: K) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry[1]


@dataclass(slots=True)
class _Flight(Generic[V]):
    task: asyncio.Task[V]
    num_waiters: int = 0


class SharedWork(Generic[K, V]):
    """Simultaneous callers of one key share one task. On one event loop only.

    A caller that is cancelled leaves the others undisturbed; when the last one leaves, the task is cancelled. An
    exception reaches every caller, as the same object: callers wrap it rather than change it."""

    def __init__(self) -> None:
        self._flights: dict[K, _Flight[V]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, key: K) -> bool:
        return key in self._flights

    async def run(self, key: K, make: Callable[[], Coroutine[Any, Any, V]]) -> V:
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(make()))
        flight.num_waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiters -= 1
            if flight.num_waiters == 0:
                # Nobody waits any more. Forgotten before it has ended, so that a newcomer never joins a cancelled task.
                flight.task.cancel()
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def close(self) -> None:
        """Cancel everything in flight and wait until it has ended."""
        tasks = [flight.task for flight in self._flights.values()]
        self._flights.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
