"""How fast a server answers: time to first token, time between tokens, throughput; text and image prompts.

    python tools/bench_serve.py --launch "lightvl --model-path DIR"             # a server of its own, on a free port
    python tools/bench_serve.py --url http://127.0.0.1:30000 --workloads image --concurrency 1 8
    python tools/bench_serve.py --hf DIR --rounds 3                             # against HF generate, same weights

A closed loop: `--concurrency` clients, each with one streaming request at a time, greedy, of fixed answer length. No
prompt shares a prefix (beyond the template) and no image comes twice, so caches do not help; `--same-image` asks
different questions about one image instead. The client takes part of the machine that the server runs on.

`--hf` measures three things, ours and HF's in turn within each round, and compares the medians: decode of one sequence,
decode of eight together, and TTFT of one image. The last line of every run is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from bench.client import Answer, ask, ask_all, open_session, words_per_token
from bench.server import Server, serving
from bench.summary import rounded, summarize, table, together_tok_s
from bench.workload import chat_body, random_jpeg, random_words
from tqdm import tqdm

MakeBody = Callable[[], dict[str, Any]]


def scenario_bodies(args: argparse.Namespace, workload: str, concurrency: int, words: float) -> list[MakeBody]:
    """One maker per request: images are made and encoded only when their turn comes."""
    num_requests = args.requests or concurrency * args.requests_per_client
    width, height = args.image_size
    salt = f"{args.seed} {workload} {concurrency}"

    def make(number: int) -> dict[str, Any]:
        num_words = max(1, round(args.input_len * words)) if workload == "text" else 12
        jpeg = None
        if workload == "image":
            jpeg = random_jpeg(width, height, f"{args.seed} same" if args.same_image else f"{salt} {number}")
        return chat_body(random_words(num_words, f"{salt} {number}"), max_tokens=args.output_len, jpeg=jpeg)

    return [partial(make, number) for number in range(num_requests)]


async def serve_scenarios(server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    async with open_session() as session:
        words = await words_per_token(session, server.url)
        for workload in args.workloads:
            for concurrency in args.concurrency:
                bodies = scenario_bodies(args, workload, concurrency, words)
                with tqdm(total=len(bodies), desc=f"{workload}, {concurrency} at a time", unit="request") as bar:
                    start = time.perf_counter()
                    answers = await ask_all(session, server.url, bodies, concurrency, lambda _, bar=bar: bar.update())
                    wall_s = time.perf_counter() - start
                rows.append({"workload": workload, "concurrency": concurrency, **summarize(answers, wall_s)})
    return rows


# --- against HF -----------------------------------------------------------------------------------------------------


async def our_numbers(server: Server, args: argparse.Namespace, round_no: int, words: float) -> dict[str, float]:
    async with open_session() as session:
        one = await _texts(session, server, args, f"one {round_no}", 1, words)
        eight = await _texts(session, server, args, f"eight {round_no}", 8, words)
        jpeg = random_jpeg(*args.image_size, f"{args.seed} hf {round_no}")
        image = await ask(session, server.url, chat_body(_question(args, round_no), max_tokens=1, jpeg=jpeg))
    return {
        "decode_1_tok_s": 1 / one[0].seconds_per_token,
        "decode_8_tok_s": together_tok_s(eight),
        "image_ttft_s": image.ttft,
    }


async def _texts(
    session: aiohttp.ClientSession, server: Server, args: argparse.Namespace, salt: str, count: int, words: float
) -> list[Answer]:
    bodies = [chat_body(text, max_tokens=args.output_len) for text in _prompts(args, salt, count, words)]
    return list(await asyncio.gather(*(ask(session, server.url, body) for body in bodies)))


def hf_numbers(model: Any, args: argparse.Namespace, round_no: int, words: float) -> dict[str, float]:
    jpeg = random_jpeg(*args.image_size, f"{args.seed} hf {round_no}")
    return {
        "decode_1_tok_s": model.decode_tok_s(_prompts(args, f"one {round_no}", 1, words), args.output_len),
        "decode_8_tok_s": model.decode_tok_s(_prompts(args, f"eight {round_no}", 8, words), args.output_len),
        "image_ttft_s": model.image_ttft(_question(args, round_no), jpeg),
    }


def _prompts(args: argparse.Namespace, salt: str, count: int, words: float) -> list[str]:
    num_words = max(1, round(args.input_len * words))
    return [random_words(num_words, f"{args.seed} {salt} {i}") for i in range(count)]


def _question(args: argparse.Namespace, round_no: int) -> str:
    return random_words(12, f"{args.seed} question {round_no}")


async def _words(url: str) -> float:
    async with open_session() as session:
        return await words_per_token(session, url)


def compare(server: Server, args: argparse.Namespace) -> list[dict[str, Any]]:
    from bench.hf import HFModel  # brings torch and transformers

    model = HFModel(args.hf)
    words = asyncio.run(_words(server.url))
    model.decode_tok_s(_prompts(args, "warm", 1, words), 4)
    asyncio.run(our_numbers(server, argparse.Namespace(**{**vars(args), "output_len": 4}), -1, words))
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, float]] = []
    with tqdm(total=2 * args.rounds, desc="rounds, ours and HF's in turn", unit="half") as bar:
        for round_no in range(args.rounds):
            ours.append(asyncio.run(our_numbers(server, args, round_no, words)))
            bar.update()
            theirs.append(hf_numbers(model, args, round_no, words))
            bar.update()
    rows = []
    for name in ours[0]:
        our, their = (statistics.median(numbers[name] for numbers in side) for side in (ours, theirs))
        rows.append({"measure": name, "ours": our, "hf": their, "ours/hf": our / their})
        rows[-1] |= {"all ours": [n[name] for n in ours], "all hf": [n[name] for n in theirs]}
    return rows


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help="of a running server")
    where.add_argument("--launch", help='command that starts a server, such as "lightvl --model-path DIR"')
    parser.add_argument("--hf", type=Path, metavar="DIR", help="compare with HF generate on this checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="with --hf")
    parser.add_argument("--workloads", nargs="+", choices=("text", "image"), default=["text", "image"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--requests", type=int, help="per scenario (default: clients times --requests-per-client)")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of a text prompt, about")
    parser.add_argument("--output-len", type=int, default=64, help="tokens")
    parser.add_argument("--image-size", type=_size, default="1024x768", metavar="WxH")
    parser.add_argument("--same-image", action="store_true", help="one image for all requests, questions differ")
    parser.add_argument("--seed", default=str(time.time_ns()), help="the same prompts again (default: new ones)")
    args = parser.parse_args()
    if args.url is None and args.launch is None:
        if args.hf is None:
            parser.error("one of --url, --launch and --hf is needed")
        args.launch = f"lightvl --model-path {args.hf} --dtype bfloat16"
    return args


def _size(text: str) -> tuple[int, int]:
    width, height = text.lower().split("x")
    return int(width), int(height)


def main() -> int:
    args = parse_args()
    with serving(args.url, args.launch) as server:
        rows = compare(server, args) if args.hf else asyncio.run(serve_scenarios(server, args))
    hidden = ("all ours", "all hf")
    print(table([{key: value for key, value in row.items() if key not in hidden} for row in rows]))
    settings = {key: vars(args)[key] for key in ("input_len", "output_len", "image_size", "same_image", "launch")}
    print(json.dumps(rounded({**settings, "cores": os.cpu_count(), "start_s": server.start_s, "rows": rows})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
