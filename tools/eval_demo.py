r"""Exact answers of the embedded model on held-out cases, asked over HTTP as any client asks.

    python tools/eval_demo.py --url http://127.0.0.1:8000
    python tools/eval_demo.py --launch "lightvl --dtype bfloat16" --launch "lightvl --dtype float32" --cases 2000
    python tools/eval_demo.py --launch "lightvl --model-path demo:mllama" --tell-order \
        --launch "lightvl --model-path demo:mllama --chat-template llama_3_vision"    # with and without a system block

Draws pictures that training never saw and asks in wordings that it never heard (half of them streamed, several at
once), then crops of photographs, which are to be declined, and questions by hand about pictures that no training code
has drawn. Prints right answers by kind, which word was taken for which, and one line of JSON for each server;
`--pictures` names a file for a sheet of what went wrong. Exits 1 below a goal, 2 where a request failed.
"""

import argparse
import base64
import difflib
import io
import json
import random
import sys
import textwrap
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.server import serving
from demo_training.by_hand import questions_by_hand, second_turns
from demo_training.cases import Case, held_out_case
from demo_training.dialogues import IMAGE_LEADS
from demo_training.photographs import crops
from demo_training.phrases import wording
from demo_training.questions import DECLINE, ORDINALS
from PIL import Image, ImageDraw
from tqdm import tqdm

CELL = (260, 330)  # pixels of one failure on the sheet
MAX_SHOWN = 60
# Kinds that are counted apart from the held-out cases, and how they are called.
APART = {"photograph": "photographs declined", "by_hand": "by hand", "turn_by_hand": "second turns by hand"}


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

    @property
    def question(self) -> str:
        return " ".join(part for part in self.case.messages[-1][1] if isinstance(part, str))

    @property
    def images(self) -> list[Image.Image]:
        return [part for _, parts in self.case.messages for part in parts if isinstance(part, Image.Image)]


def photograph_cases(num_cases: int, folders: Sequence[Path]) -> list[Case]:
    """Crops of photographs, asked what one asks of any image."""
    rng, cases = random.Random("photographs"), []
    for crop in crops(num_cases, folders):
        question = wording("describe", rng, held_out=rng.random() < 0.5)
        cases.append(Case("photograph", (("user", (crop, question)),), DECLINE))
    return cases


def data_url(image: Image.Image) -> str:
    packed = io.BytesIO()
    image.save(packed, "PNG")
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def as_openai(case: Case, tell_order: bool) -> list[dict]:
    """The case as OpenAI chat messages; a message of one text is a plain string. `tell_order`: words go before each of
    several images."""
    messages = []
    for role, parts in case.messages:
        if tell_order and sum(isinstance(part, Image.Image) for part in parts) > 1:
            parts = with_order_told(parts)
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


def with_order_told(parts: Sequence[str | Image.Image]) -> tuple[str | Image.Image, ...]:
    told: list[str | Image.Image] = []
    leads = (IMAGE_LEADS[2].format(nth=nth) for nth in ORDINALS)
    for part in parts:
        told += [next(leads), part] if isinstance(part, Image.Image) else [part]
    return tuple(told)


def ask(url: str, model: str, number: int, case: Case, args: argparse.Namespace) -> Outcome:
    """Asks one case, every other one streamed; failures come back as outcomes."""
    stream = number % 2 == 0
    messages = as_openai(case, args.tell_order)
    body = {"model": model, "messages": messages, "max_tokens": 160, "temperature": 0, "stream": stream}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=args.timeout) as reply:
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


def ask_all(url: str, args: argparse.Namespace) -> list[Outcome]:
    """All cases, `--concurrency` at a time; pictures are drawn by the threads that send them."""
    model, photographs = model_name(url), photograph_cases(args.photographs, args.photograph_folder)
    if len(photographs) < args.photographs:
        print("no photographs: install scikit-image, scikit-learn and matplotlib, or name --photograph-folder")

    apart = [*photographs, *questions_by_hand(), *second_turns()]

    def one(number: int) -> Outcome:
        case = held_out_case(args.first + number) if number < args.cases else apart[number - args.cases]
        return ask(url, model, args.first + number, case, args)

    num_cases = args.cases + len(apart)
    with ThreadPoolExecutor(args.concurrency) as pool:
        return list(tqdm(pool.map(one, range(num_cases)), "asking", num_cases, mininterval=5))


def confusions(outcomes: Sequence[Outcome]) -> Counter[tuple[str, str]]:
    """(right word, word said instead) -> how often, over wrong answers; "" for what was left out or added."""
    table: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        if outcome.is_right or outcome.error or outcome.case.kind == "photograph":
            continue
        right, said = outcome.case.answer.split(), outcome.text.split()
        for tag, start, end, other_start, other_end in difflib.SequenceMatcher(None, right, said, False).get_opcodes():
            if tag != "equal":
                wanted, got = right[start:end], said[other_start:other_end]
                for idx in range(max(len(wanted), len(got))):
                    table["".join(wanted[idx : idx + 1]), "".join(got[idx : idx + 1])] += 1
    return table


