"""The CUDA side of the engine on a CPU: a stream whose results come late, graphs that are callables, a meter that is a
script, and a platform made of these that whole services can be built on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from lightvl.attention.base import CrossInputs, SelfInputs, StepInputs
from lightvl.attention.cpu import CpuAttention, encoder_attention
from lightvl.config import ServerConfig
from lightvl.engine.cpu import CpuPlatform
from lightvl.engine.device import CudaDevice, StepResult
from lightvl.engine.graphs import Graph
from lightvl.engine.measured import Kit, build_runner
from lightvl.engine.memory import LargestImage
from lightvl.engine.platform import Machine
from lightvl.engine.runner import LaunchedStep, Runner
from lightvl.models.model import Model
from lightvl.scheduling.limits import SchedulerLimits

MIB = 1 << 20
GARBAGE = 0x55


class LateStream:
    """What `to_host` returns is garbage until a later mark has been waited for."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(x)
        host.view(torch.uint8).fill_(GARBAGE)
        with self._lock:
            self._pending.append((host, x.clone()))
        return host

    def mark(self) -> tuple[int, float]:
        return len(self._pending), time.perf_counter()

    def wait(self, mark: tuple[int, float]) -> None:
        with self._lock:
            for host, x in self._pending[: mark[0]]:
                host.copy_(x)

    def seconds(self, first: tuple[int, float], last: tuple[int, float]) -> float:
        return last[1] - first[1]


class ScriptedMeter:
    """Free memory falls by what is allocated through `hold`; each peak is the next of the script."""

    def __init__(self, total: int = 4096 * MIB, free: int = 1024 * MIB, peaks: list[int] | None = None) -> None:
        self.total_bytes, self.free = total, free
        self._peaks = iter(peaks) if peaks is not None else None

    def free_bytes(self) -> int:
        return self.free

    def settle(self) -> None:
        pass

    def peak_bytes(self, run: Callable[[], object]) -> int:
        run()
        return next(self._peaks) if self._peaks is not None else MIB


class FixedCpuDecode:
    """`base.FixedDecode` over the CPU's attention. The page after the last one is padding."""

    def __init__(self, attention: FixedCpuAttention, num_rows: int, with_cross: bool, multi_axis: bool) -> None:
        self.num_rows, self._attention = num_rows, attention
        zeros = torch.zeros(num_rows, dtype=torch.int64)
        self.inputs = StepInputs(
            token_ids=zeros.clone(),
            positions=torch.zeros(3, num_rows, dtype=torch.int64) if multi_axis else zeros.clone(),
            self_attention=SelfInputs([], [], zeros.clone(), torch.empty(0, 0)),
            cross=CrossInputs([], torch.zeros(num_rows, 1, dtype=attention.dtype)) if with_cross else None,
            logits_idx=torch.arange(num_rows),
        )
        self.num_loads = 0

    def load(self, inputs: StepInputs | None) -> None:
        self.num_loads += 1
        num = 0 if inputs is None else len(inputs.token_ids)
        mine, rows = self.inputs, self.inputs.self_attention
        page_size, padding = self._attention.pages.page_len, self._attention.padding_page
        num_pages = 1 if inputs is None else inputs.self_attention.page_table.shape[1]
        table = torch.full((self.num_rows, num_pages), padding)
        for tensor in (mine.token_ids, mine.positions):
            tensor.zero_()
        rows.slots.fill_(padding * page_size)
        rows.q_lens, rows.kv_lens = [1] * self.num_rows, [1] * self.num_rows
        if inputs is not None:
            assert inputs.self_attention.q_lens == [1] * num <= rows.q_lens
            mine.token_ids[:num] = inputs.token_ids
            mine.positions[..., :num] = inputs.positions
            rows.slots[:num] = inputs.self_attention.slots
            table[:num] = inputs.self_attention.page_table
            rows.kv_lens[:num] = inputs.self_attention.kv_lens
        rows.page_table = table
        assert inputs is None or inputs.cross is None or mine.cross is not None
        if mine.cross is not None:
            mine.cross.sees_image.zero_()
            mine.cross.spans = []
            if inputs is not None and inputs.cross is not None:
                mine.cross.spans = inputs.cross.spans
                mine.cross.sees_image[:num] = inputs.cross.sees_image
        self._attention.prepare(mine)

    def paged_rows(self, inputs: StepInputs) -> None:
        return None

    def attend(self, layer_idx: int, q: Any, k: Any, v: Any, inputs: StepInputs) -> torch.Tensor:
        return self._attention.attend(layer_idx, q, k, v, inputs)

    def cross_attend(self, cross_idx: int, q: Any, inputs: StepInputs) -> torch.Tensor:
        return self._attention.cross_attend(cross_idx, q, inputs)


class FixedCpuAttention(CpuAttention):
    def __init__(self, *args: Any, num_pages: int, dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, num_pages=num_pages + 1, dtype=dtype, **kwargs)
        self.padding_page, self.dtype = num_pages, dtype
        self.fixed: list[FixedCpuDecode] = []

    def fixed_decode(self, num_rows: int, *, with_cross: bool, multi_axis_positions: bool) -> FixedCpuDecode:
        self.fixed.append(FixedCpuDecode(self, num_rows, with_cross, multi_axis_positions))
        return self.fixed[-1]


class CallableGraph:
    """Recording computes nothing; replaying calls again what was recorded."""

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, run: Callable[[], None]) -> None:
        self._run = run

    def replay(self) -> None:
        self.num_replays += 1
        self._run()


class LateCudaPlatform(CpuPlatform):
    """`cuda.CudaPlatform` without CUDA: rows are not mixed, decode steps are graphs, memory is "measured", a step is
    launched on one thread and read back on another, `delay_s(step number)` later."""

    def __init__(self, meter: ScriptedMeter | None = None, delay_s: Callable[[int], float] = lambda step: 0.0) -> None:
        self.meter = meter or ScriptedMeter()
        self.delay_s = delay_s
        self.graphs: list[CallableGraph] = []
        self.log: list[tuple[str, int]] = []  # ("launch" | "read", step id) in the order in which it happened
        self.attention: FixedCpuAttention | None = None
        self.runner: Runner | None = None

    def assemble(self, model: Model, limits: SchedulerLimits, config: ServerConfig, largest: LargestImage) -> Machine:
        def make_attention(num_pages: int, num_cross_pages: int) -> FixedCpuAttention:
            self.attention = FixedCpuAttention(
                model.config.kv_shape,
                num_pages=num_pages,
                page_size=limits.page_size,
                dtype=model.dtype,
                num_cross_pages=num_cross_pages,
                cross_page_len=model.family.cross_page_len,
            )
            return self.attention

        def make_graph() -> Graph:
            self.graphs.append(CallableGraph())
            return self.graphs[-1]

        kit = Kit(LateStream(), self.meter, make_attention, encoder_attention, lambda: make_graph)
        device: CudaDevice[LaunchedStep] = CudaDevice(lambda: None)
        try:
            runner, memory, report = device.call(lambda: build_runner(model, limits, config, largest, kit))
        except BaseException:
            device.close()
            raise
        self.runner = runner

        def launch(plan: Any) -> LaunchedStep:
            self.log.append(("launch", plan.step_id))
            return runner.launch(plan)

        def read_back(step: LaunchedStep) -> StepResult:
            time.sleep(self.delay_s(step.plan.step_id))
            self.log.append(("read", step.plan.step_id))
            return runner.read_back(step)

        device.connect(launch, read_back)
        return Machine(device, memory, tuple(report))
