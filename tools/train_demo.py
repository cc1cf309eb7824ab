r"""Makes the embedded model: draws scenes, asks about them, trains a small model from nothing, writes its folder.

    python tools/train_demo.py --minutes 128 --processes 2                 # on two cores, in 2 hours and 20 minutes
    python tools/train_demo.py --minutes 9 --device cuda --workers 12 \
        --sight-rows 128 --rows 64 --more-views 64 --lr 1.5e-3
    python tools/train_demo.py --steps 5000     # the same weights again from the same seed, on the same machine

First the tower alone learns to name what its tokens show, then everything learns to answer. The learning rate follows
the clock. A run goes on from the checkpoint in `--work` where there is one; SIGTERM or the end of a `--stint` ends it
with one, and a run may be stopped and continued. On a CPU one process of one thread for each core is fastest, with
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 (freed memory is kept: one tenth faster) and
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 (large pages: another tenth).
"""

import argparse
import csv
import functools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_training.evaluate import evaluate, table
from demo_training.guide import Guide, kept_loss, look_loss, match_loss
from demo_training.lessons import Lesson, Teacher, in_order
from demo_training.mllama import Mllama
from demo_training.model import Architecture, answer_loss
from demo_training.muon import Muon
from demo_training.prints import missing_fonts
from demo_training.qwen2_vl import Qwen2VL
from demo_training.samples import KEPT, MATCHED
from demo_training.sight import make_head, name_loss, name_shares
from demo_training.team import Team
from demo_training.tokenizer import LLAMA_CONTROL, QWEN_TOKENS, train_tokenizer
from demo_training.views import by_grid, join
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

PACKAGE_FOLDER = Path(__file__).parents[1] / "lightvl" / "demo"
EVALUATED = "qwen2-vl"  # beside training; mllama through the server alone, transformers masks it otherwise
ARCHITECTURES = {"qwen2-vl": (Qwen2VL, QWEN_TOKENS), "mllama": (Mllama, LLAMA_CONTROL)}
WARMUP_STEPS = 100  # of sight, and again of answers
DECAY = 0.05
TOKENIZER, MEETING_POINT = "tokenizer.json", "meeting"  # files in the work folder


@dataclass
class Clock:
    """How far the run is: by steps, or by time (evaluation and checkpoints included, pauses between runs not)."""

    steps: int | None
    minutes: float | None
    team: Team
    step: int = 0
    seconds_before: float = 0.0  # of earlier runs that this one resumes

    @property
    def seconds(self) -> float:
        return self.seconds_before + self.team.seconds

    @property
    def progress(self) -> float:
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_time, self.step / self.steps if self.steps else 0.0)


