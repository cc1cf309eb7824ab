"""Makes the embedded model: draws scenes, asks about them, trains a small Qwen2-VL from nothing, writes its folder.

    python tools/train_demo.py --minutes 80     # as long as given; the learning rate follows the clock
    python tools/train_demo.py --steps 5000     # the same weights again from the same seed, on the same machine

A run goes on from the checkpoint in `--work` where there is one; SIGTERM ends it with one, and a run may be stopped and
continued. On a shared machine: one thread, `nice`, and MALLOC_MMAP_THRESHOLD_=4000000000
MALLOC_TRIM_THRESHOLD_=8000000000 (freed memory is kept: one tenth faster).
"""

import argparse
import csv
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_training.evaluate import evaluate, table
from demo_training.guide import Guide, look_loss
from demo_training.mllama import Mllama
from demo_training.model import Architecture, answer_loss
from demo_training.qwen2_vl import Qwen2VL
from demo_training.samples import make_batch
from demo_training.sight import learn_to_see, make_head, make_views, name_loss
from demo_training.tokenizer import LLAMA_CONTROL, QWEN_TOKENS, train_tokenizer
from tokenizers import Tokenizer
from tqdm import tqdm

PACKAGE_FOLDER = Path(__file__).parents[1] / "lightvl" / "demo"
EVALUATED = "qwen2-vl"  # beside training; mllama through the server alone, transformers masks it otherwise
ARCHITECTURES = {"qwen2-vl": (Qwen2VL, QWEN_TOKENS), "mllama": (Mllama, LLAMA_CONTROL)}
WARMUP_STEPS = 100


@dataclass
class Clock:
    """How far the run is: by steps, or by computing time (evaluation and checkpoints included, pauses not)."""

    steps: int | None
    minutes: float | None
    step: int = 0
    seconds_before: float = 0.0  # of earlier runs that this one resumes
    started: float = 0.0

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.thread_time() - self.started

    @property
    def progress(self) -> float:
        by_time = self.seconds / (60 * self.minutes) if self.minutes else 0.0
        return max(by_time, self.step / self.steps if self.steps else 0.0)


