"""Part 6: how near decode, prefill and encode of real-size models come to what this GPU can do.

Decode is a fraction of the measured copy bandwidth (bytes of weights and K,V that must be read), prefill and encode of
the measured rate of a large matrix product. All go through the engine, scheduler and sampler included, without HTTP;
weights are random (`--load-format dummy`). A dry run takes tiny models.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu.rooflines import (
    Ceilings,
    decode_bytes,
    encode_flops,
    measure_bytes_per_s,
    measure_flops,
    prefill_flops,
)
from gpu.rows import Context, Row
from gpu.served import Served, random_prompt
from lightvl.core import Prompt, SamplingParams
from lightvl.engine.build import LightVLService
from lightvl.models.config import decoder_config, read_config
from lightvl.models.vision.config import mllama_vision_config, qwen_vision_config
from lightvl.scheduling.plan import StepOutcome, StepPlan

DECODE_GOAL, PREFILL_GOAL = 0.6, 0.45
NUM_IMAGES = 16
PROMPT_LEN = 256  # tokens of what is decoded, about
PROFILED_LEN = 40  # tokens decoded under the profiler


@dataclasses.dataclass(frozen=True)
class Sizes:
    architectures: tuple[str, ...]  # of tools/make_random_model.py
    batches: tuple[int, ...]
    goal_batches: tuple[int, ...]
    prefill_len: int
    decode_len: int  # tokens of each sequence: enough that all of them write at the same time for a while
    image: tuple[int, int]
    copy_bytes: int
    product: int
    pool: dict[str, Any]  # flags: room for what is measured and little more, since two models are served in turn


REAL = Sizes(
    ("qwen2-vl-7b", "llama-3.2-11b-vision"),
    (1, 64, 256),
    (1, 64),
    8192,
    160,
    (1120, 1120),
    4 << 30,
    8192,
    {"max_total_tokens": 1 << 17},
)
DRY = Sizes(
    ("qwen2-vl-tiny", "llama-3.2-vision-tiny"),
    (1, 3),
    (),
    96,
    24,
    (112, 112),
    1 << 20,
    64,
    {"max_total_tokens": 4096, "mem_fraction_static": 0.05},
)


def run(context: Context) -> None:
    sizes = DRY if context.is_dry else REAL
    ceilings = Measured(context.device, sizes)
    context.check("ceiling: copy", lambda row: row.tell(ceilings.get().bytes_per_s / 1e9, "GB/s"))
    context.check("ceiling: bfloat16 product", lambda row: row.tell(ceilings.get().flops / 1e12, "TFLOP/s"))
    with tempfile.TemporaryDirectory() as folder:
        for architecture in sizes.architectures:
            bench = Bench(architecture, Path(folder) / architecture, context, sizes, ceilings)
            name = architecture
            context.check(f"{name}: start", bench.start, seconds=25)
            for batch in sizes.batches:
                context.check(
                    f"{name}: decode of {batch}",
                    lambda row, bench=bench, batch=batch: bench.decode(batch, row),
                    seconds=4,
                )
            context.check(f"{name}: prefill of {sizes.prefill_len}", bench.prefill, seconds=4)
            for num in (1, NUM_IMAGES if not context.is_dry else 2):
                context.check(
                    f"{name}: encode of {num} images",
                    lambda row, bench=bench, num=num: bench.encode(num, row),
                    seconds=4,
                )
            bench.close()


class Measured:
    """The ceilings, measured when first asked for: a part that goes on in a new process needs them too."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self._device, self._sizes = device, sizes
        self._ceilings: Ceilings | None = None

    def get(self) -> Ceilings:
        if self._ceilings is None:
            self._ceilings = Ceilings(
                measure_bytes_per_s(self._device, self._sizes.copy_bytes),
                measure_flops(self._device, self._sizes.product),
            )
        return self._ceilings


@dataclasses.dataclass(frozen=True)
class Step:
    plan: StepPlan
    outcome: StepOutcome
    at: float  # when it was complete


