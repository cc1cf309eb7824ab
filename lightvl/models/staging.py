"""Tensors from mapped files to a GPU: threads read the disk into pinned memory while earlier pieces travel.

Used by `load.load_weights`; knows no names and no layers. Copying straight from a mapped file would read the disk page
by page, on one thread, while the bus waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

PIECE_BYTES = 32 << 20
NUM_BUFFERS = 8
NUM_THREADS = 4

Label = TypeVar("Label")


class _Buffer:
    """A piece of pinned memory, and when the device has taken what was last in it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        self._taken: torch.cuda.Event | None = None

    @torch.inference_mode()  # of each thread its own; without it memory made under it cannot be written
    def read(self, source: torch.Tensor) -> None:
        """On a thread of its own. source (n,) uint8, of a mapped file."""
        if self._taken is not None:
            self._taken.synchronize()
        self._memory[: len(source)].copy_(source)

    def send(self, target: torch.Tensor) -> None:
        target.copy_(self._memory[: len(target)], non_blocking=True)
        if self._is_cuda:
            self._taken = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._taken.record()


@dataclass(frozen=True, slots=True)
class _Piece:
    buffer: _Buffer
    reading: Future[None]
    target: torch.Tensor  # (n,) uint8 on the device


def stage(
    items: Iterable[tuple[Label, torch.Tensor]], device: torch.device, *, piece_bytes: int = PIECE_BYTES
) -> Iterator[tuple[Label, torch.Tensor]]:
    """The same labels and tensors in the same order, on the device. `items` is asked for a few ahead, and its tensors
    must stay valid until the last one has been returned."""
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="lightvl-weights") as threads:
        free = deque(_Buffer(piece_bytes, device) for _ in range(NUM_BUFFERS))
        pieces: deque[_Piece] = deque()
        whole: deque[tuple[Label, torch.Tensor, int]] = deque()  # and how many pieces there are up to its last one
        num_begun = num_sent = 0

        def send_oldest() -> None:
            nonlocal num_sent
            piece = pieces.popleft()
            piece.reading.result()
            piece.buffer.send(piece.target)
            free.append(piece.buffer)
            num_sent += 1

        for label, tensor in items:
            source = tensor.contiguous().reshape(-1).view(torch.uint8)
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            target = made.reshape(-1).view(torch.uint8)
            for begin in range(0, len(source), piece_bytes):
                if not free:
                    send_oldest()
                buffer, part = free.popleft(), slice(begin, begin + piece_bytes)
                pieces.append(_Piece(buffer, threads.submit(buffer.read, source[part]), target[part]))
                num_begun += 1
            whole.append((label, made, num_begun))
            while whole and whole[0][2] <= num_sent:
                yield whole.popleft()[:2]
        while whole:
            while num_sent < whole[0][2]:
                send_oldest()
            yield whole.popleft()[:2]
