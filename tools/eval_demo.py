"""Exact answers of a running server with the embedded model, on held-out cases, over HTTP as any client asks.

    python tools/eval_demo.py --url http://127.0.0.1:8000 --cases 220

Renders scenes that training never saw, sends them as PNG data URLs to /v1/chat/completions (one in four streamed,
several at once), prints right answers by kind, then one line of JSON. Exits 1 below `--goal` percent, 2 where a request
failed.
"""

import argparse
import base64
import io
import json
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from demo_training.cases import Case, held_out_case
from PIL import Image

STREAMED_SHARE = 4  # one case in so many is streamed


@dataclass(frozen=True)
class Outcome:
    """What came back for one case."""

    number: int
    case: Case
    text: str
    error: str = ""

    @property
    def is_right(self) -> bool:
        return not self.error and self.text == self.case.answer


def data_url(image: Image.Image) -> str:
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def as_openai(case: Case) -> list[dict]:
    """The case as OpenAI chat messages; a message of one text is a plain string."""
    messages = []
    for role, parts in case.messages:
        content: str | list[dict] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in parts
        ]
        messages.append(
            {"role": role, "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else content}
        )
    return messages


def ask(url: str, model: str, number: int, timeout: float) -> Outcome:
    """Asks one held-out case; failures come back as outcomes."""
    case = held_out_case(number)
    stream = number % STREAMED_SHARE == 0
    body = {"model": model, "messages": as_openai(case), "max_tokens": 96, "temperature": 0, "stream": stream}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            text = read_stream(reply) if stream else json.load(reply)["choices"][0]["message"]["content"]
    except Exception as error:  # every way a request can fail is a finding, told at the end
        return Outcome(number, case, "", f"{type(error).__name__}: {error}")
    return Outcome(number, case, text)


def read_stream(lines: "io.BufferedIOBase") -> str:
    """The text of a stream of server-sent events; ValueError where it does not end with [DONE]."""
    text = ""
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        payload = line[6:].strip()
        if payload == b"[DONE]":
            return text
        event = json.loads(payload)
        if "error" in event:
            raise ValueError(event["error"])
        text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    raise ValueError("the stream ended without [DONE]")


def model_name(url: str) -> str:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as reply:
        return json.load(reply)["data"][0]["id"]


def report(outcomes: list[Outcome], show_wrong: int) -> dict:
    """Prints the table and some wrong answers; returns the numbers."""
    asked = Counter(outcome.case.kind for outcome in outcomes)
    right = Counter(outcome.case.kind for outcome in outcomes if outcome.is_right)
    for kind in sorted(asked):
        print(f"{kind:12} {right[kind]:4} of {asked[kind]:4}  {100 * right[kind] / asked[kind]:5.1f}%")
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    for outcome in wrong[:show_wrong]:
        question = next(part for part in outcome.case.messages[-1][1] if isinstance(part, str))
        print(f"  case {outcome.number}: {question!r}")
        print(f"    right {outcome.case.answer!r}\n    got   {outcome.error or outcome.text!r}")
    num_right = sum(right.values())
    return {
        "cases": len(outcomes),
        "right": num_right,
        "percent": round(100 * num_right / len(outcomes), 2),
        "errors": sum(bool(outcome.error) for outcome in outcomes),
        "by_kind": {kind: [right[kind], asked[kind]] for kind in sorted(asked)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--cases", type=int, default=220)
    parser.add_argument("--first", type=int, default=0, help="number of the first held-out case")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--goal", type=float, default=90, help="percent of exact answers")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one request")
    parser.add_argument("--show-wrong", type=int, default=5)
    args = parser.parse_args()
    url = args.url.rstrip("/").removesuffix("/v1")
    model = model_name(url)
    numbers = range(args.first, args.first + args.cases)
    with ThreadPoolExecutor(args.concurrency) as pool:
        outcomes = list(pool.map(lambda number: ask(url, model, number, args.timeout), numbers))
    numbers_of_run = report(outcomes, args.show_wrong)
    print(json.dumps(numbers_of_run))
    if numbers_of_run["errors"]:
        return 2
    return 0 if numbers_of_run["percent"] >= args.goal else 1


if __name__ == "__main__":
    sys.exit(main())
