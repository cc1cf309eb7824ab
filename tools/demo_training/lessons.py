"""What one training step takes, made ahead of time by worker processes."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset

from .guide import Guidance, Guide
from .samples import OTHER_KINDS, TEXT_KINDS, Batch, Writer, make_batch
from .sight import make_views
from .views import ImageGroup, OnDevice

FIRST_STEPS = 300  # one image and several questions only, for so many steps


@dataclass(frozen=True)
class Lesson(OnDevice):
    """Conversations with what they should look at, and pictures of which only the tokens are named."""

    batches: list[Batch]
    guidance: list[Guidance]  # of each batch
    views: list[ImageGroup]


@dataclass(frozen=True)
class Teacher:
    """Makes the lesson of any step, always the same: it depends on the seed, the step and which part of a team learns.
    All parts have batches of the same kinds, which take about as long."""

    writer: Writer
    guide: Guide
    seed: int
    part: int = 0

    @property
    def _own_seed(self) -> str:
        return f"{self.seed}.{self.part}" if self.part else str(self.seed)

    def sight(self, num_views: int, step: int) -> Lesson:
        return Lesson([], [], [make_views(self.writer, self._own_seed, step, num_views)])

    def answers(self, num_rows: int, num_views: int, first_step: int, step: int) -> Lesson:
        """A batch of images with several questions each; after the first steps two more, one of them without images."""
        kinds = ["branches"]
        if step >= first_step + FIRST_STEPS:
            rng = random.Random(f"kind {self.seed} {step}")
            for shares in (OTHER_KINDS, TEXT_KINDS):
                kinds += rng.choices(tuple(shares), tuple(shares.values()))
        batches = [make_batch(self.writer, kind, self._own_seed, step, num_rows) for kind in kinds]
        guidance = [self.guide.guidance(batch) for batch in batches]
        views = [make_views(self.writer, self._own_seed, step, num_views)] if num_views else []
        # looks are thousands of small objects, and the guidance holds all that they tell
        return Lesson([replace(batch, looks=[]) for batch in batches], guidance, views)


class _Steps(Dataset):
    def __init__(self, make: Callable[[int], Lesson]) -> None:
        self._make = make

    def __getitem__(self, step: int) -> Lesson:
        return self._make(step)


def in_order(make: Callable[[int], Lesson], first_step: int, num_workers: int, pin_memory: bool) -> Iterator[Lesson]:
    """What `make` gives for `first_step` and all steps after it; made ahead of time where there are workers."""
    steps = range(first_step, first_step + 2**31)
    return iter(
        DataLoader(_Steps(make), batch_size=None, sampler=steps, num_workers=num_workers, pin_memory=pin_memory)
    )
