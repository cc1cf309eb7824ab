"""Part 7: memory that cannot run out. A real-size model is served with all the memory that there is, and asked for the
largest things at once; then another takes what the server keeps free, so that a step does run out."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu.devices import free
from gpu.rows import Context, Row
from gpu.served import Served, random_prompt
from lightvl.core import SamplingParams
from lightvl.engine.largest import COSTLIEST
from lightvl.errors import Overloaded

GIB = 2**30
LEFT_BYTES = 96 << 20  # that the other leaves to a server
COSTLY = dataclasses.replace(COSTLIEST, max_tokens=4)


@dataclasses.dataclass(frozen=True)
class Sizes:
    architecture: str
    flags: dict[str, Any]
    long_prompts: tuple[int, int]  # how many, of how many tokens
    short_prompts: tuple[int, int]
    large_images: tuple[int, int]  # how many, of which side: each at the model's own limit
    small_images: tuple[int, int]


REAL = Sizes("qwen2-vl-7b", {}, (3, 32000), (300, 150), (2, 3584), (48, 448))
DRY = Sizes("qwen2-vl-tiny", {"mem_fraction_static": 0.05}, (2, 400), (6, 20), (1, 448), (3, 112))


def run(context: Context) -> None:
    sizes = DRY if context.is_dry else REAL
    with tempfile.TemporaryDirectory() as folder:
        served = Served(sizes.architecture, Path(folder) / "model", context.device, **sizes.flags)
        name = sizes.architecture
        context.check(f"{name}: start", lambda row: _start(context, served, row), seconds=20)
        context.check(f"{name}: the largest at once", lambda row: _at_once(context, served, sizes, row), seconds=20)
        context.check(f"{name}: without memory", lambda row: _without(context, served, sizes, row), seconds=5)
        served.close()


def _start(context: Context, served: Served, row: Row) -> None:
    began = time.monotonic()
    report = served.service.report
    row.tell(time.monotonic() - began, "s")
    row.note = next((line for line in report if line.startswith("kept free")), "")


def _at_once(context: Context, served: Served, sizes: Sizes, row: Row) -> None:
    """Prompts of several chunks, more sequences than run at once, each sampled in the costliest way, and images at the
    model's own limit. All must end well; told is the least memory that was free meanwhile."""
    rng = np.random.default_rng(0)
    prompts = [
        random_prompt(rng, length) for count, length in (sizes.long_prompts, sizes.short_prompts) for _ in range(count)
    ]
    for count, side in (sizes.large_images, sizes.small_images):
        for idx in range(count):
            prompts.append(served.run(lambda idx=idx, side=side: served.image_prompt(f"{side} {idx}", (side, side))))  # type: ignore[misc]
    with _lowest_free(context) as lowest:
        errors = [error for error in served.run(lambda: served.submit(prompts, COSTLY)) if error is not None]
    row.tell(lowest[0] / GIB, "GiB")
    row.note = f"free at the least, of {lowest[1] / GIB:.2f} before; {len(prompts)} requests"
    assert not errors, f"{len(errors)} of {len(prompts)} failed: {errors[0]}"


def _without(context: Context, served: Served, sizes: Sizes, row: Row) -> None:
    """An image's encode runs out of memory: its request is told so; others, and the same one later, are answered."""
    if context.is_dry:
        row.verdict, row.note = "told", "a CPU's memory is not taken away"
        return
    side = sizes.large_images[1]
    image = served.run(lambda: served.image_prompt("without", (side, side)))
    text = random_prompt(np.random.default_rng(999), 40)
    free(context.device)
    taken = torch.empty(torch.cuda.mem_get_info()[0] - LEFT_BYTES, dtype=torch.uint8, device=context.device)
    (refused,) = served.run(lambda: served.submit([image], COSTLY))
    (meanwhile,) = served.run(lambda: served.submit([text], SamplingParams(max_tokens=8)))
    del taken
    free(context.device)
    (later,) = served.run(lambda: served.submit([image], COSTLY))
    row.note = f"the request ended with {type(refused).__name__}: {refused}"
    assert isinstance(refused, Overloaded) and meanwhile is None and later is None, (refused, meanwhile, later)


@contextmanager
def _lowest_free(context: Context) -> Iterator[list[int]]:
    """[least bytes free while the block runs, bytes free before]."""
    if context.is_dry:
        yield [0, 0]
        return
    before = torch.cuda.mem_get_info()[0]
    seen, ended = [before, before], threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            seen[0] = min(seen[0], torch.cuda.mem_get_info()[0])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
