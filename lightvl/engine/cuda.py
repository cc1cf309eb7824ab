"""Serving on one NVIDIA GPU: its defaults, and the machine of a launching lane, flashinfer's attention and CUDA graphs.

The one module of the engine that calls torch.cuda, but for `stream.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from lightvl.attention.cuda_library import require_kernels
from lightvl.config import ServerConfig
from lightvl.engine.device import CudaDevice
from lightvl.engine.graphs import Graph, GraphAttention
from lightvl.engine.measured import Kit, build_runner
from lightvl.engine.memory import LargestImage
from lightvl.engine.platform import Defaults, Machine
from lightvl.engine.runner import LaunchedStep
from lightvl.engine.stream import CudaStream
from lightvl.errors import ConfigError
from lightvl.models.linear import pick_dtype
from lightvl.models.model import Model
from lightvl.scheduling.limits import SchedulerLimits


def cuda_device(flag: str) -> torch.device:
    """Of `--device auto`, `cuda` or `cuda:N`. Raises ConfigError where torch cannot use it, saying why."""
    if torch.version.cuda is None:
        raise ConfigError(f"--device {flag}: this torch ({torch.__version__}) is built without CUDA; use --device cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {flag}: torch finds no usable NVIDIA GPU (is the driver loaded?)")
    index = int(flag.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ConfigError(f"--device {flag}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", index)


class CudaPlatform:
    defaults = Defaults(
        page_size=16,
        max_running=256,
        chunk_tokens=8192,
        step_budget_s=0.1,
        encode_budget_s=0.05,
        mix_rows=False,  # decode rows are a graph, chunks are not
        max_steps_in_flight=2,  # the host commits one step and launches the next while the device computes
        watchdog_timeout_s=300.0,
    )

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)  # of this thread, which loads the weights
        require_kernels()  # before these are read

    @property
    def told(self) -> str:
        properties = torch.cuda.get_device_properties(self.device)
        return f"{self.device}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB"

    def pick_dtype(self, config: ServerConfig) -> tuple[torch.dtype, str]:
        if config.dtype == "auto":
            return pick_dtype(self.device)
        if config.dtype == "float32":
            raise ConfigError("--dtype float32: the attention kernels for CUDA have none; use bfloat16")
        return {"float16": torch.float16, "bfloat16": torch.bfloat16}[config.dtype], "--dtype"

    def assemble(self, model: Model, limits: SchedulerLimits, config: ServerConfig, largest: LargestImage) -> Machine:
        torch.cuda.synchronize(self.device)  # the weights were copied on another stream than the lane's
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

        def enter() -> None:
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(stream)

        device: CudaDevice[LaunchedStep] = CudaDevice(enter)
        try:
            # on the lane, which has its own handles and workspaces: they are part of what is measured
            kit = device.call(lambda: self._kit(model, limits))
            runner, memory, report = device.call(lambda: build_runner(model, limits, config, largest, kit))
        except torch.OutOfMemoryError as error:
            device.close()
            raise ConfigError(
                f"the GPU has too little memory beside the weights for the largest step "
                f"({str(error).split('. ')[0]}); lower --chunked-prefill-size, --max-running-requests or "
                f"--max-image-tokens"
            ) from error
        except BaseException:
            device.close()
            raise
        device.connect(runner.launch, runner.read_back)
        return Machine(device, memory, tuple(report))

    def _kit(self, model: Model, limits: SchedulerLimits) -> Kit:
        from lightvl.attention.cuda import CudaAttention  # needs flashinfer
        from lightvl.attention.cuda_encoder import encoder_attention

        def make_attention(num_pages: int, num_cross_pages: int) -> GraphAttention:
            return CudaAttention(
                model.config.kv_shape,
                num_pages=num_pages,
                page_size=limits.page_size,
                dtype=model.dtype,
                device=self.device,
                num_cross_pages=num_cross_pages,
                cross_page_len=model.family.cross_page_len,
                max_decode_rows=limits.max_running,
                max_row_pages=-(-limits.context_len // limits.page_size),
            )

        return Kit(CudaStream(self.device), CudaMeter(self.device), make_attention, encoder_attention, graphs_pool)


class CudaMeter:
    """Implements `measured.Meter`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.total_bytes = torch.cuda.mem_get_info(device)[1]

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()  # tensors in cycles hold their memory until then
        torch.cuda.empty_cache()

    def peak_bytes(self, run: Callable[[], object]) -> int:
        self.settle()
        before = self.free_bytes()
        torch.cuda.reset_peak_memory_stats(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        run()
        torch.cuda.synchronize(self._device)
        by_torch = torch.cuda.max_memory_reserved(self._device) - reserved
        # torch gives nothing back by itself, so what the driver misses now is the peak, what others hold included
        return max(by_torch, before - self.free_bytes())


class CudaGraph:
    """Implements `graphs.Graph`. Graphs of one pool share their memory: they never run at the same time."""

    def __init__(self, pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool

    def capture(self, run: Callable[[], None]) -> None:
        # thread_local: whatever other threads ask of CUDA meanwhile is no part of it, and no error
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            run()

    def replay(self) -> None:
        self._graph.replay()


def graphs_pool() -> Callable[[], Graph]:
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)
