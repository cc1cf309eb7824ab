"""What stands where, by device: the one place of the check that knows the classes for CUDA and for a dry run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lightvl.attention.base import EncoderAttention
from lightvl.attention.cpu import CpuAttention, encoder_attention
from lightvl.engine.graphs import Graph


def make_attention(device: str) -> Callable[..., Any]:
    """An `AttentionBackend` from CpuAttention's arguments, that also has `pages` and `cross_pages` with `keys` and
    `values`."""
    return CpuAttention if device == "cpu" else _cuda_attention(device)


def make_graph_attention(device: str) -> Callable[..., Any]:
    """The same, with `fixed_decode`."""
    if device == "cpu":
        from cuda_helpers import FixedCpuAttention

        return FixedCpuAttention
    return _cuda_attention(device)


def _cuda_attention(device: str) -> Callable[..., Any]:
    from lightvl.attention.cuda import CudaAttention

    return partial(CudaAttention, device=torch.device(device))


def make_graphs_pool(device: str) -> Callable[[], Graph]:
    """What makes the graphs of one pool."""
    if device == "cpu":
        from cuda_helpers import CallableGraph

        return CallableGraph
    from lightvl.engine.cuda import graphs_pool

    return graphs_pool()


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
