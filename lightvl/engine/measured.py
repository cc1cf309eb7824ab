"""A runner whose memory is known not to run out: on a device that gives no more than it has, what weights leave is
measured by running the largest steps there can be, and only what these leave becomes pages.

Called by `cuda.py`, on the lane thread; what is CUDA's own comes in a `Kit`, so that this runs on a CPU in tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from lightvl.attention.base import EncoderAttention
from lightvl.config import ServerConfig
from lightvl.engine.features import JOB_PATCHES
from lightvl.engine.graphs import DecodeGraphs, Graph, GraphAttention, batch_sizes
from lightvl.engine.largest import largest_encodes, largest_rows
from lightvl.engine.memory import Budget, LargestImage, MemoryPlan, plan_memory
from lightvl.engine.runner import Runner, make_runner
from lightvl.engine.stream import Stream
from lightvl.models.model import Model
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.plan import StepPlan

MARGIN_SHARE = 0.01  # of the device's memory, and at least ...
MARGIN_BYTES = 512 << 20  # ... for what fragmentation and other processes take meanwhile
GIB = 2**30


class Meter(Protocol):
    """The device's memory, as its driver counts it."""

    total_bytes: int

    def free_bytes(self) -> int: ...

    def settle(self) -> None:
        """Give back what is held but not used."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Settles; then the most by which the memory in use grows while `run` runs, or stays grown after it."""
        ...


@dataclass(frozen=True, slots=True)
class Kit:
    """`make_attention(num_pages, num_cross_pages)`. `make_graphs_pool` begins a new pool of graphs and returns what
    makes one graph in it."""

    stream: Stream
    meter: Meter
    make_attention: Callable[[int, int], GraphAttention]
    encoder_attention: EncoderAttention
    make_graphs_pool: Callable[[], Callable[[], Graph]]


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes, beside weights and pages."""

    encode: int  # of the largest one; it may be unfinished while rows run, so both count
    rows: int
    graphs: int
    backend: int  # attention's workspaces
    margin: int

    @property
    def total(self) -> int:
        return self.encode + self.rows + self.graphs + self.backend + self.margin


@torch.inference_mode()
def build_runner(
    model: Model, limits: SchedulerLimits, config: ServerConfig, largest: LargestImage, kit: Kit
) -> tuple[Runner, MemoryPlan, list[str]]:
    """And lines for the start-up report. Raises ConfigError, or what the device raises when one of the largest steps
    does not even fit beside the weights."""
    sizes: list[int] = []
    if not config.disable_cuda_graph:
        sizes = batch_sizes(min(config.cuda_graph_max_bs or limits.max_running, limits.max_running))
    needs = _measure(model, limits, largest, sizes, kit)
    kit.meter.settle()
    memory = plan_memory(
        _budget(config.mem_fraction_static, needs, kit.meter),
        config.max_total_tokens,
        model.config,
        limits,
        model.dtype,
        model.family.cross_page_len,
        largest,
    )
    attention = kit.make_attention(memory.num_pages, memory.num_cross_pages)
    began = time.monotonic()
    graphs = None
    if sizes:
        graphs = DecodeGraphs(model, attention, sizes, kit.make_graphs_pool(), kit.meter.free_bytes)
    runner = make_runner(model, attention, kit.encoder_attention, limits, kit.stream, graphs)
    return runner, memory, [_needs_line(needs), _graphs_line(graphs, sizes, time.monotonic() - began, kit.meter)]


def _measure(model: Model, limits: SchedulerLimits, largest: LargestImage, sizes: Sequence[int], kit: Kit) -> Needs:
    """By a backend with a single page, which is let go again."""
    meter = kit.meter
    meter.settle()
    before = meter.free_bytes()
    num_cross_pages = largest.num_cross_pages if model.family.cross_page_len else 0
    attention = kit.make_attention(1, num_cross_pages)
    backend = max(0, before - meter.free_bytes())
    runner = make_runner(model, attention, kit.encoder_attention, limits, kit.stream)

    def peak_of(plans: Sequence[StepPlan]) -> int:
        """What the first run leaves for good (loaded kernels, workspaces) is no part of it."""
        for plan in plans[-1:]:  # the cheapest: the largest image of Qwen2-VL takes seconds
            _run(runner, plan)
        return max((meter.peak_bytes(partial(_run, runner, plan)) for plan in plans), default=0)

    encode = peak_of(largest_encodes(model.family, JOB_PATCHES[model.device.type]))
    rows = peak_of([largest_rows(limits, num_cross_pages)])
    graphs = _measure_graphs(model, attention, sizes, kit) if sizes else 0
    margin = max(MARGIN_BYTES, int(meter.total_bytes * MARGIN_SHARE))
    return Needs(encode=encode, rows=rows, graphs=graphs, backend=backend, margin=margin)


def _measure_graphs(model: Model, attention: GraphAttention, sizes: Sequence[int], kit: Kit) -> int:
    """The first graph takes memory for all, each further one what the driver wants for its launches: two tell."""
    held: list[DecodeGraphs] = []  # until the peak has been read

    def capture(tried: Sequence[int]) -> None:
        held.append(DecodeGraphs(model, attention, tried, kit.make_graphs_pool(), kit.meter.free_bytes))

    def peak_of(tried: Sequence[int]) -> int:
        peak = kit.meter.peak_bytes(lambda: capture(tried))
        held.clear()
        return peak

    capture(sizes[-1:])  # as above: what stays of the first time is no part of it
    held.clear()
    one, two = peak_of(sizes[-1:]), peak_of(sizes[-2:])
    return one + max(0, two - one) * (len(sizes) - 1)


def _run(runner: Runner, plan: StepPlan) -> None:
    """As a step, and forgotten. Raises what broke it."""
    result = runner.run(plan)
    runner.launch(StepPlan(0, dropped_images=tuple(work.image.key for work in plan.encodes)))
    for error in (result.rows_error, *result.encode_errors.values()):
        if error is not None:
            raise error.__cause__ or error


def _budget(fraction: float | None, needs: Needs, meter: Meter) -> Budget:
    """`fraction`: of the whole memory, for weights and pages together. Never more than the largest steps leave."""
    free, total = meter.free_bytes(), meter.total_bytes
    left = free - needs.total
    told = f"{total / GIB:.1f} GiB, after weights and the largest steps"
    if fraction is not None:
        asked = int(total * fraction) - (total - free)
        if asked <= left:
            return Budget(asked, f"{fraction:g} of {total / GIB:.1f} GiB (--mem-fraction-static)", is_hard=True)
        told += f"; --mem-fraction-static {fraction:g} would leave too little for these"
    return Budget(left, told, is_hard=True)


def _needs_line(needs: Needs) -> str:
    return (
        f"kept free: {needs.total / GIB:.2f} GiB, measured: the largest encode {needs.encode / GIB:.2f}, the largest "
        f"prefill and sampling {needs.rows / GIB:.2f}, CUDA graphs {needs.graphs / GIB:.2f}, attention's workspaces "
        f"{needs.backend / GIB:.2f}, a margin of {needs.margin / GIB:.2f}"
    )


def _graphs_line(graphs: DecodeGraphs | None, sizes: Sequence[int], seconds: float, meter: Meter) -> str:
    if graphs is None:
        return "CUDA graphs: off (--disable-cuda-graph)"
    return (
        f"CUDA graphs: {graphs.num_captured}, for decode steps of up to {sizes[-1]} sequences, captured in "
        f"{seconds:.1f} s; {meter.free_bytes() / GIB:.1f} GiB are free now"
    )
