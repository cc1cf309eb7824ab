"""One decoding stream and its place in the schedule. Owned by the scheduler; the engine appends sampled tokens."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from lightvl.core import Matcher, Prompt, SamplingParams


class SequenceState(enum.Enum):
    WAITING = "waiting"  # queued, or preempted: holds no pages
    RUNNING = "running"
    FORKING = "forking"  # a choice that waits for its first sibling's prefill
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Scheduled is not committed: `num_scheduled` rows have their K,V written by completed steps or steps in flight,
    the first `num_computed` of them by completed ones."""

    seq_id: int
    prompt: Prompt
    params: SamplingParams
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)  # committed tokens, append-only
    state: SequenceState = SequenceState.WAITING
    slot: int = -1  # row of the device's last-token table while running
    pages: list[int] = field(default_factory=list)  # append-only; a release replaces the list
    num_computed: int = 0
    num_scheduled: int = 0
    num_samples_in_flight: int = 0
    num_cached: int = 0  # prompt tokens found in the radix cache when first admitted, for usage
    arrival: int = -1  # order among all sequences, set by the scheduler
    was_admitted: bool = False
    matcher: Matcher | None = field(init=False)  # of `params.grammar`; has been told `output_ids`

    def __post_init__(self) -> None:
        grammar = self.params.grammar
        self.matcher = None if grammar is None else grammar.start()

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host."""
        return len(self.prompt) + len(self.output_ids)

    @property
    def max_num_tokens(self) -> int:
        return len(self.prompt) + self.params.max_tokens
