"""Teaching the tower to see before it is asked: each image token learns to name what it shows.

A small head reads the tower's output at every token; it stays beside the answers' loss and is thrown away at the end.
The tower alone is cheap (no text), and a text model that starts with tokens that tell shape, colour, letter and order
learns to answer many times sooner.
"""

import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .labels import FIELDS, IGNORED, NOTHING
from .model import Architecture
from .pictures import KINDS, pick_size, training_picture
from .samples import Writer
from .views import ImageGroup

SHARES = (45, 37, 10, 8)  # percent of pictures of each of KINDS: letters take longest
WEIGHTS = {"shape": 2.0, "glyph": 2.0, "order": 1.5}  # the hard ones; 1 for all other fields


def make_head(hidden_size: int) -> nn.Linear:
    """The head that names what a token shows."""
    return nn.Linear(hidden_size, sum(FIELDS.values()))


def make_views(writer: Writer, seed: int, step: int, num_images: int) -> ImageGroup:
    """Images of one size, with the labels of their tokens."""
    rng = random.Random(f"sight {seed} {step}")
    size = writer.fits(*pick_size(rng))
    pictures = [training_picture(rng.choices(KINDS, SHARES)[0], *size, rng) for _ in range(num_images)]
    return writer.group(pictures)


def name_loss(head: nn.Linear, features: Tensor, labels: np.ndarray) -> tuple[Tensor, dict[str, float]]:
    """Mean cross entropy over the fields for tokens (images, tokens, hidden), and the share of right names in each.

    Where a field has a class for nothing, tokens of that class weigh as much as all others together; they are left
    out of the share.
    """
    logits = head(features.flatten(0, 1)).float().split(list(FIELDS.values()), -1)
    right = torch.from_numpy(labels).flatten(0, 1)
    losses, weights, shares = [], [], {}
    for idx, (name, part) in enumerate(zip(FIELDS, logits, strict=True)):
        known = (right[:, idx] != IGNORED).nonzero().flatten()
        if not len(known):
            continue
        truth = right[known, idx]
        surprise = F.cross_entropy(part[known], truth, reduction="none")
        is_some = truth != NOTHING.get(name, -1)
        groups = [surprise[group] for group in (is_some, ~is_some) if group.any()]
        losses.append(torch.stack([group.mean() for group in groups]).mean() * WEIGHTS.get(name, 1.0))
        weights.append(WEIGHTS.get(name, 1.0))
        if is_some.any():
            shares[name] = float((part[known].detach().argmax(-1) == truth)[is_some].float().mean())
    return torch.stack(losses).sum() / sum(weights), shares


def sight_rate(peak: float, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to a fifth: the answers go on from there."""
    return peak * min(1.0, (step + 1) / 100) * (0.2 + 0.4 * (1 + math.cos(math.pi * step / num_steps)))


def learn_to_see(
    net: Architecture,
    head: nn.Linear,
    checkpoint: Path,
    *,
    seed: int,
    num_steps: int,
    num_images: int,
    peak: float,
    autocast: bool,
) -> None:
    """Trains the tower of `net` and the head in place; goes on from the checkpoint where there is one."""
    tower, writer = net.tower, net.writer()
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    start, means = 0, dict.fromkeys(("loss", *FIELDS), 0.0)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        tower.load_state_dict(state["tower"])
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        start, means = state["step"], state["means"]
    with tqdm(range(start, num_steps), "seeing", initial=start, total=num_steps, mininterval=20) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = sight_rate(peak, step, num_steps)
            views = make_views(writer, seed, step, num_images)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, shares = name_loss(head, net.encode(views), views.labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for name, value in {"loss": float(loss.detach()), **shares}.items():
                means[name] = value if step < 20 or not means[name] else 0.98 * means[name] + 0.02 * value
            bar.set_postfix({name: f"{value:.2f}" for name, value in means.items()}, refresh=False)
            if (step + 1) % 500 == 0 or step + 1 == num_steps:
                state = {"tower": tower.state_dict(), "head": head.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step + 1, "means": means}, checkpoint.with_suffix(".partial"))
                checkpoint.with_suffix(".partial").rename(checkpoint)
