"""Teaching the tower to see before it is asked: each image token learns to name the thing it shows.

A small head, thrown away afterwards, reads the tower's output at every token. The tower alone is cheap (no text), and a
text model that starts with tokens that tell shape and colour learns to answer many times sooner.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from .model import encode_images
from .samples import PATCH, SIDES, SMALL_SIDES, UNIT, ImageGroup, patchify
from .scenes import COLOURS, SHAPES, SIZES, Spot, draw, draw_scene, lay_out

FIELDS = (len(COLOURS) + 1, len(SHAPES), len(SIZES), 4)  # colour (or the ground), shape, size, place
IGNORED = -100
SMALL_SHARE = 0.6  # of the steps are on small images


def token_labels(spots: list[Spot], width: int, height: int) -> np.ndarray:
    """(tokens, fields): what each image token shows; the ground is a colour of its own, edges of things are ignored."""
    labels = np.full((height // UNIT, width // UNIT, len(FIELDS)), IGNORED, np.int64)
    y, x = np.meshgrid(np.arange(height // UNIT) + 0.5, np.arange(width // UNIT) + 0.5, indexing="ij")
    away = np.stack([np.maximum(abs(x * UNIT - spot.x), abs(y * UNIT - spot.y)) - spot.radius for spot in spots])
    labels[(away > UNIT / 2).all(0), 0] = len(COLOURS)
    for spot in spots:
        thing = spot.thing
        shown = np.hypot(x * UNIT - spot.x, y * UNIT - spot.y) < spot.radius * 0.85
        shown[int(spot.y // UNIT), int(spot.x // UNIT)] = True
        labels[shown] = (
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            SIZES.index(thing.size),
            thing.place_idx,
        )
    return labels.reshape(-1, len(FIELDS))


def make_views(seed: int, step: int, num_images: int, small: bool) -> tuple[ImageGroup, np.ndarray]:
    """Images of one size, and the labels of their tokens (images * tokens, fields)."""
    rng = random.Random(f"sight {seed} {step}")
    sides = SMALL_SIDES if small else SIDES
    width, height = rng.choice(sides), rng.choice(sides)
    patches, labels = [], []
    for _ in range(num_images):
        spots = lay_out(draw_scene(rng), width, height, rng)
        patches.append(patchify(draw(spots, width, height, rng)))
        labels.append(token_labels(spots, width, height))
    return ImageGroup((height // PATCH, width // PATCH), np.stack(patches)), np.concatenate(labels)


def sight_loss(
    model: Qwen2VLForConditionalGeneration, head: nn.Linear, group: ImageGroup, labels: np.ndarray
) -> tuple[Tensor, list[float]]:
    """Mean cross entropy over the fields, and the share of right names in each."""
    logits = head(encode_images(model, group).flatten(0, 1)).float().split(FIELDS, -1)
    right = torch.from_numpy(labels)
    losses = [F.cross_entropy(part, right[:, idx], ignore_index=IGNORED) for idx, part in enumerate(logits)]
    known = [right[:, idx] != IGNORED for idx in range(len(FIELDS))]
    shares = [float((part.argmax(-1) == right[:, idx])[known[idx]].float().mean()) for idx, part in enumerate(logits)]
    return torch.stack(losses).mean(), shares


def learn_to_see(
    model: Qwen2VLForConditionalGeneration, seed: int, num_steps: int, num_images: int, peak: float, autocast: bool
) -> None:
    """Trains the tower of `model` in place, with a head that is then thrown away."""
    tower = model.model.visual
    head = nn.Linear(tower.config.hidden_size, sum(FIELDS))
    weights = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    mean_loss, mean_shares = 0.0, [0.0] * len(FIELDS)
    with tqdm(range(num_steps), "learning to see", mininterval=10) as bar:
        for step in bar:
            rate = peak * min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / num_steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            views, labels = make_views(seed, step, num_images, small=step < SMALL_SHARE * num_steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, shares = sight_loss(model, head, views, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean_loss = 0.95 * mean_loss + 0.05 * float(loss.detach())
            mean_shares = [0.95 * mean + 0.05 * share for mean, share in zip(mean_shares, shares, strict=True)]
            names = dict(
                zip(("colour", "shape", "size", "place"), (f"{share:.2f}" for share in mean_shares), strict=True)
            )
            bar.set_postfix(loss=f"{mean_loss:.3f}", **names, refresh=False)
