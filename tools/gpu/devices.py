"""What stands where, by device: the one place of the check that knows the classes for CUDA and for a dry run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from lightvl.attention.base import EncoderAttention
from lightvl.attention.cpu import CpuAttention, encoder_attention


def make_attention(device: str) -> Callable[..., Any]:
    """An `AttentionBackend` from CpuAttention's arguments, that also has `pages` and `cross_pages` with `keys` and
    `values`."""
    if device == "cpu":
        return CpuAttention
    from functools import partial

    from lightvl.attention.cuda import CudaAttention

    return partial(CudaAttention, device=torch.device(device))


def tower_attention(device: str) -> EncoderAttention:
    if device == "cpu":
        return encoder_attention
    from lightvl.attention.cuda_encoder import encoder_attention as on_cuda

    return on_cuda


def free(device: str) -> None:
    """What nobody refers to any more, given back to the device."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
