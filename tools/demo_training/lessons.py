"""What one training step takes, made ahead of time by worker processes."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch.utils.data import DataLoader, Dataset

from .guide import Guide, Target
from .samples import OTHER_KINDS, Batch, Writer, make_batch
from .sight import make_views
from .views import ImageGroup, OnDevice

FIRST_STEPS = 300  # one image and several questions only, for so many steps


@dataclass(frozen=True)
class Lesson(OnDevice):
    """Conversations with what they should look at, and pictures of which only the tokens are named."""

    batches: list[Batch]
    targets: list[dict[int, Target]]  # of each batch
    views: list[ImageGroup]


@dataclass(frozen=True)
class Teacher:
    """Makes the lesson of any step, always the same: it depends on the seed and the step alone."""

    writer: Writer
    guide: Guide
    seed: int

    def sight(self, num_views: int, step: int) -> Lesson:
        return Lesson([], [], [make_views(self.writer, self.seed, step, num_views)])

    def answers(self, num_rows: int, num_views: int, first_step: int, step: int) -> Lesson:
        """One batch of images with several questions each; after the first steps also one of another kind."""
        kinds = ["branches"]
        if step >= first_step + FIRST_STEPS:
            rng = random.Random(f"kind {self.seed} {step}")
            kinds += rng.choices(tuple(OTHER_KINDS), tuple(OTHER_KINDS.values()))
        batches = [make_batch(self.writer, kind, self.seed, step, num_rows) for kind in kinds]
        targets = [self.guide.targets(batch) for batch in batches]
        views = [make_views(self.writer, self.seed, step, num_views)] if num_views else []
        # looks are thousands of small objects, and the targets hold all that they tell
        return Lesson([replace(batch, looks=[]) for batch in batches], targets, views)


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
