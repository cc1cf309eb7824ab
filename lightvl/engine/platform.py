"""What differs between devices, as `build.py` sees it: defaults, dtype, and the machine that runs steps.

`cpu.py` and `cuda.py` implement it; nothing else knows which device there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from lightvl.config import ServerConfig
from lightvl.engine.device import Device
from lightvl.engine.memory import LargestImage, MemoryPlan
from lightvl.models.model import Model
from lightvl.scheduling.limits import SchedulerLimits


@dataclass(frozen=True, slots=True)
class Defaults:
    """Of flags, where the operator does not say, and of what has no flag."""

    page_size: int
    max_running: int
    chunk_tokens: int
    step_budget_s: float  # of a step that decodes: what a reader of a stream may have to wait for others' prefill
    encode_budget_s: float  # of images, in a step that decodes
    mix_rows: bool
    max_steps_in_flight: int
    watchdog_timeout_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """Ready to take plans. `report`: lines for the start-up report, beside those of the memory plan."""

    device: Device
    memory: MemoryPlan
    report: tuple[str, ...] = ()


class Platform(Protocol):
    device: torch.device
    defaults: Defaults

    @property
    def told(self) -> str:
        """The device, for the start-up report."""
        ...

    def pick_dtype(self, config: ServerConfig) -> tuple[torch.dtype, str]:
        """And the reason. Raises ConfigError for one that the device does not serve."""
        ...

    def assemble(self, model: Model, limits: SchedulerLimits, config: ServerConfig, largest: LargestImage) -> Machine:
        """Called once the weights are loaded: what they leave becomes pages. Raises ConfigError where that is not
        enough."""
        ...
