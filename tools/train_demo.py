"""Makes the embedded model: draws scenes, asks about them, trains a small Qwen2-VL from nothing, writes its folder.

    python tools/train_demo.py --minutes 80     # as long as given; the learning rate follows the clock
    python tools/train_demo.py --steps 5000     # the same weights again from the same seed, on the same machine

A run goes on from the checkpoint in `--work` where there is one. On a shared machine: one thread, `nice`, and
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 (freed memory is kept: one tenth faster).
"""

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_training.evaluate import evaluate, table
from demo_training.guide import Guide, look_loss
from demo_training.model import answer_loss, build_model, encode_images, export
from demo_training.samples import Writer, make_batch
from demo_training.sight import learn_to_see, make_head, name_loss
from demo_training.tokenizer import train_tokenizer
from tokenizers import Tokenizer
from tqdm import tqdm

PACKAGE_FOLDER = Path(__file__).parents[1] / "lightvl" / "demo" / "qwen2_vl"
WARMUP_STEPS = 100


@dataclass
class Clock:
    """How far the run is: by steps, or by training time (evaluation and checkpoints included)."""

    steps: int | None
    minutes: float | None
    step: int = 0
    seconds_before: float = 0.0  # of earlier runs that this one resumes
    started: float = 0.0

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

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
    tokenizer = Tokenizer.from_file(str(tokenizer_path)) if tokenizer_path.exists() else train_tokenizer()
    tokenizer.save(str(tokenizer_path))
    model = build_model(tokenizer, args.seed).train()
    head = make_head(model)
    optimizer = make_optimizer(torch.nn.ModuleList([model, head]), args.lr)
    clock = Clock(args.steps, args.minutes)
    checkpoint = args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        clock.step, clock.seconds_before = state["step"], state["seconds"]
    clock.started = time.monotonic()

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "head": head.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": clock.step,
            "seconds": clock.seconds,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").rename(checkpoint)

    if clock.step == 0:
        learn_to_see(model, head, args.seed, args.sight_steps, args.sight_rows, args.sight_lr, not args.float32)
        save()
    guide = Guide(tokenizer)
    writer, saved, evaluated = Writer(tokenizer), clock.seconds, clock.seconds
    log_path = args.work / "loss.csv"
    with log_path.open("a", newline="") as log_file, tqdm(initial=clock.step, total=args.steps, mininterval=10) as bar:
        log = csv.writer(log_file)
        mean_loss = 0.0
        while clock.progress < 1:
            lr = learning_rate(args.lr, clock)
            for group in optimizer.param_groups:
                group["lr"] = lr
            batch = make_batch(writer, args.seed, clock.step, args.rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                views = [encode_images(model, group) for group in batch.images]
                looks: dict[int, torch.Tensor] = {}
                loss = answer_loss(model, batch, views, looks)
                guided, shares = look_loss(guide.targets(batch), looks)
                named = [
                    name_loss(head, view, group.labels)[0] for view, group in zip(views, batch.images, strict=True)
                ]
            (loss + args.sight_weight * sum(named) + args.look_weight * guided).backward()
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            if math.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.step += 1
            value = float(loss.detach())
            mean_loss = value if not mean_loss else 0.98 * mean_loss + 0.02 * value
            log.writerow([clock.step, f"{clock.seconds:.1f}", f"{value:.4f}", f"{lr:.6f}", f"{norm:.3f}"])
            bar.update()
            if clock.step % 10 == 0:
                looked = " ".join(f"{share:.2f}" for share in shares.values())
                bar.set_postfix(loss=f"{mean_loss:.3f}", looked=looked, done=f"{clock.progress:.0%}", refresh=False)
                log_file.flush()
            if clock.seconds - saved > 60 * args.save_minutes:
                save()
                saved = clock.seconds
            if clock.seconds - evaluated > 60 * args.eval_minutes:
                export(model, tokenizer, args.work / "export")
                bar.write(
                    f"step {clock.step}, loss {mean_loss:.3f}\n" + table(evaluate(args.work / "export", range(88), 60))
                )
                evaluated = clock.seconds
    save()
    export(model, tokenizer, args.out)
    print(f"{clock.step} steps, {clock.seconds / 60:.1f} minutes, loss {mean_loss:.4f}")
    print(table(evaluate(args.out, range(args.final_cases), 600)), flush=True)
    plot(log_path)


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
    parser.add_argument("--out", type=Path, default=PACKAGE_FOLDER, help="the checkpoint folder to write")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo_run"), help="checkpoints and logs, outside git")
    parser.add_argument("--minutes", type=float, help="training time; the schedule follows the clock")
    parser.add_argument("--steps", type=int, help="training steps; with this alone a run can be repeated exactly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20, help="images of one step")
    parser.add_argument("--sight-steps", type=int, default=1000, help="steps for the tower alone, before any text")
    parser.add_argument("--sight-rows", type=int, default=32, help="images of one such step")
    parser.add_argument("--sight-lr", type=float, default=2e-3)
    parser.add_argument("--sight-weight", type=float, default=0.5, help="of naming tokens beside the answers' loss")
    parser.add_argument("--look-weight", type=float, default=0.5, help="of looking at what a word names")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="without bf16 autocast (CPUs without bf16)")
    parser.add_argument("--save-minutes", type=float, default=3)
    parser.add_argument("--eval-minutes", type=float, default=8)
    parser.add_argument("--final-cases", type=int, default=220)
    args = parser.parse_args()
    if args.steps is None and args.minutes is None:
        parser.error("give --minutes or --steps")
    return args


if __name__ == "__main__":
    train(parse_args())
