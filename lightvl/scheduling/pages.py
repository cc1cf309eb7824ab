"""PagePool: who holds each page of a K,V store. One pool for self pages, one for cross pages.

Owns the counts and nothing of the content: it knows neither sequences nor keys. Called by allocation, by the radix
cache and by the image store. A page is in exactly one state, hence the law `free + held + cached = total`:

    free    nobody refers to it (it may still be quarantined: a step in flight may touch it, so it is not given out yet)
    held    at least one sequence (or image) refers to it, whether it is in the radix cache or not
    cached  only the radix cache refers to it
"""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_held = 0
        self.num_cached = 0
        self.num_quarantined = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages
        self._in_cache = bytearray(num_pages)
        self._busy_until = [-1] * num_pages  # last step that may still touch the page
        self._quarantine: dict[int, list[int]] = {}  # step -> pages that become free when it has completed
        self._last_completed = -1

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_quarantined

    @property
    def num_ready(self) -> int:
        """Free pages that can be given out now."""
        return len(self._free)

    def allocate(self, num_pages: int) -> list[int] | None:
        """All or nothing: that many pages with one reference each, or None."""
        if num_pages > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._refs[page] = 1
        self.num_held += num_pages
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page, which must be held or cached."""
        refs = self._refs
        for page in pages:
            if refs[page] == 0:
                assert self._in_cache[page], f"page {page} is free"
                self.num_cached -= 1
                self.num_held += 1
            refs[page] += 1

    def release(self, pages: Iterable[int], last_step: int = -1) -> None:
        """One reference less to each. Steps up to `last_step` may touch them: not given out before it completes."""
        refs = self._refs
        in_flight = last_step > self._last_completed
        for page in pages:
            assert refs[page] > 0, f"page {page} is not held"
            if in_flight and self._busy_until[page] < last_step:
                self._busy_until[page] = last_step
            refs[page] -= 1
            if refs[page] == 0:
                self.num_held -= 1
                if self._in_cache[page]:
                    self.num_cached += 1
                else:
                    self._set_free(page)

    def enter_cache(self, page: int) -> None:
        """The radix cache now refers to this held page."""
        assert self._refs[page] > 0 and not self._in_cache[page]
        self._in_cache[page] = 1

    def leave_cache(self, page: int) -> None:
        """The radix cache has forgotten this page; free unless it is held."""
        assert self._in_cache[page]
        self._in_cache[page] = 0
        if self._refs[page] == 0:
            self.num_cached -= 1
            self._set_free(page)

    def complete_step(self, step_id: int) -> None:
        """Steps up to this one touch no page any more."""
        self._last_completed = step_id
        for step in [step for step in self._quarantine if step <= step_id]:
            pages = self._quarantine.pop(step)
            self.num_quarantined -= len(pages)
            self._free.extend(pages)

    def refs(self, page: int) -> int:
        return self._refs[page]

    def is_in_cache(self, page: int) -> bool:
        return bool(self._in_cache[page])

    def check(self) -> None:
        """The law, against a full recount."""
        quarantined = [page for pages in self._quarantine.values() for page in pages]
        free = self._free + quarantined
        held = sum(1 for refs in self._refs if refs)
        cached = sum(1 for page, refs in enumerate(self._refs) if refs == 0 and self._in_cache[page])
        assert len(set(free)) == len(free) == self.num_free, "a page is free twice"
        assert all(self._refs[page] == 0 and not self._in_cache[page] for page in free), "a free page is in use"
        assert (held, cached, len(quarantined)) == (self.num_held, self.num_cached, self.num_quarantined)
        self.check_counts()

    def check_counts(self) -> None:
        """The law, in constant time."""
        assert self.num_free + self.num_held + self.num_cached == self.num_pages, (
            f"{self.num_free} free + {self.num_held} held + {self.num_cached} cached != {self.num_pages}"
        )

    def _set_free(self, page: int) -> None:
        until = self._busy_until[page]
        if until > self._last_completed:
            self._quarantine.setdefault(until, []).append(page)
            self.num_quarantined += 1
        else:
            self._free.append(page)
