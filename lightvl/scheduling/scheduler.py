"""Scheduler: admit, choose, preempt. Trace of arrivals in, plans out; no model, no clock, no I/O.

The engine calls it, in this order for each step: `plan`, and when the step has completed `complete`, then
`commit_token` for each sampled token and `finish` for each sequence that ended. `add` and `finish` may come at any
time.

A step: decode rows in arrival order, then admission, then prefill chunks in arrival order within the budget. When pages
or cross pages run out, the latest arrival gives up its own. The oldest sequence can take from all others, so it always
goes on; a step in which nothing could go on preempts the latest arrival until something can.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field

from lightvl.core import Prompt, PromptImage, SamplingParams
from lightvl.scheduling.admission import Admission, WaitingQueue
from lightvl.scheduling.allocation import Allocation, Allocator
from lightvl.scheduling.budget import PrefillBudget, attended_pairs
from lightvl.scheduling.forks import ForkGroups
from lightvl.scheduling.image_demand import ImageDemand
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.limits import SchedulerLimits, check_fits
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.plan import CrossView, Row, StepOutcome, StepPlan
from lightvl.scheduling.radix_cache import RadixCache
from lightvl.scheduling.rows import cross_views, overlapping
from lightvl.scheduling.sequence import Sequence, SequenceState

MIN_CHUNK_SHARE = 3.0  # of the time of decode rows: on a large model prefill must not starve beside its streams
MIN_CHUNK = 16  # tokens of prefill in a step whatever the time budget says, so that prompts always advance
IDLE_ENCODE_FACTOR = 4  # encode budget where no stream waits for the step


@dataclass(slots=True)
class Draft:
    """A plan in the making. Rows of sequences that are preempted before it is done are left out at launch."""

    step_id: int
    rows: list[tuple[Allocation, Row]] = field(default_factory=list)
    num_decodes: int = 0
    starved: bool = False  # someone lacked a page or room for an image
    images_blocked: bool = False  # an older sequence waits for room: younger ones take none
    num_preempted: int = 0


@dataclass(frozen=True, slots=True)
class Launched:
    plan: StepPlan
    allocs: tuple[Allocation, ...]  # one per row
    num_decodes: int


class Scheduler:
    def __init__(self, limits: SchedulerLimits, pages: PagePool, radix: RadixCache | None, images: ImageStore) -> None:
        self.limits = limits
        self.num_preempted = 0  # ever
        self.budget = PrefillBudget()
        self._allocator = Allocator(limits.page_size, limits.max_running, pages, radix, images)
        self._pages = pages
        self._images = images
        self._waiting = WaitingQueue(self._allocator)
        self._running: list[Allocation] = []  # by arrival
        self._alloc_of: dict[Sequence, Allocation] = {}
        self._forks = ForkGroups()
        self._demand = ImageDemand(images, self._waiting, self._forks)
        self._in_flight: deque[Launched] = deque()
        self._exhausted: list[Sequence] = []
        self._next_arrival = 0
        self._next_step = 0
        self._decodes_next = True  # whose turn it is without mix_rows

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._in_flight or len(self._waiting))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Forks that wait for their first sibling's prefill included."""
        return len(self._waiting) + self._forks.num_waiting

    def check_fits(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raises BadRequest where a request could never run, even alone."""
        check_fits(self.limits, self._pages, self._images, prompt, params)

    def add(self, sequences: list[Sequence]) -> None:
        """All choices of one request, in order: the first waits for its turn, the others for its prefill."""
        for sequence in sequences:
            sequence.arrival = self._next_arrival
            self._next_arrival += 1
            self._demand.add(sequence)
        leader, *siblings = sequences
        self._waiting.add(leader)
        self._forks.add(leader, siblings)

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can be launched before a completion, an arrival or an end."""
        if len(self._in_flight) >= self.limits.max_steps_in_flight:
            return None
        draft = self._draft(admit=True)
        plan = self._launch(draft)
        while plan is None and draft.starved and not self._in_flight:
            if len(self._running) == 1:
                alloc = self._running[0]
                if not self._exhausted:
                    self._exhausted.append(alloc.sequence)
                return None
            self._preempt(draft, self._running[-1])
            draft = self._draft(admit=False)  # or the one just preempted would come back at once
            plan = self._launch(draft)
        return plan

    def complete(self, plan: StepPlan, outcome: StepOutcome) -> None:
        """Take in the oldest step in flight."""
        launched = self._in_flight.popleft()
        assert launched.plan is plan, "steps complete in launch order"
        self._allocator.complete_step(plan.step_id)
        self._images.complete_encodes(plan.encodes, outcome.encoded, outcome.failed)
        for key in outcome.failed:
            for alloc in self._running:
                alloc.images.pop(key, None)
        for work in plan.encodes:
            self._demand.drop_if_unneeded(work.image.key)
        num_tokens, num_pairs = 0, 0.0
        for row, alloc in zip(plan.rows, launched.allocs, strict=True):
            if row.len > 1 or row.start < len(row.sequence.prompt):
                num_tokens += row.len
                num_pairs += attended_pairs(row.start, row.len)
            self._complete_row(row, alloc, failed=outcome.rows_failed)
        if not outcome.rows_failed:
            self.budget.record(launched.num_decodes, num_tokens, num_pairs, outcome.rows_s)

    def commit_token(self, sequence: Sequence, token_id: int) -> None:
        sequence.output_ids.append(token_id)

    def finish(self, sequence: Sequence) -> None:
        """The sequence has ended, for whatever reason, in whatever state. Everything it held is free at once, but for
        pages and the slot that a step in flight may touch: these are given out again only after that step."""
        state = sequence.state
        if state is SequenceState.FINISHED:
            return
        sequence.state = SequenceState.FINISHED
        if state is SequenceState.FORKING:
            self._forks.remove(sequence)
        elif state is SequenceState.WAITING:
            self._waiting.remove(sequence)
            if (heir := self._forks.succeed(sequence)) is not None:
                heir.state = SequenceState.WAITING
                self._waiting.add(heir)
        else:
            alloc = self._alloc_of.pop(sequence)
            if (heir := self._forks.succeed(sequence)) is not None:
                self._allocator.take_over(alloc, heir)
                self._alloc_of[heir] = alloc
            else:
                self._running.remove(alloc)
                self._allocator.release(alloc)
        self._demand.remove(sequence)

    def take_exhausted(self) -> list[Sequence]:
        """Sequences that ran alone and found no page to go on: they end with "length". Look here when `plan` gave
        None, and plan again after ending them."""
        exhausted, self._exhausted = self._exhausted, []
        return exhausted

    def sequences_needing(self, image_key: int) -> list[Sequence]:
        """Unfinished sequences with rows to compute that need this image, in arrival order."""
        return self._demand.sequences_needing(image_key)

    def check(self) -> None:
        """All conservation laws and what must hold between the parts."""
        assert [alloc.sequence.arrival for alloc in self._running] == sorted(a.sequence.arrival for a in self._running)
        assert {id(a) for a in self._running} == {id(a) for a in self._alloc_of.values()}
        assert all(self._alloc_of[alloc.sequence] is alloc for alloc in self._running)
        assert all(sequence.state is SequenceState.WAITING and not sequence.pages for sequence in self._waiting)
        self._forks.check()
        if not self.has_work:
            assert self._pages.num_held == 0 and not self._demand and not self._images.num_encoding
        self._allocator.check(self._running)

    def check_idle(self) -> None:
        """The same laws by their counters alone, in constant time: for a server that has nothing to do."""
        assert not self.has_work and not self._demand and not self._images.num_encoding
        for pool in (self._pages, self._images.pages):
            if pool is not None:
                pool.check_counts()
        assert self._pages.num_held == 0, f"{self._pages.num_held} pages are held by nobody"

    # Choosing

    def _draft(self, *, admit: bool) -> Draft:
        draft = Draft(self._next_step)
        chunks_turn = not self.limits.mix_rows and not self._decodes_next
        if not chunks_turn:
            self._draft_decodes(draft)
        if self.limits.mix_rows or not draft.rows:
            self._draft_chunks(draft, admit=admit)
        if chunks_turn and not draft.rows:
            self._draft_decodes(draft)
        if self._demand and not draft.images_blocked:
            self._demand.prefetch(self._running)
        return draft

    def _streams_run(self) -> bool:
        return any(not alloc.prefilling for alloc in self._running)

    def _draft_decodes(self, draft: Draft) -> None:
        for alloc in tuple(self._running):
            if not alloc.prefilling and not alloc.released:
                self._draft_decode(draft, alloc)

    def _draft_decode(self, draft: Draft, alloc: Allocation) -> None:
        sequence = alloc.sequence
        start, num_known = sequence.num_scheduled, sequence.num_tokens
        if start >= sequence.max_num_tokens - 1:
            return  # its last token needs no K,V
        if start >= num_known:
            on_device = alloc.token_on_device and start < num_known + sequence.num_samples_in_flight
            # penalties and grammars are about tokens that the host knows
            if not on_device or sequence.params.needs_commits:
                return
        if start >= len(sequence.pages) * self.limits.page_size and not self._grow(draft, alloc, start + 1):
            return
        cross: tuple[CrossView, ...] = ()
        if self._images.paged and sequence.prompt.images:
            cross = self._decode_views(alloc, start)
        draft.num_decodes += 1
        row = Row(sequence, start, 1, sequence.pages, num_known, sequence.slot, samples=(sequence,), cross=cross)
        draft.rows.append((alloc, row))

    def _decode_views(self, alloc: Allocation, row: int) -> tuple[CrossView, ...]:
        """All generated rows see the same: the images of the prompt's last span."""
        if alloc.decode_view is None:
            seen = overlapping(alloc.sequence.prompt.images, row, row + 1)
            alloc.decode_view = tuple(page for image in seen for page in self._cross_pages(image.key))
        return (CrossView(row, row + 1, alloc.decode_view),) if alloc.decode_view else ()

    def _draft_chunks(self, draft: Draft, *, admit: bool) -> None:
        """Chunks by arrival, of resident sequences and of those that are admitted while there is budget left for them:
        whoever is admitted later finds more in the radix cache."""
        limits = self.limits
        tokens_left, seconds_left = limits.chunk_tokens, float("inf")
        floor = min(max(MIN_CHUNK, limits.page_size), limits.chunk_tokens)  # one chunk at least, whatever it costs
        if self._streams_run():
            if not self.budget.knows_decodes(draft.num_decodes):
                return  # a step without chunks tells
            decode_s = self.budget.decode_s
            seconds_left = max(limits.step_budget_s - decode_s, MIN_CHUNK_SHARE * decode_s)
            if not self.budget.is_known:
                tokens_left = min(tokens_left, 2 * floor)  # one small chunk tells
        prefilling = deque(alloc for alloc in self._running if alloc.prefilling)
        admission = self._waiting.begin(self._running)
        while tokens_left > 0 and (seconds_left > 0.0 or floor):
            alloc = None
            if admit and not draft.num_preempted:
                alloc = self._admit(admission, prefilling[0].sequence.arrival if prefilling else float("inf"))
            if alloc is None:
                if not prefilling:
                    break
                alloc = prefilling.popleft()
            most = tokens_left
            if seconds_left < float("inf"):
                most = min(most, max(self.budget.tokens_within(seconds_left, alloc.sequence.num_scheduled), floor))
            if alloc.released:
                continue
            admission.num_reserved -= self._waiting.pages_to_come(alloc)
            row = self._draft_chunk(draft, alloc, most)
            admission.num_reserved += self._waiting.pages_to_come(alloc)
            if row is not None:
                draft.rows.append((alloc, row))
                tokens_left -= row.len
                seconds_left -= self.budget.seconds(row.start, row.len)
                floor = 0

    def _admit(self, admission: Admission, before: float) -> Allocation | None:
        alloc = self._waiting.admit_next(admission, before, anyone_runs=bool(self._running))
        if alloc is not None:
            insort(self._running, alloc, key=lambda a: a.sequence.arrival)
            self._alloc_of[alloc.sequence] = alloc
        return alloc

    def _draft_chunk(self, draft: Draft, alloc: Allocation, most: int) -> Row | None:
        """At most `most` tokens of a prompt (or of what is computed again after a preemption)."""
        sequence = alloc.sequence
        start, num_known = sequence.num_scheduled, sequence.num_tokens
        end = self._images_until(draft, alloc, start, min(num_known, start + most))
        if end > start:
            end = self._grow_chunk(draft, alloc, start, end)
        if end <= start:
            return None
        samples: tuple[Sequence, ...] = ()
        if end == num_known:
            samples = (sequence, *self._forks.siblings(sequence))
        images = overlapping(sequence.prompt.images, start, end)
        cross: tuple[CrossView, ...] = ()
        if self._images.paged:
            images, cross = (), cross_views(images, start, end, self._cross_pages)
        pages, slot = sequence.pages, sequence.slot
        return Row(sequence, start, end - start, pages, num_known, slot, samples, images, cross)

    # Pages

    def _grow(self, draft: Draft, alloc: Allocation, num_tokens: int) -> bool:
        """Pages up to `num_tokens` tokens, at the cost of later arrivals if need be."""
        allocator = self._allocator
        while not allocator.grow(alloc, num_tokens):
            missing = allocator.pages_for(num_tokens) - len(alloc.sequence.pages)
            youngest = self._running[-1]
            if self._pages.num_free >= missing or youngest is alloc:
                draft.starved = True  # the first case: they come when a step in flight completes
                return False
            self._preempt(draft, youngest)
        return True

    def _grow_chunk(self, draft: Draft, alloc: Allocation, start: int, end: int) -> int:
        """Pages for a chunk, for a part of it where they are scarce. Returns where it ends now."""
        allocator, page_size = self._allocator, self.limits.page_size
        owned = len(alloc.sequence.pages)
        missing = allocator.pages_for(end) - owned
        if missing > 0 and not allocator.obtain(missing):
            end = min(end, max((owned + self._pages.num_ready) * page_size, start + 1))
        return end if self._grow(draft, alloc, end) else start

    def _preempt(self, draft: Draft, alloc: Allocation) -> None:
        """Take a sequence's pages and pins; it comes back in its turn and computes what the cache no longer has."""
        assert alloc is self._running[-1] or alloc in self._running
        sequence = alloc.sequence
        self._running.remove(alloc)
        del self._alloc_of[sequence]
        self._allocator.release(alloc)
        sequence.state = SequenceState.WAITING
        self._waiting.add(sequence)
        draft.num_preempted += 1
        self.num_preempted += 1

    # Images

    def _images_until(self, draft: Draft, alloc: Allocation, start: int, end: int) -> int:
        """Pin the images that rows `start <= row < end` need. Returns the first row that must wait for one."""
        for image in alloc.sequence.prompt.images:
            if image.first_row >= end:
                break
            if image.end_row > start and not self._pin_ready(draft, alloc, image):
                return max(image.first_row, start)
        return end

    def _pin_ready(self, draft: Draft, alloc: Allocation, image: PromptImage) -> bool:
        entry = alloc.images.get(image.key)
        if entry is None:
            if draft.images_blocked:
                return False
            entry = self._images.get(image.key)
            while entry is None and (entry := self._images.reserve(image)) is None:
                if self._images.room_is_coming(image):
                    draft.starved = draft.images_blocked = True
                    return False
                # Pins on features that replace rows last a few steps: wait for them. Pins on cross pages last as long
                # as their sequences.
                victim = self._youngest_with_images(alloc) if self._images.paged else None
                if victim is None:
                    draft.starved = draft.images_blocked = True
                    return False
                self._preempt(draft, victim)
            self._images.pin(entry)
            alloc.images[image.key] = entry
        return entry.ready

    def _youngest_with_images(self, alloc: Allocation) -> Allocation | None:
        """The latest arrival after this one that pins an image."""
        for other in reversed(self._running):
            if other is alloc:
                break
            if other.images:
                return other
        return None

    def _cross_pages(self, image_key: int) -> tuple[int, ...]:
        entry = self._images.get(image_key)
        assert entry is not None and entry.ready and entry.pins
        return entry.work.cross_pages

    # Steps

    def _launch(self, draft: Draft) -> StepPlan | None:
        live = [(alloc, row) for alloc, row in draft.rows if not alloc.released]
        if not live and not self._images.num_encoding:
            return None
        copies = []
        for alloc, row in live:
            alloc.last_step = draft.step_id
            row.sequence.num_scheduled = row.start + row.len
            if alloc.copy_from >= 0:
                copies.append(self._allocator.take_copy(alloc, draft.step_id))
            if row.samples:
                alloc.prefilling, alloc.token_on_device = False, True
                for sequence in row.samples:
                    sequence.num_samples_in_flight += 1
        plan = StepPlan(
            step_id=draft.step_id,
            rows=tuple(row for _, row in live),
            encodes=self._images.launch_encodes(draft.step_id),
            encode_budget_s=self.limits.encode_budget_s * (1 if self._streams_run() else IDLE_ENCODE_FACTOR),
            dropped_images=self._images.take_dropped(),
            page_copies=tuple(copies),
        )
        self._in_flight.append(Launched(plan, tuple(alloc for alloc, _ in live), draft.num_decodes))
        self._next_step += 1
        self._decodes_next = not draft.num_decodes
        return plan

    def _complete_row(self, row: Row, alloc: Allocation, *, failed: bool) -> None:
        for sequence in row.samples:
            sequence.num_samples_in_flight -= 1
        if failed:
            return  # what these rows should have written stays uncounted, so it never enters the radix cache
        sequence, end = alloc.sequence, row.start + row.len
        in_prompt = end <= len(sequence.prompt)
        # After a take-over, rows behind the prompt hold the former owner's tokens: they do not count.
        if not alloc.released and (in_prompt or row.sequence is sequence):
            sequence.num_computed = end
            if in_prompt or row.len > 1 or alloc.claim is not None:
                self._allocator.enter_computed(alloc)
                self._allocator.unpin_passed_images(alloc)
        if len(row.samples) > 1:
            waiting = [sibling for sibling in row.samples if sibling.state is SequenceState.FORKING]
            if waiting:
                self._forks.dissolve(self._forks.leader(waiting[0]))
            for sibling in waiting:
                self._start_fork(alloc, sibling)

    def _start_fork(self, alloc: Allocation, child: Sequence) -> None:
        fork = None if alloc.released else self._allocator.fork(alloc, child)
        if fork is None:  # no pages to share or no slot: it computes the prompt again, its first token is known by then
            child.state = SequenceState.WAITING
            self._waiting.add(child)
        else:
            insort(self._running, fork, key=lambda a: a.sequence.arrival)
            self._alloc_of[child] = fork
