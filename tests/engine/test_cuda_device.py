"""The two threads of `CudaDevice`: steps are launched without waiting for results, and the loop never waits."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from lightvl.engine.cuda import cuda_device
from lightvl.engine.device import CudaDevice, DeviceLost, StepResult
from lightvl.errors import ConfigError
from lightvl.scheduling.plan import StepOutcome, StepPlan


class SlowGpu:
    """Completes a step when told to."""

    def __init__(self) -> None:
        self.launched: list[int] = []
        self.read: list[int] = []
        self.completions = [threading.Event() for _ in range(4)]
        self.errors: dict[int, Exception] = {}

    def launch(self, plan: StepPlan) -> int:
        self.launched.append(plan.step_id)
        if plan.step_id in self.errors:
            raise self.errors[plan.step_id]
        return plan.step_id

    def read_back(self, step_id: int) -> StepResult:
        assert self.completions[step_id].wait(10)
        self.read.append(step_id)
        return StepResult(StepOutcome(encoded=(step_id,)))


@pytest.fixture
def gpu() -> SlowGpu:
    return SlowGpu()


@pytest.fixture
def device(gpu: SlowGpu) -> CudaDevice[int]:
    entered: list[str] = []
    device: CudaDevice[int] = CudaDevice(lambda: entered.append(threading.current_thread().name))
    device.connect(gpu.launch, gpu.read_back)
    assert device.call(threading.current_thread) is not threading.main_thread() and len(entered) == 1
    return device


async def test_steps_are_launched_before_earlier_ones_are_read(gpu: SlowGpu, device: CudaDevice[int]) -> None:
    pending = [device.submit(StepPlan(step_id)) for step_id in range(3)]
    began = time.monotonic()
    while gpu.launched != [0, 1, 2]:
        assert time.monotonic() - began < 5
        await asyncio.sleep(0.001)  # the loop is free
    assert gpu.read == [] and not any(future.done() for future in pending)
    for completion in reversed(gpu.completions):  # whatever completes first is read in its turn
        completion.set()
        await asyncio.sleep(0.005)
    results = await asyncio.gather(*pending)
    assert [result.outcome.encoded for result in results] == [(0,), (1,), (2,)] and gpu.read == [0, 1, 2]
    await asyncio.to_thread(device.close)


async def test_an_error_belongs_to_its_step(gpu: SlowGpu, device: CudaDevice[int]) -> None:
    gpu.errors = {0: RuntimeError("this step"), 2: DeviceLost("all")}
    for completion in gpu.completions:
        completion.set()
    pending = [device.submit(StepPlan(step_id)) for step_id in range(3)]
    results = await asyncio.gather(*pending, return_exceptions=True)
    assert [type(result) for result in results] == [RuntimeError, StepResult, DeviceLost]
    await asyncio.to_thread(device.close)


async def test_close_waits_for_the_running_step(gpu: SlowGpu, device: CudaDevice[int]) -> None:
    device.submit(StepPlan(0))
    closing = asyncio.create_task(asyncio.to_thread(device.close))
    await asyncio.sleep(0.02)
    assert not closing.done()
    gpu.completions[0].set()
    await closing
    assert gpu.read == [0]


@pytest.mark.parametrize("flag", ["cuda", "cuda:3"])
def test_cuda_that_is_not_there_is_one_clear_line(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--device {flag}: .*"):
        cuda_device(flag)
