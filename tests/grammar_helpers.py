"""A grammar whose masks are written down. Shared by the sampler's tests and tools/gpu."""

from __future__ import annotations

from typing import Any

import numpy as np


class Only:
    """A grammar, and its matcher, that has these tokens next."""

    def __init__(self, *token_ids: int) -> None:
        self.token_ids = token_ids

    def start(self) -> Only:
        return self

    def allow(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        bits = np.zeros(32 * len(mask), dtype=np.uint8)
        bits[list(self.token_ids)] = 1
        mask[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def push(self, token_id: int) -> bool:
        return token_id in self.token_ids
