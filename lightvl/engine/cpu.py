"""Serving on a CPU: its defaults, and the machine of one lane thread, torch's attention and pages in main memory."""

from __future__ import annotations

import torch

from lightvl.attention.cpu import CpuAttention, encoder_attention
from lightvl.config import ServerConfig
from lightvl.engine.device import CpuDevice
from lightvl.engine.memory import Budget, LargestImage, available_bytes, plan_memory
from lightvl.engine.platform import Defaults, Machine
from lightvl.engine.runner import make_runner
from lightvl.engine.stream import CpuStream
from lightvl.errors import ConfigError
from lightvl.kernels.cpu import cpu_kernels
from lightvl.models.linear import pick_dtype
from lightvl.models.model import Model
from lightvl.scheduling.limits import SchedulerLimits

MEM_FRACTION = 0.5
MAX_TOTAL_TOKENS = 1 << 18
"""Of K,V: a cache of that many tokens is large for what two to sixty-four cores can prefill."""


class CpuPlatform:
    device = torch.device("cpu")
    defaults = Defaults(
        page_size=16,
        max_running=64,
        chunk_tokens=512,
        step_budget_s=0.12,
        encode_budget_s=0.08,  # a piece of a tower layer at least
        mix_rows=True,
        max_steps_in_flight=2,  # the lane goes on while the loop commits a step and sends it out
        watchdog_timeout_s=1800.0,  # a chunk of a large model may take minutes on few cores
    )

    @property
    def told(self) -> str:
        kernels = "torch's kernels only" if cpu_kernels() is None else "decoding bfloat16 by LightVL's kernels"
        return f"cpu, {torch.get_num_threads()} threads, {kernels}"

    def pick_dtype(self, config: ServerConfig) -> tuple[torch.dtype, str]:
        if config.dtype == "auto":
            return pick_dtype(self.device)
        if config.dtype == "float16":
            raise ConfigError("--dtype float16: CPUs are very slow at it; use bfloat16 or float32")
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype], "--dtype"

    def assemble(self, model: Model, limits: SchedulerLimits, config: ServerConfig, largest: LargestImage) -> Machine:
        if config.disable_cuda_graph or config.cuda_graph_max_bs is not None:
            flag = "--disable-cuda-graph" if config.disable_cuda_graph else "--cuda-graph-max-bs"
            raise ConfigError(f"{flag}: there are no CUDA graphs on a CPU")
        fraction = config.mem_fraction_static if config.mem_fraction_static is not None else MEM_FRACTION
        available = available_bytes()
        told = f"{fraction:g} of the {available / 2**30:.1f} GiB that are free"
        budget = Budget(int(available * fraction), told, most_tokens=max(MAX_TOTAL_TOKENS, 2 * limits.context_len))
        memory = plan_memory(
            budget, config.max_total_tokens, model.config, limits, model.dtype, model.family.cross_page_len, largest
        )
        attention = CpuAttention(
            model.config.kv_shape,
            num_pages=memory.num_pages,
            page_size=limits.page_size,
            dtype=model.dtype,
            num_cross_pages=memory.num_cross_pages,
            cross_page_len=model.family.cross_page_len,
        )
        runner = make_runner(model, attention, encoder_attention, limits, CpuStream())
        return Machine(CpuDevice(runner.run), memory)