def report(outcomes: Sequence[Outcome], show_wrong: int) -> dict:
    """Prints the tables and some wrong answers; returns the numbers."""
    drawn = [outcome for outcome in outcomes if outcome.case.kind not in APART]
    apart = {kind: [outcome.is_right for outcome in outcomes if outcome.case.kind == kind] for kind in APART}
    asked = Counter(outcome.case.kind for outcome in drawn)
    right = Counter(outcome.case.kind for outcome in drawn if outcome.is_right)
    for kind in sorted(asked):
        print(f"{kind:15} {right[kind]:4} of {asked[kind]:4}  {100 * right[kind] / asked[kind]:5.1f}%")
    print(f"{'all':15} {right.total():4} of {len(drawn):4}  {100 * right.total() / max(1, len(drawn)):5.1f}%")
    for kind, are_right in apart.items():
        if are_right:
            print(f"{APART[kind]}: {sum(are_right)} of {len(are_right)}  {100 * sum(are_right) / len(are_right):.1f}%")
    print("taken for (right -> said):")
    for (wanted, got), times in confusions(outcomes).most_common(24):
        print(f"  {times:4}  {wanted or '(nothing)':14} -> {got or '(nothing)'}")
    wrong = [outcome for outcome in outcomes if not outcome.is_right]
    for outcome in wrong[:show_wrong]:
        print(f"  case {outcome.number} ({outcome.case.kind}): {outcome.question!r}")
        print(f"    right {outcome.case.answer!r}\n    got   {outcome.error or outcome.text!r}")
    return {
        "cases": len(drawn),
        "right": right.total(),
        "percent": round(100 * right.total() / max(1, len(drawn)), 2),
        **{APART[kind].replace(" ", "_"): [sum(are_right), len(are_right)] for kind, are_right in apart.items()},
        "errors": sum(bool(outcome.error) for outcome in outcomes),
        "by_kind": {kind: [right[kind], asked[kind]] for kind in sorted(asked)},
    }


def draw_failures(outcomes: Sequence[Outcome], path: Path) -> None:
    """A sheet of the first wrong answers: the images, the question, what is right, what was said."""
    wrong = [outcome for outcome in outcomes if not outcome.is_right][:MAX_SHOWN]
    columns = 6
    sheet = Image.new("RGB", (columns * CELL[0], max(1, -(-len(wrong) // columns)) * CELL[1]), (250, 250, 250))
    pen = ImageDraw.Draw(sheet)
    for idx, outcome in enumerate(wrong):
        left, top = idx % columns * CELL[0], idx // columns * CELL[1]
        images = outcome.images
        for number, image in enumerate(images):
            small = image.copy()
            small.thumbnail((CELL[0] // len(images) - 6, 170))
            sheet.paste(small, (left + 3 + number * CELL[0] // len(images), top + 3))
        told = (f"{outcome.number} {outcome.case.kind}: {outcome.question}", outcome.case.answer, outcome.text)
        for text, colour, y in zip(told, ("black", "darkgreen", "firebrick"), (178, 222, 274), strict=True):
            pen.text((left + 4, top + y), "\n".join(textwrap.wrap(text, 44)[:4]), colour)
    sheet.save(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", default="http://127.0.0.1:8000")
    where.add_argument("--launch", action="append", default=[], help="a command that starts a server; may be repeated")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=100_000, help="number of the first held-out case")
    parser.add_argument("--photographs", type=int, default=300, help="crops to be declined")
    parser.add_argument("--photograph-folder", type=Path, action="append", default=[], help="site-packages to look in")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument(
        "--tell-order",
        action="store_true",
        help="say before each of several images which one it is: mllama cannot tell images side by side apart",
    )
    parser.add_argument("--goal", type=float, default=90, help="percent of exact answers")
    parser.add_argument("--decline-goal", type=float, default=95, help="percent of photographs declined")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one request")
    parser.add_argument("--show-wrong", type=int, default=5)
    parser.add_argument("--pictures", type=Path, help="file for a sheet of wrong answers, of the first server")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    failed, missed = False, False
    for number, launch in enumerate(args.launch or [None]):
        url = None if launch else args.url.rstrip("/").removesuffix("/v1")
        with serving(url, launch) as server:
            outcomes = ask_all(server.url, args)
        if launch:
            print(f"== {launch}")
        numbers = report(outcomes, args.show_wrong)
        print(json.dumps(numbers), flush=True)
        if args.pictures and number == 0:
            draw_failures(outcomes, args.pictures)
        declined, shown = numbers["photographs_declined"]
        failed |= numbers["errors"] > 0
        missed |= numbers["percent"] < args.goal or 100 * declined < args.decline_goal * shown
    return 2 if failed else 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
