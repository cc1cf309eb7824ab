"""Host tensors on their way to a device, without waiting for the work that is queued there. Used by the backends beside
it and by the engine, on the lane thread."""

from __future__ import annotations

import torch


def pinned(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Where a GPU can copy it from: a copy from pageable memory would wait for all work queued before it. The pinned
    block is given out again only after the copies from it, which torch's allocator for host memory sees to."""
    return x.pin_memory() if device.type == "cuda" else x


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x if device.type == "cpu" else pinned(x, device).to(device, non_blocking=True)