def cosine_rate(peak: float, last: float, steps_done: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to the share `last` of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
    return peak * min(1.0, (steps_done + 1) / WARMUP_STEPS) * (last + (1 - last) * cosine)


def make_optimizers(net: Architecture, head: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, which learn in half of the steps with it; AdamW for all others, of which vectors
    do not decay."""
    outer = {id(weight) for part in (head, net.model.lm_head) for weight in part.parameters()}
    inner = [module.weight for module in net.model.modules() if isinstance(module, torch.nn.Linear)]
    inner = [weight for weight in inner if id(weight) not in outer]
    learned_by_muon = {id(weight) for weight in inner}
    others = [w for part in (net.model, head) for w in part.parameters() if id(w) not in learned_by_muon]
    groups = [
        {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": DECAY},
        {"params": [weight for weight in others if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    return [
        Muon(inner, weight_decay=DECAY),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True),
    ]


def train(args: argparse.Namespace) -> None:
    """Trains in this process and in others beside it."""
    args.work.mkdir(parents=True, exist_ok=True)
    if missing := missing_fonts():
        print(f"without {', '.join(missing)} (Debian's fonts-dejavu-core, or matplotlib) words are learned less well")
    (args.work / MEETING_POINT).unlink(missing_ok=True)
    if not (args.work / TOKENIZER).exists():
        train_tokenizer(ARCHITECTURES[args.arch][1]).save(str(args.work / TOKENIZER))
    start = multiprocessing.get_context("spawn").Process
    others = [start(target=train_part, args=(args, rank), daemon=True) for rank in range(1, args.processes)]
    for process in others:
        process.start()
    train_part(args, 0)
    for process in others:
        process.join()


def train_part(args: argparse.Namespace, rank: int) -> None:
    """What each process does; the first one alone (rank 0) tells, saves and exports."""
    torch.set_num_threads(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker is one thread
    tokenizer = Tokenizer.from_file(str(args.work / TOKENIZER))
    net: Architecture = ARCHITECTURES[args.arch][0](tokenizer, args.seed)
    net.model.train()
    torch.manual_seed(args.seed + 1)
    # a machine with an accelerator is lent by the minute; on a shared CPU only the time that was given counts
    clock = time.thread_time if args.device == "cpu" else time.monotonic
    team = Team(rank, args.processes, args.work / MEETING_POINT, clock)
    run = Run(args, net, make_head(net.feature_size), Teacher(net.writer(), Guide(tokenizer), args.seed, rank), team)
    run.restore()
    before = signal.signal(signal.SIGTERM, run.stop)
    run.go()
    signal.signal(signal.SIGTERM, before)
    team.leave()
    if rank:
        return
    print(f"{run.clock.step} steps, {run.clock.seconds / 60:.1f} minutes, loss {run.mean_loss:.4f}", flush=True)
    if run.clock.progress < 1:
        return
    out = args.out or PACKAGE_FOLDER / args.arch.replace("-", "_")
    net.export(out)
    if args.arch == EVALUATED and args.final_cases:
        print(table(evaluate(out, range(args.final_cases), 600)), flush=True)
    plot(args.work / "loss.csv")


class Run:
    """Training: everything that a checkpoint keeps, and one step after the other."""

    def __init__(
        self, args: argparse.Namespace, net: Architecture, head: torch.nn.Module, teacher: Teacher, team: Team
    ) -> None:
        self.team = team
        self.args, self.net, self.model, self.head, self.teacher = args, net, net.model, head, teacher
        self.device = torch.device(args.device)
        # a GPU waits for the host's calls, so it gets few and large ones; a CPU's caches hold one group's attention
        self.joins_images = self.device.type != "cpu"
        learner = torch.nn.ModuleList([net.model, head]).to(self.device)
        self.weights = list(learner.parameters())
        self.optimizers = make_optimizers(net, head)
        self.clock = Clock(args.steps, args.minutes, team)
        self.answers_from: int | None = None  # the step at which sight was done
        self.mean_loss = 0.0
        self.checkpoint = args.work / "checkpoint.pt"

    def restore(self) -> None:
        """Goes on from the checkpoint where there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
            for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.clock.step, self.clock.seconds_before = state["step"], state["seconds"]
            self.answers_from, self.mean_loss = state["answers_from"], state["mean_loss"]

    def stop(self, *_: object) -> None:
        """Ends the run after the present step, with a checkpoint to go on from."""
        self.team.wants_to_stop = True

    def save(self) -> None:
        """Writes the checkpoint, with the optimizers' moments in bf16: two thirds of the size."""
        self.team.check(self.weights)
        kept = [optimizer.state_dict() for optimizer in self.optimizers]
        for optimizer, state in zip(self.optimizers, kept, strict=True):
            for moments in state["state"].values():
                moments |= {name: value.to(torch.bfloat16) for name, value in moments.items() if name != "step"}
            optimizer.load_state_dict(state)  # so that a run that goes on and one that resumes stay the same
        if self.team.rank:
            return
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizers": kept,
            "step": self.clock.step,
            "seconds": self.clock.seconds,
            "answers_from": self.answers_from,
            "mean_loss": self.mean_loss,
        }
        torch.save(state, self.checkpoint.with_suffix(".partial"))
        self.checkpoint.with_suffix(".partial").rename(self.checkpoint)

    def learning_rate(self) -> float:
        args, clock = self.args, self.clock
        if self.answers_from is None:
            return cosine_rate(args.sight_lr, 0.2, clock.step, clock.progress / args.sight_share)
        progress = (clock.progress - args.sight_share) / (1 - args.sight_share)
        return cosine_rate(args.lr, 0.01, clock.step - self.answers_from, progress)

    def lessons(self) -> Iterator[Lesson]:
        """The lessons of the present phase, from this step on."""
        args = self.args
        if self.answers_from is None:
            make = functools.partial(self.teacher.sight, args.sight_rows)
        else:
            make = functools.partial(self.teacher.answers, args.rows, args.more_views, self.answers_from)
        return in_order(make, self.clock.step, args.workers, pin_memory=args.device != "cpu")

    def loss(self, lesson: Lesson, told: dict[str, Tensor] | None) -> Tensor:
        """What is to become small; fills `told` with its parts and the shares of what is right."""
        args = self.args
        views, naming = self.views(lesson, told)
        total = args.sight_weight * naming
        for idx, (batch, guidance) in enumerate(zip(lesson.batches, lesson.guidance, strict=True)):
            looks: dict[int, Tensor] = {}
            answers = answer_loss(self.net, batch, views[: len(batch.images)], looks)
            views = views[len(batch.images) :]
            guided, shares = look_loss(guidance.targets, looks)
            total = total + answers + args.look_weight * guided
            if guidance.kept is not None:
                keeping = kept_loss(self.head, guidance.kept, looks[KEPT])
                total = total + args.look_weight * keeping
                if told is not None:
                    told["keeping"] = keeping.detach()
            if guidance.matched is not None:
                matching, right = match_loss(guidance.matched, looks[MATCHED])
                total = total + args.match_weight * matching
                if told is not None:
                    told |= right
            if told is not None:
                told |= {f"look{layer}": share for layer, share in shares.items()} if idx == 0 else {}
                told["others" if idx else "answers"] = answers.detach()
        return total

    def views(self, lesson: Lesson, told: dict[str, Tensor] | None) -> tuple[list[Tensor], Tensor]:
        """What the tower sees in each group of images, batch after batch, and its mean loss of naming it."""
        groups = [group for batch in lesson.batches for group in batch.images] + lesson.views
        views: dict[int, Tensor] = {}
        losses = []
        for idxs in by_grid(groups) if self.joins_images else ([idx] for idx in range(len(groups))):
            joined = join([groups[idx] for idx in idxs])
            seen = self.net.encode(joined)
            loss, logits = name_loss(self.head, seen, joined)
            losses.append(loss)
            views |= zip(idxs, seen.split([len(groups[idx].patches) for idx in idxs]), strict=True)
        naming = sum(losses) / len(groups)
        if told is not None:
            told |= name_shares(logits.detach(), joined)
            told["naming"] = naming.detach()
        return [views[idx] for idx in range(len(groups))], naming

    def step(self, lesson: Lesson, is_told: bool) -> dict[str, float]:
        """One lesson forth and back; returns what the log tells."""
        lr = self.learning_rate()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        told: dict[str, Tensor] | None = {} if is_told else None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.args.float32):
            loss = self.loss(lesson.to(self.device), told)
        loss.backward()
        self.team.average(self.weights)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        is_finite = bool(norm.isfinite())  # the one moment of a step that waits for the device
        for optimizer in self.optimizers:
            if is_finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.clock.step += 1
        return {"lr": lr, "norm": float(norm), **{name: float(value) for name, value in told.items()}} if told else {}

    def go(self) -> None:
        """Trains to the end, or to that of the stint, with a log, checkpoints and now and then some held-out cases."""
        args, clock = self.args, self.clock
        saved = evaluated = clock.seconds
        end = time.monotonic() + 60 * args.stint
        lessons = self.lessons()
        with (
            (args.work / "loss.csv").open("a", newline="") as log_file,
            tqdm(initial=clock.step, total=args.steps, mininterval=5, disable=self.team.rank > 0) as bar,
        ):
            log = csv.writer(log_file)
            while clock.progress < 1 and not self.team.is_told_to_stop:
                self.team.wants_to_stop |= time.monotonic() > end
                if self.answers_from is None and clock.progress >= args.sight_share:
                    self.answers_from = clock.step
                    lessons = self.lessons()
                told = self.step(next(lessons), self.team.rank == 0 and clock.step % args.tell_steps == 0)
                bar.update()
                if told:
                    value = told.get("answers", told["naming"])
                    self.mean_loss = value if not self.mean_loss else 0.9 * self.mean_loss + 0.1 * value
                    columns = [told.get(name, "") for name in ("naming", "answers", "lr", "norm")]
                    log.writerow([clock.step, f"{clock.seconds:.1f}", *columns])
                    log_file.flush()
                    values = " ".join(f"{name} {value:.2g}" for name, value in told.items())
                    bar.set_postfix_str(f"{clock.progress:.0%} {clock.seconds:.0f}s {values}", refresh=False)
                if clock.seconds - saved > 60 * args.save_minutes:
                    self.save()
                    saved = clock.seconds
                is_judge = args.arch == EVALUATED and not self.team.rank
                if is_judge and self.answers_from and clock.seconds - evaluated > 60 * args.eval_minutes:
                    self.net.export(args.work / "export")
                    scores = evaluate(args.work / "export", range(args.eval_cases), 60)
                    bar.write(f"step {clock.step}, loss {self.mean_loss:.3f}\n" + table(scores))
                    evaluated = clock.seconds
        self.save()


