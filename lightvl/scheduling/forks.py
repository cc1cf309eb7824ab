"""ForkGroups: the choices of a request that wait for their first sibling's prefill. Called by the scheduler; it knows
who waits for whom, and nothing of pages or steps."""

from __future__ import annotations

from lightvl.scheduling.sequence import Sequence, SequenceState


class ForkGroups:
    def __init__(self) -> None:
        self._siblings: dict[Sequence, list[Sequence]] = {}  # leader -> those that wait, in choice order
        self._leader_of: dict[Sequence, Sequence] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._leader_of)

    def add(self, leader: Sequence, siblings: list[Sequence]) -> None:
        if not siblings:
            return
        self._siblings[leader] = siblings
        for sibling in siblings:
            sibling.state = SequenceState.FORKING
            self._leader_of[sibling] = leader

    def siblings(self, leader: Sequence) -> tuple[Sequence, ...]:
        return tuple(self._siblings.get(leader, ()))

    def leader(self, sequence: Sequence) -> Sequence:
        """Whose prefill this sequence waits for; itself if for nobody's."""
        return self._leader_of.get(sequence, sequence)

    def remove(self, sibling: Sequence) -> None:
        leader = self._leader_of.pop(sibling)
        self._siblings[leader].remove(sibling)
        if not self._siblings[leader]:
            del self._siblings[leader]

    def dissolve(self, leader: Sequence) -> list[Sequence]:
        """The prefill is done: nobody waits any more. Returns those who did."""
        siblings = self._siblings.pop(leader, [])
        for sibling in siblings:
            del self._leader_of[sibling]
        return siblings

    def succeed(self, leader: Sequence) -> Sequence | None:
        """The leader ended before its prefill did: the next sibling leads the others. Returns it."""
        siblings = self.dissolve(leader)
        if not siblings:
            return None
        heir, *rest = siblings
        self.add(heir, rest)
        return heir

    def check(self) -> None:
        assert all(s.state is SequenceState.FORKING and not s.pages for s in self._leader_of)
        assert all(self._leader_of[s] is leader for leader, siblings in self._siblings.items() for s in siblings)
        assert sum(map(len, self._siblings.values())) == len(self._leader_of)
