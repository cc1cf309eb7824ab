"""ImageStore: which images' features exist on the device: absent, being encoded, or ready.

Owns the room for them. A unit is one feature row where features replace prompt rows, one cross page where they are
attended to (`paged`: then the page ids come from a pool of its own, with its law). Called by the scheduler; knows image
keys, sizes and pins, but neither sequences nor pixels.

A pin keeps an image's features (or its encode) until it is let go. Ready and unpinned images are a cache, least
recently used first out. An encode that nobody pins is a prefetch: it goes on while there is room, and gives way
to need.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass

from lightvl.core import PromptImage
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.plan import EncodeWork


@dataclass(slots=True, eq=False)
class ImageEntry:
    work: EncodeWork
    ready: bool = False
    pins: int = 0
    last_step: int = -1  # last step that may touch its cross pages

    @property
    def key(self) -> int:
        return self.work.image.key

    @property
    def size(self) -> int:
        return self.work.image.size


class ImageStore:
    def __init__(self, capacity: int, *, paged: bool = False) -> None:
        """`capacity` in units; 0 for a model without images."""
        self.capacity = capacity
        self.pages = PagePool(capacity) if paged else None  # cross pages
        self.num_used = 0  # units
        self.num_encoded = 0  # images that became ready, ever
        self._entries: dict[int, ImageEntry] = {}
        self._encoding: dict[int, ImageEntry] = {}  # in the order in which they were reserved
        self._unpinned: OrderedDict[int, ImageEntry] = OrderedDict()  # ready ones, least recently used first
        self._in_flight: dict[int, int] = {}  # key -> steps in flight that go on with its encode
        self._dropped: list[int] = []

    @property
    def paged(self) -> bool:
        return self.pages is not None

    @property
    def num_encoding(self) -> int:
        return len(self._encoding)

    def get(self, key: int) -> ImageEntry | None:
        return self._entries.get(key)

    def is_encoding(self, key: int) -> bool:
        return key in self._encoding

    def reserve(self, image: PromptImage) -> ImageEntry | None:
        """Begin the encode of an absent image that a running sequence needs, at the cost of unpinned ones if there is
        no room. None: the pinned ones leave no room, or a step in flight must complete first (`room_is_coming`)."""
        assert image.key not in self._entries
        if image.key in self._in_flight:
            return None  # a forgotten encode of it may still end in a step in flight
        while self._num_ready_units() < image.size:
            if self._unpinned:
                _, entry = self._unpinned.popitem(last=False)
            else:
                idle = [e for e in self._encoding.values() if not e.pins and e.key not in self._in_flight]
                if not idle:
                    return None
                entry = idle[-1]
            self._forget(entry)
        return self._add(image)

    def prefetch(self, image: PromptImage, wanted: Container[int]) -> bool:
        """Begin an encode that a later chunk will need, where that costs nothing: free room, or the room of ready
        images that are least recently used and not among the `wanted` keys."""
        if image.key in self._entries:
            return True
        if image.key in self._in_flight:
            return False
        while self._num_ready_units() < image.size:
            entry = next(iter(self._unpinned.values()), None)
            if entry is None or entry.key in wanted:
                return False
            del self._unpinned[entry.key]
            self._forget(entry)
        self._add(image)
        return True

    def room_is_coming(self, image: PromptImage) -> bool:
        """After a failed `reserve`: completing the steps in flight makes room, nobody need give up a pin."""
        if image.key in self._in_flight:
            return True
        coming = self._num_ready_units() + (self.pages.num_quarantined if self.pages else 0)
        coming += sum(e.size for e in self._encoding.values() if not e.pins and e.key in self._in_flight)
        return coming >= image.size

    def pin(self, entry: ImageEntry) -> None:
        if entry.pins == 0 and entry.ready:
            del self._unpinned[entry.key]
        entry.pins += 1

    def unpin(self, entry: ImageEntry, last_step: int) -> None:
        """Steps up to `last_step` may still read it."""
        assert entry.pins > 0
        entry.pins -= 1
        entry.last_step = max(entry.last_step, last_step)
        if entry.pins == 0 and entry.ready and self._entries.get(entry.key) is entry:
            self._unpinned[entry.key] = entry

    def drop_encode(self, key: int) -> None:
        """Nobody needs this encode any more. Does nothing while a step in flight works on it."""
        entry = self._encoding.get(key)
        if entry is not None and entry.pins == 0 and key not in self._in_flight:
            self._forget(entry)

    def launch_encodes(self, step_id: int) -> tuple[EncodeWork, ...]:
        """The encodes that this step should go on with: needed ones before prefetched ones."""
        if not self._encoding:
            return ()
        entries = sorted(self._encoding.values(), key=lambda entry: entry.pins == 0)
        for entry in entries:
            entry.last_step = step_id
            self._in_flight[entry.key] = self._in_flight.get(entry.key, 0) + 1
        return tuple(entry.work for entry in entries)

    def complete_encodes(self, works: Iterable[EncodeWork], encoded: Iterable[int], failed: Iterable[int]) -> None:
        for work in works:
            key = work.image.key
            self._in_flight[key] -= 1
            if not self._in_flight[key]:
                del self._in_flight[key]
        for key in encoded:
            entry = self._encoding.pop(key, None)
            if entry is not None:
                self.num_encoded += 1
                entry.ready = True
                if entry.pins == 0:
                    self._unpinned[key] = entry
            elif key not in self._entries:
                self._dropped.append(key)  # forgotten while this step was in flight
        for key in failed:
            entry = self._encoding.get(key)
            if entry is not None:
                self._forget(entry)

    def take_dropped(self) -> tuple[int, ...]:
        dropped, self._dropped = tuple(dict.fromkeys(self._dropped)), []
        return dropped

    def complete_step(self, step_id: int) -> None:
        if self.pages is not None:
            self.pages.complete_step(step_id)

    def check(self, pins: dict[int, int]) -> None:
        """`pins`: how many sequences pin each key, counted by the caller."""
        assert self.num_used == sum(entry.size for entry in self._entries.values()) <= self.capacity
        for key, entry in self._entries.items():
            assert entry.key == key and entry.pins == pins.get(key, 0), f"pins of image {key:x} are wrong"
            assert entry.ready != (key in self._encoding)
            assert (entry.ready and entry.pins == 0) == (key in self._unpinned)
        assert pins.keys() <= self._entries.keys(), "a pinned image is gone"
        assert self._encoding.keys() <= self._entries.keys() and self._unpinned.keys() <= self._entries.keys()
        if self.pages is not None:
            self.pages.check()
            assert self.pages.num_held == self.num_used

    def _num_ready_units(self) -> int:
        return self.pages.num_ready if self.pages is not None else self.capacity - self.num_used

    def _add(self, image: PromptImage) -> ImageEntry:
        pages: list[int] | None = []
        if self.pages is not None:
            pages = self.pages.allocate(image.size)
        assert pages is not None
        entry = ImageEntry(EncodeWork(image, tuple(pages)))
        self._entries[image.key] = self._encoding[image.key] = entry
        self.num_used += image.size
        return entry

    def _forget(self, entry: ImageEntry) -> None:
        del self._entries[entry.key]
        self._encoding.pop(entry.key, None)
        self.num_used -= entry.size
        if self.pages is not None:
            self.pages.release(entry.work.cross_pages, entry.last_step)
        self._dropped.append(entry.key)
