"""A device's queue of work, seen from the host: results that come back, and marks to wait for.

Used by the runner and the sampler on the lane thread, and for read-back. On a CPU all work is done when the call that
asked for it returns, so results are no copies and marks are moments.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch

from lightvl.engine.device import DeviceLost


class Stream(Protocol):
    """Work is done in the order in which it was asked for. `mark` and `wait` raise `DeviceLost`."""

    device: torch.device

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        """A host tensor that holds x once a mark made after this call has been waited for."""
        ...

    def mark(self) -> Any:
        """A point behind all work asked for so far."""
        ...

    def wait(self, mark: Any) -> None:
        """Block the calling thread until the device has come to the mark."""
        ...

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks that have been waited for."""
        ...


class CpuStream:
    device = torch.device("cpu")

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, first: float, last: float) -> float:
        return last - first


class CudaStream:
    """The current stream of whichever thread calls; `CudaDevice` makes it the same on both of its threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        # to pinned memory, or the copy would wait for all work queued before it
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        try:
            # blocking: whoever waits sleeps, where it would else spin on a core that the event loop needs
            event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
            event.record()
        except RuntimeError as error:  # an earlier kernel failed, and with it the whole context
            raise DeviceLost(str(error)) from error
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        try:
            mark.synchronize()  # sync: what it is for, on the reader's thread
        except RuntimeError as error:
            raise DeviceLost(str(error)) from error

    def seconds(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        return float(first.elapsed_time(last)) / 1e3
