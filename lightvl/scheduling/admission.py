"""WaitingQueue: who becomes resident next, and on which cached prefix.

Owns the order of the waiting sequences (by arrival; a preempted one returns to its place) and what each of them waits
for. Called by the scheduler. First come, first served, but for two kinds that are passed over without holding up those
behind them: one whose next page is being computed by a resident sequence, and one whose last token is still in flight.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

from lightvl.scheduling.allocation import Allocation, Allocator, Claim
from lightvl.scheduling.radix_cache import RadixNode
from lightvl.scheduling.sequence import Sequence

MAX_LOOKED_AT = 2048  # pages of the radix cache looked at in one step's admission: bounds the time that it takes


def by_arrival(sequence: Sequence) -> int:
    return sequence.arrival


@dataclass(frozen=True, slots=True)
class Place:
    """How far a waiting sequence matched when last looked at, and the claim that it waits for."""

    node: RadixNode
    claim: Claim | None


@dataclass(slots=True)
class Admission:
    """How far one step's admission has come."""

    num_reserved: int  # pages that running sequences are sure to ask for; the scheduler keeps it up as they grow
    look_until: int  # value of `num_looked_at` at which it ends
    idx: int = 0  # place in the queue; those before it were passed over


class WaitingQueue:
    def __init__(self, allocator: Allocator) -> None:
        self.num_looked_at = 0  # pages matched or taken over from the radix cache, ever
        self._allocator = allocator
        self._queue: list[Sequence] = []
        self._places: dict[Sequence, Place] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def add(self, sequence: Sequence) -> None:
        insort(self._queue, sequence, key=by_arrival)

    def remove(self, sequence: Sequence) -> None:
        idx = bisect_left(self._queue, sequence.arrival, key=by_arrival)
        assert self._queue[idx] is sequence
        del self._queue[idx]
        self._places.pop(sequence, None)

    def begin(self, running: list[Allocation]) -> Admission:
        """Admission into one step."""
        reserved = sum(map(self.pages_to_come, running)) if self._queue else 0
        return Admission(reserved, self.num_looked_at + MAX_LOOKED_AT)

    def admit_next(self, admission: Admission, before: float, *, anyone_runs: bool) -> Allocation | None:
        """Make the next in line resident, if it arrived before `before`, has a slot, and has room for all its known
        tokens beside what the running ones still need. The first in line needs no room when nobody runs."""
        allocator = self._allocator
        while admission.idx < len(self._queue) and allocator.has_slot and self.num_looked_at < admission.look_until:
            sequence = self._queue[admission.idx]
            if sequence.arrival >= before:
                return None
            place = self._look_up(sequence) if not sequence.num_samples_in_flight else None
            if sequence.num_samples_in_flight or (place is not None and place.claim is not None):
                admission.idx += 1
                continue
            node = place.node if place is not None else None
            if anyone_runs and not self._has_room(sequence, node, admission.num_reserved):
                admission.idx = len(self._queue)  # those behind it do not overtake it
                return None
            del self._queue[admission.idx]
            self._places.pop(sequence, None)
            alloc = allocator.admit(sequence, node)
            self.num_looked_at += alloc.num_entered
            admission.num_reserved += self.pages_to_come(alloc)
            return alloc
        return None

    def num_matched(self, sequence: Sequence) -> int:
        """Tokens of a waiting sequence that the radix cache holds now."""
        place = self._look_up(sequence)
        return place.node.depth * self._allocator.page_size if place is not None else 0

    def _has_room(self, sequence: Sequence, node: RadixNode | None, reserved: int) -> bool:
        allocator = self._allocator
        needed = allocator.pages_for(sequence.num_tokens + 1)
        available = allocator.num_obtainable - reserved
        if allocator.radix is not None and node is not None:
            needed -= node.depth
            available -= allocator.radix.count_unpinned(node)
        return needed <= available

    def pages_to_come(self, alloc: Allocation) -> int:
        """Pages that a running sequence is sure to ask for: the rest of its known tokens, and one to go on."""
        missing = self._allocator.pages_for(alloc.sequence.num_tokens + 1) - len(alloc.sequence.pages)
        return max(missing, 1)

    def _look_up(self, sequence: Sequence) -> Place | None:
        """Match again from where the last look ended; cheap while what it waits for is still being computed. None
        without a radix cache."""
        allocator = self._allocator
        radix = allocator.radix
        if radix is None:
            return None
        place = self._places.get(sequence)
        if place is not None and place.claim is not None and place.claim in allocator.claims:
            return place
        # The last known token is always computed again: its logits are wanted.
        max_tokens = sequence.num_tokens - 1
        keys = sequence.prompt.cache_key
        if sequence.output_ids:
            keys = keys + sequence.output_ids
        node = radix.match(keys, max_tokens, place.node if place is not None else None)
        claim: Claim | None = None
        if (node.depth + 1) * allocator.page_size <= max_tokens:
            claim = (node, allocator.page_key(sequence, node.depth))
        self.num_looked_at += node.depth - (place.node.depth if place is not None and place.node.is_in_tree else 0)
        place = Place(node, claim if claim in allocator.claims else None)
        self._places[sequence] = place
        return place