class Bench:
    """One served model, and its steps as the scheduler hears of their ends."""

    def __init__(self, architecture: str, folder: Path, context: Context, sizes: Sizes, ceilings: Measured) -> None:
        self._sizes, self._ceilings, self._profiles = sizes, ceilings, context.profiles
        self._served = Served(
            architecture,
            folder,
            context.device,
            context_length=2 * max(PROMPT_LEN, sizes.prefill_len),
            disable_radix_cache=True,
            **sizes.pool,
        )
        self._watched: LightVLService | None = None
        self._steps: list[Step] = []
        self._num_asked = 0  # makes every prompt and image a new one

    def start(self, row: Row) -> None:
        started = time.monotonic()
        self._begin()
        row.tell(time.monotonic() - started, "s")

    def close(self) -> None:
        self._served.close()
        self._steps.clear()

    def decode(self, batch: int, row: Row) -> None:
        self._begin()
        steps = self._generate(batch, self._sizes.decode_len, "decode")
        full = [len(step.plan.rows) == batch == step.plan.num_tokens and not step.plan.encodes for step in steps]
        pairs = [(steps[i - 1], steps[i]) for i in range(1, len(steps)) if full[i - 1] and full[i]]
        assert len(pairs) >= 5, f"only {len(pairs)} steps decoded all {batch} sequences"
        wall = statistics.median(later.at - earlier.at for earlier, later in pairs)
        on_device = statistics.median(later.outcome.rows_s for _, later in pairs)
        rows = pairs[len(pairs) // 2][1].plan.rows
        cross_pages = {page for each in rows for view in each.cross for page in view.cross_pages}
        num_bytes = decode_bytes(
            self._config,
            [each.start + 1 for each in rows],
            num_cross_pages=len(cross_pages),
            cross_page_len=getattr(self._vision, "tile_len", 0),
        )
        self._judge(
            row, num_bytes / wall / self._ceilings.get().bytes_per_s, DECODE_GOAL, batch in self._sizes.goal_batches
        )
        row.note = f"{1e3 * wall:.2f} ms a step, {1e3 * on_device:.2f} on the device; {batch / wall:.0f} tokens/s"
        row.note += f"; {num_bytes / 1e9:.1f} GB"
        self._profile(row, lambda: self._generate(batch, PROFILED_LEN, "decode"))

    def prefill(self, row: Row) -> None:
        self._begin()
        walls, devices = [], []
        for _ in range(3):
            began = time.perf_counter()
            steps = self._generate(1, 1, "prefill")
            walls.append(steps[-1].at - began)
            devices.append(sum(step.outcome.rows_s for step in steps))
        wall = statistics.median(walls)
        flops = prefill_flops(self._config, self._sizes.prefill_len)
        self._judge(row, flops / wall / self._ceilings.get().flops, PREFILL_GOAL, bool(self._sizes.goal_batches))
        row.note = f"{1e3 * wall:.0f} ms, {1e3 * statistics.median(devices):.0f} on the device"
        row.note += f"; {self._sizes.prefill_len / wall:.0f} tokens/s; {flops / 1e12:.1f} TFLOP"
        self._profile(row, lambda: self._generate(1, 1, "prefill"))

    def encode(self, num_images: int, row: Row) -> None:
        self._begin()
        self._generate(num_images, 1, "encode")  # kernels are loaded, and torch's memory is there
        prompts = self._served.run(lambda: self._prompts(num_images, "encode"))
        steps = self._submit(prompts, 1)
        taken = sum(step.outcome.encode_s for step in steps)
        layouts = [image.media.layout for prompt in prompts for image in prompt.images]
        flops = sum(encode_flops(self._vision, self._config, layout) for layout in layouts)
        self._judge(row, flops / taken / self._ceilings.get().flops, 0, False)
        size = layouts[0].num_cross_pages or layouts[0].num_tokens
        unit = "tiles" if layouts[0].num_cross_pages else "tokens"
        row.note = f"{1e3 * taken:.0f} ms; {size} {unit} each; {flops / 1e12:.2f} TFLOP"
        self._profile(row, lambda: self._generate(num_images, 1, "encode"))

    @staticmethod
    def _judge(row: Row, fraction: float, goal: float, has_goal: bool) -> None:
        if has_goal:
            row.at_least(fraction, goal, "of roofline")
        else:
            row.tell(fraction, "of roofline")

    def _profile(self, row: Row, run: Callable[[], object]) -> None:
        """The kernels that `run` takes its time with, in the log."""
        if not self._profiles:
            return
        activity = torch.profiler.ProfilerActivity
        by = activity.CPU if self._served.device == "cpu" else activity.CUDA
        with torch.profiler.profile(activities=[by]) as profile:
            run()
        order = f"self_{by.name.lower()}_time_total"
        print(f"-- {row.check}\n{profile.key_averages().table(sort_by=order, row_limit=20)}")

    def _begin(self) -> None:
        service = self._served.service
        if self._watched is service:
            return
        self._watched = service
        hf_config = read_config(self._served.folder)
        self._config = decoder_config(hf_config)
        vision_config = mllama_vision_config if self._config.cross_layers else qwen_vision_config
        self._vision = vision_config(hf_config, self._served.folder)
        scheduler: Any = service.engine._scheduler
        complete = scheduler.complete

        def noted(plan: StepPlan, outcome: StepOutcome) -> None:
            self._steps.append(Step(plan, outcome, time.perf_counter()))
            complete(plan, outcome)

        scheduler.complete = noted

    def _generate(self, num: int, num_tokens: int, kind: str) -> list[Step]:
        return self._submit(self._served.run(lambda: self._prompts(num, kind)), num_tokens)

    def _submit(self, prompts: list[Prompt], num_tokens: int) -> list[Step]:
        """The steps that these prompts took, all submitted at once."""
        self._steps.clear()
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        for error in self._served.run(lambda: self._served.submit(prompts, params)):
            if error is not None:
                raise error
        return list(self._steps)

    async def _prompts(self, num: int, kind: str) -> list[Prompt]:
        """Cross-attention models decode with an image each, of a few that several sequences share: without one they
        would skip their cross layers."""
        self._num_asked += 1
        if kind == "encode":
            return [await self._served.image_prompt(f"{self._num_asked} {i}", self._sizes.image) for i in range(num)]
        if kind == "decode" and self._config.cross_layers:
            side = self._sizes.image[0] // 2
            return [
                await self._served.image_prompt(
                    f"{self._num_asked} {i % NUM_IMAGES}",
                    (side, side),
                    PROMPT_LEN // 4,  # words
                )
                for i in range(num)
            ]
        length = self._sizes.prefill_len if kind == "prefill" else PROMPT_LEN
        rng = np.random.default_rng(self._num_asked)
        return [random_prompt(rng, length) for _ in range(num)]