def learning_rate(peak: float, clock: Clock) -> float:
    """Linear warm-up, then a cosine down to one hundredth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(clock.progress, 1.0)))
    return peak * min(1.0, (clock.step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * cosine)


def make_optimizer(model: torch.nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW, with decay for matrices only."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer_path = args.work / "tokenizer.json"
    build, control_tokens = ARCHITECTURES[args.arch]
    tokenizer = Tokenizer.from_file(str(tokenizer_path)) if tokenizer_path.exists() else train_tokenizer(control_tokens)
    tokenizer.save(str(tokenizer_path))
    net: Architecture = build(tokenizer, args.seed)
    net.model.train()
    torch.manual_seed(args.seed + 1)
    head = make_head(net.feature_size)
    learn_to_see(
        net,
        head,
        args.work / "sight.pt",
        seed=args.seed,
        num_steps=args.sight_steps,
        num_images=args.sight_rows,
        peak=args.sight_lr,
        autocast=not args.float32,
    )
    run = Run(args, net, head, Guide(tokenizer))
    run.restore()
    before = signal.signal(signal.SIGTERM, run.stop)
    run.go()
    signal.signal(signal.SIGTERM, before)
    if run.is_told_to_stop:
        return
    out = args.out or PACKAGE_FOLDER / args.arch.replace("-", "_")
    net.export(out)
    print(f"{run.clock.step} steps, {run.clock.seconds / 60:.1f} minutes, loss {run.mean_loss:.4f}")
    if args.arch == EVALUATED:
        print(table(evaluate(out, range(args.final_cases), 600)), flush=True)
    plot(args.work / "loss.csv")


class Run:
    """Training on answers: everything that a checkpoint keeps, and one step after the other."""

    def __init__(self, args: argparse.Namespace, net: Architecture, head: torch.nn.Module, guide: Guide) -> None:
        self.args, self.net, self.model, self.head = args, net, net.model, head
        self.writer, self.guide = net.writer(), guide
        self.optimizer = make_optimizer(torch.nn.ModuleList([net.model, head]), args.lr)
        self.clock = Clock(args.steps, args.minutes)
        self.mean_loss = 0.0
        self.checkpoint = args.work / "checkpoint.pt"
        self.is_told_to_stop = False

    def restore(self) -> None:
        """Goes on from the checkpoint where there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.head.load_state_dict(state["head"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.clock.step, self.clock.seconds_before = state["step"], state["seconds"]

    def stop(self, *_: object) -> None:
        """Ends the run after the present step, with a checkpoint to go on from."""
        self.is_told_to_stop = True

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.clock.step,
            "seconds": self.clock.seconds,
        }
        torch.save(state, self.checkpoint.with_suffix(".partial"))
        self.checkpoint.with_suffix(".partial").rename(self.checkpoint)

    def step(self) -> dict[str, float]:
        """One batch forth and back; returns what the log tells."""
        args = self.args
        lr = learning_rate(args.lr, self.clock)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = make_batch(self.writer, args.seed, self.clock.step, args.rows)
        # the tower goes on seeing more pictures than are asked about: they are cheap without text
        more = make_views(self.writer, args.seed + 1, self.clock.step, args.more_views) if args.more_views else None
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
            views = [self.net.encode(group) for group in batch.images]
            looks: dict[int, torch.Tensor] = {}
            loss = answer_loss(self.net, batch, views, looks)
            guided, shares = look_loss(self.guide.targets(batch), looks)
            named = [
                name_loss(self.head, view, group.labels)[0] for view, group in zip(views, batch.images, strict=True)
            ]
            if more is not None:
                named.append(2 * name_loss(self.head, self.net.encode(more), more.labels)[0])
        naming = sum(named) / max(len(named), 1)
        (loss + args.sight_weight * naming + args.look_weight * guided).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.step += 1
        value = float(loss.detach())
        self.mean_loss = value if not self.mean_loss else 0.98 * self.mean_loss + 0.02 * value
        return {"loss": value, "lr": lr, "norm": norm, **{f"look{layer}": share for layer, share in shares.items()}}

    def go(self) -> None:
        """Trains to the end, with a log, checkpoints and now and then some held-out cases."""
        args, clock = self.args, self.clock
        clock.started = time.thread_time()
        saved = evaluated = clock.seconds
        with (
            (args.work / "loss.csv").open("a", newline="") as log_file,
            tqdm(initial=clock.step, total=args.steps, mininterval=20) as bar,
        ):
            log = csv.writer(log_file)
            while clock.progress < 1 and not self.is_told_to_stop:
                told = self.step()
                log.writerow(
                    [clock.step, f"{clock.seconds:.1f}", *(f"{told[key]:.5f}" for key in ("loss", "lr", "norm"))]
                )
                bar.update()
                looked = {key: f"{value:.2f}" for key, value in told.items() if key.startswith("look")}
                bar.set_postfix(loss=f"{self.mean_loss:.3f}", **looked, done=f"{clock.progress:.0%}", refresh=False)
                if clock.seconds - saved > 60 * args.save_minutes:
                    self.save()
                    log_file.flush()
                    saved = clock.seconds
                if args.arch == EVALUATED and clock.seconds - evaluated > 60 * args.eval_minutes:
                    self.net.export(args.work / "export")
                    scores = evaluate(args.work / "export", range(args.eval_cases), 60)
                    bar.write(f"step {clock.step}, loss {self.mean_loss:.3f}\n" + table(scores))
                    evaluated = clock.seconds
        self.save()


def plot(log_path: Path) -> None:
    """The loss over the steps as loss.png beside the log, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    rows = list(csv.reader(log_path.open()))
    pyplot.semilogy([int(row[0]) for row in rows], [float(row[2]) for row in rows], linewidth=0.5)
    pyplot.xlabel("step")
    pyplot.ylabel("loss of answer tokens")
    pyplot.savefig(log_path.with_suffix(".png"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=tuple(ARCHITECTURES), default="qwen2-vl")
    parser.add_argument("--out", type=Path, help="the checkpoint folder to write; the package's own by default")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_run"), help="checkpoints and logs, outside git")
    parser.add_argument("--minutes", type=float, help="computing time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="training steps; with this alone a run can be repeated exactly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=12, help="images of one step")
    parser.add_argument("--sight-steps", type=int, default=5000, help="steps for the tower alone, before any text")
    parser.add_argument("--sight-rows", type=int, default=16, help="images of one such step")
    parser.add_argument("--sight-lr", type=float, default=2e-3)
    parser.add_argument("--more-views", type=int, default=40, help="images that are only named, in each step")
    parser.add_argument("--sight-weight", type=float, default=1.0, help="of naming tokens beside the answers' loss")
    parser.add_argument("--look-weight", type=float, default=0.5, help="of looking at what a word names")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="without bf16 autocast (CPUs without bf16)")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--eval-minutes", type=float, default=10)
    parser.add_argument("--eval-cases", type=int, default=62)
    parser.add_argument("--final-cases", type=int, default=220)
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        parser.error("give --minutes or --steps")
    return args


if __name__ == "__main__":
    train(parse_args())
