"""A fake engine and device that drive the scheduler and check every plan against what a device would really see.

The fake model is a hash chain: the K,V of token t is a hash of (K,V of token t - 1, key of token t), and the next token
is a function of the last hash. So a page that is shared, copied, evicted, reused or dropped wrongly changes what is
read, and the device notices at the very row; and every sequence has one right answer, whatever its company.

Steps run when they complete, as late as they can, in order: the device reads lists and slots as late as a real one may.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from lightvl.core import OPEN_END, Prompt, PromptImage, SamplingParams
from lightvl.errors import BadRequest
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.plan import Row, StepOutcome, StepPlan
from lightvl.scheduling.radix_cache import RadixCache
from lightvl.scheduling.scheduler import Scheduler
from lightvl.scheduling.sequence import Sequence, SequenceState

IMAGE_BIT = 1 << 128
STOPS = frozenset(range(0, 1000, 13))  # stop tokens of the random traffic


def mix(state: int, value: int) -> int:
    return (state * 6364136223846793005 + (value % ((1 << 61) - 1)) * 1442695040888963407 + 99991) % ((1 << 61) - 1)


def next_token(state: int, params: SamplingParams, choice: int) -> int:
    return mix(mix(state, params.seed), choice if params.temperature else 0) // 7 % 1000


def answer_alone(prompt: Prompt, params: SamplingParams, choice: int) -> list[int]:
    """The one right answer."""
    state = 0
    for key in prompt.cache_key:
        state = mix(state, key)
    tokens: list[int] = []
    while True:
        token = next_token(state, params, choice)
        tokens.append(token)
        if token in params.stop_token_ids or len(tokens) == params.max_tokens:
            return tokens
        state = mix(state, token)


def make_prompt(pieces: list[list[int] | tuple[int, int]], *, cross: bool) -> Prompt:
    """Pieces are runs of text tokens, or images as (key, size)."""
    keys: list[int] = []
    places: list[tuple[int, int, int]] = []  # key, size, first row
    for piece in pieces:
        if isinstance(piece, list):
            keys += piece
        else:
            key, size = piece
            places.append((key, size, len(keys)))
            keys += [IMAGE_BIT | key] * (1 if cross else size)
    images = []
    for idx, (key, size, first) in enumerate(places):
        end = first + size
        if cross:  # a span lasts until the next image token that does not follow at once
            last = idx
            while last + 1 < len(places) and places[last + 1][2] == places[last][2] + 1:
                last += 1
            end = places[last + 1][2] if last + 1 < len(places) else OPEN_END
        images.append(PromptImage(key, first, end, size, media=None))
    return Prompt(np.zeros(len(keys), dtype=np.int64), keys, tuple(images))


@dataclass(slots=True)
class Config:
    page_size: int = 4
    num_pages: int = 24
    max_running: int = 4
    chunk_tokens: int = 8
    max_steps_in_flight: int = 1
    use_radix: bool = True
    cross: bool = False
    image_units: int = 12
    mix_rows: bool = True
    context_len: int = 1000
    step_budget_s: float = 1.0


@dataclass(slots=True)
class Touch:
    """How far into each page a row of a step in flight reaches."""

    pages: list[int]  # identity: whose page list
    reach: dict[int, int]


@dataclass
class FakeEngine:
    config: Config
    seed: int = 0
    fail_images: frozenset[int] = frozenset()
    num_prefill_tokens: int = 0
    num_steps: int = 0
    num_encoded: dict[int, int] = field(default_factory=dict)
    ended: dict[Sequence, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.config
        self.rng = random.Random(self.seed)
        self.pages = PagePool(c.num_pages)
        self.radix = RadixCache(c.page_size, self.pages) if c.use_radix else None
        self.images = ImageStore(c.image_units, paged=c.cross)
        limits = SchedulerLimits(
            page_size=c.page_size,
            max_running=c.max_running,
            chunk_tokens=c.chunk_tokens,
            context_len=c.context_len,
            step_budget_s=c.step_budget_s,
            encode_budget_s=0.1,
            max_steps_in_flight=c.max_steps_in_flight,
            mix_rows=c.mix_rows,
        )
        self.scheduler = Scheduler(limits, self.pages, self.radix, self.images)
        self.live: list[Sequence] = []
        self.in_flight: deque[StepPlan] = deque()
        self.touches: dict[int, list[Touch]] = {}  # step -> what its rows and copies touch
        self.kv: dict[tuple[int, int], int] = {}
        self.features: dict[int, int] = {}  # key -> pieces of work left; 0: ready
        self.feature_units: dict[int, int] = {}
        self.cross_kv: dict[int, tuple[int, int]] = {}  # page -> (key, tile)
        self.last_token = [-1] * c.max_running
        self.next_id = 0

    # The engine's side

    def submit(self, prompt: Prompt, params: SamplingParams) -> list[Sequence]:
        try:
            self.scheduler.check_fits(prompt, params)
        except BadRequest:
            return []
        sequences = []
        for choice in range(params.n):
            sequences.append(Sequence(self.next_id, prompt, params, choice))
            self.next_id += 1
        self.scheduler.add(sequences)
        self.live += sequences
        return sequences

    def end(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.finish(sequence)
        assert sequence.state is SequenceState.FINISHED and sequence.pages == [] and sequence.slot == -1
        self.live.remove(sequence)
        self.ended[sequence] = reason
        right = answer_alone(sequence.prompt, sequence.params, sequence.choice)
        if reason == "done":
            assert sequence.output_ids == right
        else:
            assert sequence.output_ids == right[: len(sequence.output_ids)]

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        for sequence in self.scheduler.take_exhausted():
            self.end(sequence, "exhausted")
        if plan is not None:
            assert plan.rows or plan.encodes, "an empty step"
            self._check_plan(plan)
            self.in_flight.append(plan)
            assert len(self.in_flight) <= self.config.max_steps_in_flight
        self.scheduler.check()
        return plan

    def complete(self) -> None:
        plan = self.in_flight.popleft()
        for row in plan.rows:
            if row.pages is row.sequence.pages:
                self._check_images(row)
        outcome, tokens = self._run(plan)
        del self.touches[plan.step_id]
        self.num_steps += 1
        self.scheduler.complete(plan, outcome)
        for sequence, token in tokens:
            if sequence.state is SequenceState.FINISHED:
                continue
            self.scheduler.commit_token(sequence, token)
            if token in sequence.params.stop_token_ids or len(sequence.output_ids) == sequence.params.max_tokens:
                self.end(sequence, "done")
        for key in outcome.failed:
            for sequence in self.scheduler.sequences_needing(key):
                assert key in {image.key for image in sequence.prompt.images}
                self.end(sequence, "failed")
        self.scheduler.check()

    def drain(self, max_steps: int = 5000) -> None:
        """Run to the end; fails on a deadlock."""
        until = self.num_steps + max_steps
        while self.live or self.in_flight:
            assert self.num_steps < until, "too many steps"
            num_live = len(self.live)
            if self.launch() is None:
                if self.in_flight:
                    self.complete()
                elif len(self.live) == num_live:  # nobody was exhausted either
                    raise AssertionError(f"deadlock: {[(s.seq_id, s.state, s.num_computed) for s in self.live]}")
            elif self.rng.random() < 0.5 and self.in_flight:
                self.complete()
        assert not self.scheduler.has_work and self.scheduler.num_waiting == self.scheduler.num_running == 0
        self.scheduler.check()
        assert self.pages.num_held == self.pages.num_quarantined == 0

    def check_nothing_lost(self) -> None:
        """After `drain`: empty the radix cache and see every page again."""
        if self.radix is not None:
            self.radix.evict(self.pages.num_pages)
            self.radix.check()
        assert self.pages.num_ready == self.pages.num_pages, "pages were lost"

    # The device's side

    def _check_plan(self, plan: StepPlan) -> None:
        """What must hold when a step is launched beside those in flight."""
        size = self.config.page_size
        touches: list[Touch] = []
        for source, target in plan.page_copies:
            children = [row for row in plan.rows if target in row.pages]
            assert len(children) == 1
            offset = len(children[0].sequence.prompt) % size
            for touch in self._flying():
                assert target not in touch.reach, "a copy's target is in use"
                assert touch.reach.get(source, 0) >= 0
            touches.append(Touch(children[0].pages, {source: offset, target: size}))
        seen: set[int] = set()
        num_chunk_tokens = 0
        for row in plan.rows:
            sequence = row.sequence
            assert sequence.state is SequenceState.RUNNING and row.pages is sequence.pages and row.slot == sequence.slot
            assert id(row.pages) not in seen, "two rows of one sequence"
            seen.add(id(row.pages))
            end = row.start + row.len
            assert row.len > 0 and end <= sequence.max_num_tokens - 1 and end <= len(row.pages) * size
            assert row.num_known == sequence.num_tokens
            if end > row.num_known:
                assert row.len == 1, "only a decode row may read its token from the device"
            if row.start < len(sequence.prompt):
                num_chunk_tokens += row.len
                self.num_prefill_tokens += row.len
            if row.samples:
                assert row.samples[0] is sequence and end >= row.num_known
                assert all(s.state is not SequenceState.FINISHED for s in row.samples)
            reach = {page: min(end - idx * size, size) for idx, page in enumerate(row.pages[: -(-end // size)])}
            for token in range(row.start, end):
                page, offset = row.pages[token // size], token % size
                for touch in self._flying() + touches:
                    if touch.pages is not row.pages:
                        assert touch.reach.get(page, 0) <= offset, f"page {page} is written while another uses it"
            touches.append(Touch(row.pages, reach))
            self._check_images(row)
            for flying in (other for older in self.in_flight for other in older.rows):
                assert (flying.slot == row.slot) == (flying.pages is row.pages), "a slot is used by two sequences"
        flying_works = {work for older in self.in_flight for work in older.encodes}
        for work in set(plan.encodes) - flying_works:
            assert all(other.image.key != work.image.key for other in flying_works), "an encode begins twice at once"
            read = {page for older in self.in_flight for row in older.rows for v in row.cross for page in v.cross_pages}
            written = {page for other in flying_works for page in other.cross_pages}
            assert not (read | written) & set(work.cross_pages), "a cross page in use is given out"
        slots = [row.slot for row in plan.rows]
        assert len(set(slots)) == len(slots)
        assert num_chunk_tokens <= self.config.chunk_tokens
        if not self.config.mix_rows:
            assert not num_chunk_tokens or all(r.start < r.num_known for r in plan.rows)
        self.touches[plan.step_id] = touches

    def _check_images(self, row: Row) -> None:
        needed = [i for i in row.sequence.prompt.images if i.first_row < row.start + row.len and i.end_row > row.start]
        if self.config.cross:
            assert not row.images
        else:
            assert not row.cross and list(row.images) == needed
        for image in needed:
            entry = self.images.get(image.key)
            assert entry is not None and entry.ready and entry.pins > 0, "an image is used unpinned"

    def _flying(self) -> list[Touch]:
        return [touch for plan in self.in_flight for touch in self.touches[plan.step_id]]

    def _run(self, plan: StepPlan) -> tuple[StepOutcome, list[tuple[Sequence, int]]]:
        size = self.config.page_size
        for key in plan.dropped_images:
            self.features.pop(key, None)
        copied = [[self.kv.get((source, offset)) for offset in range(size)] for source, _ in plan.page_copies]
        for (_, target), values in zip(plan.page_copies, copied, strict=True):
            for offset, value in enumerate(values):
                self.kv[target, offset] = -1 if value is None else value
        encoded, failed = self._encode(plan)
        tokens: list[tuple[Sequence, int]] = []
        for row in plan.rows:
            state = self._compute(row)
            for sampled in row.samples:
                token = next_token(state, sampled.params, sampled.choice)
                tokens.append((sampled, token))
                if sampled is row.sequence:
                    self.last_token[row.slot] = token
        rows_s = 0.01 + 0.001 * plan.num_tokens if plan.rows else 0.0
        return StepOutcome(tuple(encoded), tuple(failed), 0.01 * len(encoded), rows_s), tokens

    def _encode(self, plan: StepPlan) -> tuple[list[int], list[int]]:
        encoded: list[int] = []
        failed: list[int] = []
        budget = self.rng.randint(1, 4)
        for work in plan.encodes:
            key = work.image.key
            if self.features.get(key) == 0:
                continue
            left = self.features.setdefault(key, 1 + key % 5)
            done = min(left, budget)
            self.features[key] -= done
            budget -= done
            if self.features[key] == 0:
                if key in self.fail_images:
                    del self.features[key]
                    failed.append(key)
                    continue
                encoded.append(key)
                self.num_encoded[key] = self.num_encoded.get(key, 0) + 1
                self.feature_units[key] = work.image.size
                assert len(work.cross_pages) == (work.image.size if self.config.cross else 0)
                for tile, page in enumerate(work.cross_pages):
                    self.cross_kv[page] = (key, tile)
            if budget == 0:
                break
        ready = sum(self.feature_units[key] for key, left in self.features.items() if left == 0)
        assert self.config.cross or ready <= self.config.image_units, "more features than fit"
        return encoded, failed

    def _compute(self, row: Row) -> int:
        """Read the whole prefix, write the row's K,V. Returns the last hash."""
        size, prompt = self.config.page_size, row.sequence.prompt
        for image in row.images:
            assert self.features.get(image.key) == 0, "features are missing"
        state = 0
        end = row.start + row.len
        for token_idx in range(end):
            where = row.pages[token_idx // size], token_idx % size
            if row.num_known <= token_idx < row.start:  # sampled and written by a step in flight
                state = self.kv[where]
                continue
            if token_idx < len(prompt):
                key = prompt.cache_key[token_idx]
            elif token_idx < row.num_known:
                key = row.sequence.output_ids[token_idx - len(prompt)]
            else:
                key = self.last_token[row.slot]
            state = mix(state, key)
            if token_idx < row.start:
                assert self.kv[where] == state, f"sequence {row.sequence.seq_id} reads a wrong K,V at {token_idx}"
            else:
                self.kv[where] = state
                self._check_view(row, token_idx)
        return state

    def _check_view(self, row: Row, token_idx: int) -> None:
        if not self.config.cross:
            return
        seen = [i for i in row.sequence.prompt.images if i.first_row <= token_idx < i.end_row]
        right = [(image.key, tile) for image in seen for tile in range(image.size)]
        views = [view for view in row.cross if view.first_row <= token_idx < view.end_row]
        assert len(views) <= 1
        assert all(row.start <= v.first_row < v.end_row <= row.start + row.len for v in row.cross)
        assert [self.cross_kv[page] for view in views for page in view.cross_pages] == right, "wrong images are seen"


def random_pieces(rng: random.Random, num_images: int, max_pieces: int = 4) -> list[list[int] | tuple[int, int]]:
    """Prompts from few building blocks, so that prefixes, images and whole prompts are often the same."""
    pieces: list[list[int] | tuple[int, int]] = [[5] * rng.choice([1, 4, 6])] if rng.random() < 0.7 else []
    for _ in range(rng.randint(1, max_pieces)):
        if num_images and rng.random() < 0.5:
            key = rng.randrange(num_images)
            pieces.append((key, 1 + (key * 7 + 3) % 4))
        else:
            base = rng.randrange(3) * 50
            pieces.append([base + i for i in range(rng.choice([1, 2, 3, 7, 8, 13]))])
    return pieces
