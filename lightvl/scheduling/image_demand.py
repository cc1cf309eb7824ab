"""ImageDemand: which unfinished sequences want which image. It begins encodes ahead of need and drops those that nobody
needs any more. Called by the scheduler; what a chunk needs right now is pinned there, not here."""

from __future__ import annotations

from lightvl.scheduling.admission import WaitingQueue
from lightvl.scheduling.allocation import Allocation
from lightvl.scheduling.forks import ForkGroups
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.sequence import Sequence, SequenceState

MAX_PREFETCHED = 16  # encodes under way before none is begun ahead of need, and waiting sequences looked at for them


class ImageDemand:
    def __init__(self, images: ImageStore, waiting: WaitingQueue, forks: ForkGroups) -> None:
        self._images = images
        self._waiting = waiting
        self._forks = forks
        self._wanted_by: dict[int, dict[Sequence, None]] = {}  # image key -> unfinished sequences with it

    def __bool__(self) -> bool:
        return bool(self._wanted_by)

    def add(self, sequence: Sequence) -> None:
        for image in sequence.prompt.images:
            self._wanted_by.setdefault(image.key, {})[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended. Encodes that only it needed are dropped."""
        for key in {image.key for image in sequence.prompt.images}:
            wanted = self._wanted_by[key]
            del wanted[sequence]
            if not wanted:
                del self._wanted_by[key]
            self.drop_if_unneeded(key)

    def drop_if_unneeded(self, image_key: int) -> None:
        if self._images.is_encoding(image_key) and not self.sequences_needing(image_key):
            self._images.drop_encode(image_key)

    def sequences_needing(self, image_key: int) -> list[Sequence]:
        """Those with rows to compute that need this image, in arrival order."""
        needing = [s for s in self._wanted_by.get(image_key, ()) if self._still_needs(s, image_key)]
        return sorted(needing, key=lambda sequence: sequence.arrival)

    def prefetch(self, running: list[Allocation]) -> None:
        """Begin encodes that running and next waiting sequences will need, while there is room to spare."""
        for alloc in running:
            if alloc.prefilling and not self._prefetch_for(alloc.sequence, alloc.sequence.num_scheduled):
                return
        for _, sequence in zip(range(MAX_PREFETCHED), self._waiting, strict=False):
            if not sequence.prompt.images:
                continue
            if not self._prefetch_for(sequence, self._waiting.num_matched(sequence)):
                return

    def _prefetch_for(self, sequence: Sequence, start: int) -> bool:
        """False where no more should be begun for anyone."""
        for image in sequence.prompt.images:
            if image.end_row <= start or self._images.get(image.key) is not None:
                continue
            if self._images.num_encoding >= MAX_PREFETCHED or not self._images.prefetch(image, self._wanted_by):
                return False
        return True

    def _still_needs(self, sequence: Sequence, image_key: int) -> bool:
        source = self._forks.leader(sequence)
        resident = source.state is SequenceState.RUNNING
        start = source.num_computed if resident else self._waiting.num_matched(source)
        return any(image.key == image_key and image.end_row > start for image in sequence.prompt.images)
