"""What is gained by encoding images together: processor seconds of a vision tower for eight images, in jobs of 1 to 8.

    OMP_NUM_THREADS=1 python tools/bench_tower.py /tmp/qwen2-vl-2b --sizes 56,112,224

One thread's processor time is counted, so that a busy machine disturbs little. Prints a line of JSON for each size: the
seconds of all eight by the size of a job, and the longest piece between two pauses of an encode.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lightvl.attention.cpu import encoder_attention
from lightvl.models.linear import pick_dtype
from lightvl.models.model import Model, build_model

NUM_IMAGES = 8
JOBS = (1, 2, 4, 8)  # images of a job


def pieces(model: Model, images: list[Any]) -> list[float]:
    """Processor seconds between pauses."""
    seconds, begin = [], time.thread_time()
    for _ in model.family.encode(images, encoder_attention):
        end = time.thread_time()
        seconds.append(end - begin)
        begin = end
    return seconds


def measure(model: Model, size: int, rounds: int, bar: tqdm[Any]) -> dict[str, Any]:
    layout = model.family.plan_image(size, size, num_images=NUM_IMAGES)
    noise = np.random.default_rng(size).integers(0, 256, (NUM_IMAGES, size, size, 3), np.uint8)
    images = [(model.family.preprocess(rgb, layout), layout) for rgb in noise]
    spent: dict[int, list[float]] = {job: [] for job in JOBS}
    longest = dict.fromkeys(JOBS, 0.0)
    for round_idx in range(rounds + 1):  # the first one warms up
        for job in JOBS:
            seconds = [pieces(model, images[begin : begin + job]) for begin in range(0, NUM_IMAGES, job)]
            bar.update()
            if round_idx:
                spent[job].append(sum(map(sum, seconds)))
                longest[job] = max(longest[job], *map(max, seconds))
    return {
        "size": size,
        "patches": images[0][0].shape[:-1].numel(),
        "seconds": {job: round(median(times), 4) for job, times in spent.items()},
        "longest_piece_s": {job: round(seconds, 4) for job, seconds in longest.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="56,112,224", help="sides of square images, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    cpu = torch.device("cpu")
    model = build_model(args.folder, dtype=pick_dtype(cpu)[0], device=cpu)
    with torch.inference_mode():
        model.load(args.folder)
        with tqdm(total=len(sizes) * len(JOBS) * (args.rounds + 1), desc="encoding") as bar:
            for size in sizes:
                print(json.dumps(measure(model, size, args.rounds, bar)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
