"""Processes that train one model together on a CPU, each on lessons of its own: every step averages their gradients."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


class Team:
    """One of `size` processes that meet at a file. What decides how training goes on (the time, whether to stop) is the
    same in all of them, as of the last step's end."""

    def __init__(self, rank: int, size: int, meeting_point: Path, clock: Callable[[], float]) -> None:
        self.rank, self._size, self._clock = rank, size, clock
        self._start = clock()
        self.seconds = 0.0  # of the first process
        self.wants_to_stop = False  # this one alone
        self.is_told_to_stop = False  # as any of them wants
        if size > 1:
            dist.init_process_group("gloo", init_method=meeting_point.resolve().as_uri(), rank=rank, world_size=size)

    def average(self, weights: Sequence[Tensor]) -> None:
        """Replaces gradients by their mean over all processes, and brings the time."""
        own = [self._clock() - self._start if self.rank == 0 else 0.0, float(self.wants_to_stop)]
        if self._size > 1:
            grads = [weight.grad for weight in weights if weight.grad is not None]
            flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor(own)])
            dist.all_reduce(flat)
            own = flat[-2:].tolist()
            for grad, mean in zip(grads, flat[:-2].div_(self._size).split([g.numel() for g in grads]), strict=True):
                grad.copy_(mean.view_as(grad))
        self.seconds, self.is_told_to_stop = own[0], own[1] > 0

    def check(self, weights: Sequence[Tensor]) -> None:
        """Raises RuntimeError where the processes' weights are not the same."""
        if self._size > 1:
            total = torch.stack([weight.detach().double().sum() for weight in weights]).sum()
            totals = [torch.empty_like(total) for _ in range(self._size)]
            dist.all_gather(totals, total)
            if any(not torch.equal(total, other) for other in totals):
                raise RuntimeError("the training processes have drifted apart")

    def leave(self) -> None:
        if self._size > 1:
            dist.destroy_process_group()
