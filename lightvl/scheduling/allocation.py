"""What a sequence holds while it is resident: self pages, a path of the radix cache, a slot, image pins, its claim.

`Allocator` is the one place that takes and gives back; called by admission and by the scheduler. It decides nothing:
who is admitted, who grows and who is preempted is the scheduler's business.

A claim says "this page of the tree is being computed": (node, key of the page after it) -> the allocation that computes
it. Others that miss the same page wait for it instead of computing it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lightvl.scheduling.image_store import ImageEntry, ImageStore
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.radix_cache import PageKey, RadixCache, RadixNode
from lightvl.scheduling.sequence import Sequence, SequenceState

Claim = tuple[RadixNode, PageKey]


@dataclass(slots=True, eq=False)
class Allocation:
    """One residence of a sequence, from admission (or fork) to release. `sequence` changes only when the first choice
    of a request ends in its prefill and a sibling takes over."""

    sequence: Sequence
    node: RadixNode | None = None  # pinned; the first `num_entered` pages are (or equal) its path
    num_entered: int = 0
    enters: bool = True  # False: the tree got these tokens from elsewhere; the rest is entered at release
    prefilling: bool = True  # until a row at the last known token is scheduled
    token_on_device: bool = False  # its last sampled token stands (or will stand) in its slot
    copy_from: int = -1  # a fork's share of the partial last page, until it has a page of its own
    last_step: int = -1  # last step with a row of it
    claim: Claim | None = None
    images: dict[int, ImageEntry] = field(default_factory=dict)  # pinned
    decode_view: tuple[int, ...] | None = None  # cross pages that all generated rows see
    released: bool = False


class Allocator:
    def __init__(
        self, page_size: int, num_slots: int, pages: PagePool, radix: RadixCache | None, images: ImageStore
    ) -> None:
        self.page_size = page_size
        self.pages = pages
        self.radix = radix
        self.images = images
        self.claims: dict[Claim, Allocation] = {}
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._busy_slots: list[tuple[int, int]] = []  # (last step that reads it, slot)
        self._last_completed = -1

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    @property
    def num_obtainable(self) -> int:
        """Pages that can be had without taking any from a sequence, now or when steps in flight have completed."""
        return self.pages.num_free + (self.radix.num_evictable if self.radix is not None else 0)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def admit(self, sequence: Sequence, node: RadixNode | None) -> Allocation:
        """Make a waiting sequence resident on the matched prefix that ends in `node`. There must be a free slot."""
        alloc = Allocation(sequence, node)
        pages: list[int] = []
        if self.radix is not None and node is not None:
            self.radix.pin(node)
            pages = self.radix.path_pages(node)
            self.pages.share(pages)
            alloc.num_entered = node.depth
        self._make_resident(sequence, pages, len(pages) * self.page_size)
        self._claim_next(alloc)
        return alloc

    def fork(self, parent: Allocation, child: Sequence) -> Allocation | None:
        """A choice after the common prefill: shares the prompt's pages, the partial last one until it is copied.
        None without a free slot."""
        if not self._free_slots:
            return None
        prompt_len = len(child.prompt)
        num_full, rest = divmod(prompt_len, self.page_size)
        pages = parent.sequence.pages[:num_full]
        self.pages.share(pages)
        alloc = Allocation(child, parent.node, parent.num_entered, parent.enters, prefilling=False)
        if rest:
            alloc.copy_from = parent.sequence.pages[num_full]
            self.pages.share((alloc.copy_from,))
        if self.radix is not None and alloc.node is not None:
            self.radix.pin(alloc.node)
        for key, entry in parent.images.items():
            self.images.pin(entry)
            alloc.images[key] = entry
        self._make_resident(child, pages, prompt_len)
        child.num_cached = parent.sequence.num_cached
        return alloc

    def take_over(self, alloc: Allocation, heir: Sequence) -> None:
        """The first choice ended in its prefill: a sibling goes on with everything it holds. Rows after the prompt held
        the other's tokens and are computed again."""
        old, alloc.sequence = alloc.sequence, heir
        heir.state, heir.slot, heir.pages = SequenceState.RUNNING, old.slot, old.pages
        heir.num_computed = min(old.num_computed, len(heir.prompt))
        heir.num_scheduled = min(old.num_scheduled, len(heir.prompt))
        heir.num_cached, heir.was_admitted = old.num_cached, True
        old.slot, old.pages = -1, []
        alloc.token_on_device = False

    def obtain(self, num_pages: int) -> bool:
        """Make that many pages ready to be given out, evicting from the radix cache."""
        missing = num_pages - self.pages.num_ready
        while missing > 0 and self.radix is not None and self.radix.evict(missing):
            missing = num_pages - self.pages.num_ready
        return missing <= 0

    def grow(self, alloc: Allocation, num_tokens: int) -> bool:
        """Pages for the first `num_tokens` tokens, all or nothing."""
        owned = alloc.sequence.pages
        missing = self.pages_for(num_tokens) - len(owned)
        if missing <= 0:
            return True
        if not self.obtain(missing):
            return False
        new = self.pages.allocate(missing)
        assert new is not None
        owned.extend(new)
        return True

    def take_copy(self, alloc: Allocation, step_id: int) -> tuple[int, int]:
        """(from, to) of a fork's partial last page, to be done in this step before its rows."""
        source, alloc.copy_from = alloc.copy_from, -1
        self.pages.release((source,), step_id)
        return source, alloc.sequence.pages[len(alloc.sequence.prompt) // self.page_size]

    def enter_computed(self, alloc: Allocation) -> None:
        """Put full pages of computed, committed tokens into the radix cache, and claim the next one."""
        if not alloc.enters or self.radix is None:
            return
        self._enter(alloc, tolerant=False)
        self._claim_next(alloc)

    def release(self, alloc: Allocation) -> None:
        """Give everything back; full committed pages stay in the radix cache. Ends the residence, not the sequence."""
        sequence = alloc.sequence
        if self.radix is not None and alloc.node is not None:
            self._enter(alloc, tolerant=True)
            self.radix.unpin(alloc.node)
        self._drop_claim(alloc)
        self.pages.release(sequence.pages, alloc.last_step)
        if alloc.copy_from >= 0:
            self.pages.release((alloc.copy_from,))
            alloc.copy_from = -1
        for entry in alloc.images.values():
            self.images.unpin(entry, alloc.last_step)
        alloc.images.clear()
        if alloc.last_step > self._last_completed:
            self._busy_slots.append((alloc.last_step, sequence.slot))
        else:
            self._free_slots.append(sequence.slot)
        sequence.pages, sequence.slot = [], -1
        sequence.num_computed = sequence.num_scheduled = 0
        alloc.released = True

    def unpin_passed_images(self, alloc: Allocation) -> None:
        """Let go of the images that neither computed-next nor scheduled rows need."""
        sequence = alloc.sequence
        done, until = sequence.num_computed, max(sequence.num_scheduled, sequence.num_computed + 1)
        needed = {i.key for i in sequence.prompt.images if i.end_row > done and i.first_row < until}
        for key in [key for key in alloc.images if key not in needed]:
            self.images.unpin(alloc.images.pop(key), alloc.last_step)

    def complete_step(self, step_id: int) -> None:
        self._last_completed = step_id
        self.pages.complete_step(step_id)
        self.images.complete_step(step_id)
        if self._busy_slots:
            self._free_slots.extend(slot for step, slot in self._busy_slots if step <= step_id)
            self._busy_slots = [(step, slot) for step, slot in self._busy_slots if step > step_id]

    def check(self, running: list[Allocation]) -> None:
        """All laws, with references, pins, slots and claims counted anew from those who hold them."""
        refs: dict[int, int] = {}
        node_pins: dict[RadixNode, int] = {}
        image_pins: dict[int, int] = {}
        for alloc in running:
            sequence = alloc.sequence
            assert not alloc.released and sequence.state is SequenceState.RUNNING
            assert 0 <= sequence.num_computed <= sequence.num_scheduled
            assert sequence.num_scheduled <= len(sequence.pages) * self.page_size or alloc.copy_from >= 0
            for page in sequence.pages + ([alloc.copy_from] if alloc.copy_from >= 0 else []):
                refs[page] = refs.get(page, 0) + 1
            for key in alloc.images:
                image_pins[key] = image_pins.get(key, 0) + 1
            node = alloc.node
            while node is not None and node.parent is not None:
                node_pins[node] = node_pins.get(node, 0) + 1
                node = node.parent
            in_flight = alloc.last_step > self._last_completed
            assert alloc.claim is None or (self.claims[alloc.claim] is alloc and (alloc.prefilling or in_flight))
        assert all(self.pages.refs(page) == refs.get(page, 0) for page in range(self.pages.num_pages))
        assert all(node.pins == pins for node, pins in node_pins.items())
        assert sum(alloc.claim is not None for alloc in running) == len(self.claims)
        slots = [alloc.sequence.slot for alloc in running] + self._free_slots + [slot for _, slot in self._busy_slots]
        assert sorted(slots) == list(range(self._num_slots)), "a slot is lost or used twice"
        self.pages.check()
        self.images.check(image_pins)
        if self.radix is not None:
            self.radix.check()
            assert sum(pins > 0 for pins in node_pins.values()) + self.radix.num_evictable == self.radix.num_nodes

    def page_key(self, sequence: Sequence, page_idx: int) -> PageKey:
        """Cache keys of a full page of known tokens. Generated tokens count as text, as they will in the next turn."""
        first, last = page_idx * self.page_size, (page_idx + 1) * self.page_size
        prompt_len = len(sequence.prompt)
        key = sequence.prompt.cache_key[first:last]
        if last > prompt_len:
            key = key + sequence.output_ids[max(first - prompt_len, 0) : last - prompt_len]
        assert len(key) == self.page_size
        return tuple(key)

    def _make_resident(self, sequence: Sequence, pages: list[int], num_computed: int) -> None:
        sequence.slot = self._free_slots.pop()
        sequence.state = SequenceState.RUNNING
        sequence.pages = pages
        sequence.num_computed = sequence.num_scheduled = num_computed
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached = min(num_computed, len(sequence.prompt))

    def _enter(self, alloc: Allocation, *, tolerant: bool) -> None:
        """Where the tree has the same tokens in another page already, a resident sequence stops entering (it would pin
        a page that it does not use); at release (`tolerant`) it goes on behind that page."""
        assert self.radix is not None and alloc.node is not None
        sequence = alloc.sequence
        assert sequence.num_computed <= sequence.num_tokens, "a token is not committed"
        num_full = sequence.num_computed // self.page_size
        while alloc.num_entered < num_full:
            key = self.page_key(sequence, alloc.num_entered)
            if not tolerant and key in alloc.node.children:
                alloc.enters = False
                return
            alloc.node = self.radix.extend(alloc.node, key, sequence.pages[alloc.num_entered])
            alloc.num_entered += 1

    def _claim_next(self, alloc: Allocation) -> None:
        self._drop_claim(alloc)
        if alloc.node is None or not alloc.enters:
            return
        if (alloc.num_entered + 1) * self.page_size <= alloc.sequence.num_tokens:
            claim = (alloc.node, self.page_key(alloc.sequence, alloc.num_entered))
            if claim not in self.claims:
                self.claims[claim] = alloc
                alloc.claim = claim

    def _drop_claim(self, alloc: Allocation) -> None:
        if alloc.claim is not None:
            del self.claims[alloc.claim]
            alloc.claim = None
