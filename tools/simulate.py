"""Replay a trace of arrivals through the scheduler with a cost model: what would users feel? No torch, no clock.

    python tools/simulate.py                                # a made-up trace: chats with images, some of them shared
    python tools/simulate.py --trace arrivals.jsonl         # one JSON object a line, see read_trace
    python tools/simulate.py --rate 4 --step-budget 0.1 --pages 2000

Regime: simulated time only. A step costs `--step-base` seconds if it has rows, plus `--token-cost` for each prefill
token, `--decode-cost` for each decode row and `--pair-cost` for each attended pair (token, token before it) of both,
plus the encodes done in it at `--encode-cost` seconds a feature row. The defaults are near Qwen2-VL-2B in bf16 on two
CPU cores. Prints a table, and as the last line the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightvl.core import OPEN_END, Prompt, PromptImage, SamplingParams
from lightvl.errors import BadRequest
from lightvl.scheduling.budget import attended_pairs
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.plan import StepOutcome, StepPlan
from lightvl.scheduling.radix_cache import RadixCache
from lightvl.scheduling.scheduler import Scheduler
from lightvl.scheduling.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Arrival:
    """One request. `pieces`: (seed, number of text tokens) or (image key, rows or tiles, True); equal pieces are equal
    tokens, so that prefixes and images are shared where traces say so."""

    time_s: float
    pieces: list[tuple[int, int, bool]]
    answer_len: int
    n: int = 1


@dataclass(slots=True)
class Record:
    arrival: Arrival
    sequence: Sequence
    token_times: list[float] = field(default_factory=list)


def read_trace(path: Path) -> list[Arrival]:
    """Lines like {"time_s": 0.5, "pieces": [["text", 7, 120], ["image", 42, 999]], "answer_len": 80, "n": 1}: a text
    piece has a seed and a length in tokens, an image piece a key and a size."""
    arrivals = []
    for line in path.read_text().splitlines():
        raw = json.loads(line)
        pieces = [(int(a), int(b), kind == "image") for kind, a, b in raw["pieces"]]
        arrivals.append(Arrival(float(raw["time_s"]), pieces, int(raw["answer_len"]), int(raw.get("n", 1))))
    return sorted(arrivals, key=lambda arrival: arrival.time_s)


def make_trace(args: argparse.Namespace) -> list[Arrival]:
    """Poisson arrivals with one system prompt; some ask about an image, which may be one that others ask about too."""
    rng = random.Random(args.seed)
    arrivals, time_s = [], 0.0
    for idx in range(args.requests):
        time_s += rng.expovariate(args.rate)
        pieces = [(1, 40, False)]
        if rng.random() < args.images:
            key = rng.randrange(4) if rng.random() < args.shared else 1000 + idx
            pieces.append((key, args.image_size, True))
        pieces.append((100 + idx, rng.choice([12, 30, 80, 1500]), False))
        arrivals.append(Arrival(time_s, pieces, rng.randint(20, 120)))
    return arrivals


def make_prompt(arrival: Arrival, *, cross: bool) -> Prompt:
    keys: list[int] = []
    images: list[PromptImage] = []
    for seed, size, is_image in arrival.pieces:
        if is_image:
            first = len(keys)
            keys += [1 << 128 | seed] * (1 if cross else size)
            images.append(PromptImage(seed, first, OPEN_END if cross else len(keys), size, media=None))
        else:
            keys += [seed * 100_003 + i for i in range(size)]
    return Prompt(np.asarray([], dtype=np.int64), keys, tuple(images))


@dataclass(slots=True)
class CostModel:
    step_base_s: float
    token_s: float
    decode_s: float
    pair_s: float
    encode_s: float  # per feature row (or per tile)
    progress: dict[int, float] = field(default_factory=dict)  # image key -> seconds of encode done

    def run(self, plan: StepPlan) -> StepOutcome:
        for key in plan.dropped_images:
            self.progress.pop(key, None)
        spent, encoded = 0.0, []
        for work in plan.encodes:
            if spent >= plan.encode_budget_s:
                break
            key, total = work.image.key, work.image.size * self.encode_s
            # One unit at least: a thirtieth of the image, as a layer of a tower would be.
            part = min(max(plan.encode_budget_s - spent, total / 30), total - self.progress.get(key, 0.0))
            self.progress[key] = self.progress.get(key, 0.0) + part
            spent += part
            if self.progress[key] >= total - 1e-9:
                encoded.append(key)
        rows_s = self.step_base_s if plan.rows else 0.0
        for row in plan.rows:
            is_decode = row.len == 1 and row.start >= len(row.sequence.prompt)
            rows_s += (self.decode_s if is_decode else self.token_s * row.len) + self.pair_s * attended_pairs(
                row.start, row.len
            )
        return StepOutcome(encoded=tuple(encoded), encode_s=spent, rows_s=rows_s)


def simulate(arrivals: list[Arrival], scheduler: Scheduler, costs: CostModel, *, cross: bool) -> dict[str, Any]:
    records: dict[Sequence, Record] = {}
    num_refused = num_cut = num_steps = num_prefill = 0
    now, longest_step, next_idx = 0.0, 0.0, 0
    while next_idx < len(arrivals) or scheduler.has_work:
        while next_idx < len(arrivals) and arrivals[next_idx].time_s <= now:
            arrival = arrivals[next_idx]
            next_idx += 1
            prompt, params = make_prompt(arrival, cross=cross), SamplingParams(arrival.answer_len, n=arrival.n)
            try:
                scheduler.check_fits(prompt, params)
            except BadRequest:
                num_refused += 1
                continue
            sequences = [Sequence(len(records) + choice, prompt, params, choice) for choice in range(arrival.n)]
            scheduler.add(sequences)
            records.update((sequence, Record(arrival, sequence)) for sequence in sequences)
        plan = scheduler.plan()
        if plan is None:
            exhausted = scheduler.take_exhausted()
            for sequence in exhausted:
                num_cut += 1
                scheduler.finish(sequence)
            if not exhausted:
                assert next_idx < len(arrivals), "the scheduler has work and no plan"
                now = max(now, arrivals[next_idx].time_s)
            continue
        outcome = costs.run(plan)
        step_s = outcome.rows_s + outcome.encode_s
        now += step_s
        longest_step = max(longest_step, step_s)
        num_steps += 1
        num_prefill += sum(row.len for row in plan.rows if row.start < len(row.sequence.prompt))
        scheduler.complete(plan, outcome)
        for row in plan.rows:
            for sequence in row.samples:
                if sequence.state is SequenceState.FINISHED:
                    continue
                scheduler.commit_token(sequence, 1_000_000 + sequence.seq_id)
                record = records[sequence]
                record.token_times.append(now)
                if len(sequence.output_ids) == sequence.params.max_tokens:
                    scheduler.finish(sequence)
    scheduler.check()
    done = list(records.values())
    first = [r.token_times[0] - r.arrival.time_s for r in done if r.token_times]
    gaps = [b - a for r in done for a, b in zip(r.token_times, r.token_times[1:], strict=False)]
    prompt_tokens = sum(len(r.sequence.prompt) for r in done)
    return {
        "requests": len(arrivals),
        "refused": num_refused,
        "cut_short": num_cut,
        "simulated_s": round(now, 3),
        "steps": num_steps,
        "longest_step_s": round(longest_step, 4),
        **percentiles("ttft", first),
        **percentiles("itl", gaps),
        "output_tokens_per_s": round(sum(len(r.token_times) for r in done) / now, 2) if now else 0.0,
        "prompt_tokens": prompt_tokens,
        "cached_tokens": sum(r.sequence.num_cached for r in done),
        "prefilled_tokens": num_prefill,
        "preemptions": scheduler.num_preempted,
    }


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        f"{name}_p50_s": round(float(p50), 4),
        f"{name}_p90_s": round(float(p90), 4),
        f"{name}_p99_s": round(float(p99), 4),
        f"{name}_max_s": round(max(values), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Replay arrivals through the scheduler with a cost model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    trace = parser.add_argument_group("trace")
    trace.add_argument("--trace", type=Path, help="JSON lines; else one is made up from the flags below")
    trace.add_argument("--requests", type=int, default=100)
    trace.add_argument("--rate", type=float, default=0.05, help="requests per second")
    trace.add_argument("--images", type=float, default=0.5, help="part of the requests with an image")
    trace.add_argument("--shared", type=float, default=0.5, help="part of the images that several requests share")
    trace.add_argument("--image-size", type=int, default=999, help="feature rows of an image (tiles with --cross)")
    trace.add_argument("--seed", type=int, default=0)
    limits = parser.add_argument_group("scheduler")
    limits.add_argument("--page-size", type=int, default=16, help="tokens")
    limits.add_argument("--pages", type=int, default=4000)
    limits.add_argument("--max-running", type=int, default=32, help="sequences")
    limits.add_argument("--chunk", type=int, default=512, help="prefill tokens of one step")
    limits.add_argument("--context", type=int, default=32768, help="tokens")
    limits.add_argument("--step-budget", type=float, default=0.3, help="seconds of a step with decode rows")
    limits.add_argument("--encode-budget", type=float, default=0.2, help="seconds of encoding in such a step")
    limits.add_argument("--image-units", type=int, default=8192, help="feature rows (cross pages with --cross)")
    limits.add_argument("--cross", action="store_true", help="images are attended to, as in Llama-3.2-Vision")
    limits.add_argument("--no-radix", action="store_true", help="share nothing between requests")
    costs = parser.add_argument_group("cost model, seconds")
    costs.add_argument("--step-base", type=float, default=0.065)
    costs.add_argument("--token-cost", type=float, default=0.0045)
    costs.add_argument("--decode-cost", type=float, default=0.004)
    costs.add_argument("--pair-cost", type=float, default=3e-7)
    costs.add_argument("--encode-cost", type=float, default=0.012, help="per feature row (or tile)")
    args = parser.parse_args()

    pages = PagePool(args.pages)
    scheduler = Scheduler(
        SchedulerLimits(
            page_size=args.page_size,
            max_running=args.max_running,
            chunk_tokens=args.chunk,
            context_len=args.context,
            step_budget_s=args.step_budget,
            encode_budget_s=args.encode_budget,
        ),
        pages,
        None if args.no_radix else RadixCache(args.page_size, pages),
        ImageStore(args.image_units, paged=args.cross),
    )
    model = CostModel(args.step_base, args.token_cost, args.decode_cost, args.pair_cost, args.encode_cost)
    arrivals = read_trace(args.trace) if args.trace else make_trace(args)
    result = simulate(arrivals, scheduler, model, cross=args.cross)
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