def plot(log_path: Path) -> None:
    """The losses over the steps as loss.png beside the log, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    rows = list(csv.reader(log_path.open()))
    for column, name in ((2, "names of image tokens"), (3, "tokens of answers")):
        points = [(int(row[0]), float(row[column])) for row in rows if row[column]]
        pyplot.semilogy(*zip(*points, strict=True), linewidth=0.5, label=name)
    pyplot.xlabel("step")
    pyplot.ylabel("loss")
    pyplot.legend()
    pyplot.savefig(log_path.with_suffix(".png"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), default="qwen2-vl")
    parser.add_argument("--out", type=Path, help="the checkpoint folder to write; the package's own by default")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_run"), help="checkpoints and logs, outside git")
    parser.add_argument("--minutes", type=float, help="of computing on a CPU, by the clock on a GPU; over all runs")
    parser.add_argument("--steps", type=int, help="training steps; with this alone a run can be repeated exactly")
    parser.add_argument("--stint", type=float, default=math.inf, help="minutes of this run, to go on later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures ahead of time")
    parser.add_argument("--sight-share", type=float, default=0.25, help="of the run: the tower alone, before any text")
    parser.add_argument("--sight-rows", type=int, default=16, help="images of one such step")
    parser.add_argument("--sight-lr", type=float, default=3e-3, help="peak learning rate of sight")
    parser.add_argument("--rows", type=int, default=8, help="images of a step, with several questions each")
    parser.add_argument("--more-views", type=int, default=8, help="images that are only named, in each such step")
    parser.add_argument("--sight-weight", type=float, default=1.0, help="of naming tokens beside the answers' loss")
    parser.add_argument("--look-weight", type=float, default=0.5, help="of looking at what a word names")
    parser.add_argument("--match-weight", type=float, default=2.0, help="of telling which words of two texts differ")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of answers")
    parser.add_argument("--processes", type=int, default=1, help="that train together, on a CPU: one for each core")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--float32", action="store_true", help="without bf16 autocast (CPUs without bf16)")
    parser.add_argument("--tell-steps", type=int, default=20, help="steps from one line of the log to the next")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--eval-minutes", type=float, default=10)
    parser.add_argument("--eval-cases", type=int, default=62)
    parser.add_argument("--final-cases", type=int, default=220)
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        parser.error("give --minutes or --steps")
    if args.processes > 1 and (args.device != "cpu" or args.workers):
        parser.error("--processes are for CPUs and draw their own pictures: no --device and no --workers beside them")
    return args


if __name__ == "__main__":
    train(parse_args())
