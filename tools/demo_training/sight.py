"""Teaching the tower to see before it is asked: each image token learns to name the thing it shows.

A small head reads the tower's output at every token; it stays beside the answers' loss and is thrown away at the end.
The tower alone is cheap (no text), and a text model that starts with tokens that tell shape and colour learns to answer
many times sooner.
"""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration

from .labels import FIELDS, IGNORED, token_labels
from .model import encode_images
from .samples import PATCH, SIDES, SMALL_SIDES, ImageGroup, patchify
from .scenes import draw, draw_scene, lay_out

SMALL_SHARE = 0.6  # of the steps are on small images


def make_head(model: Qwen2VLForConditionalGeneration) -> nn.Linear:
    """The head that names what a token shows."""
    return nn.Linear(model.config.vision_config.hidden_size, sum(FIELDS))


def make_views(seed: int, step: int, num_images: int, small: bool) -> ImageGroup:
    """Images of one size, with the labels of their tokens."""
    rng = random.Random(f"sight {seed} {step}")
    sides = SMALL_SIDES if small else SIDES
    width, height = rng.choice(sides), rng.choice(sides)
    patches, labels = [], []
    for _ in range(num_images):
        spots = lay_out(draw_scene(rng), width, height, rng)
        patches.append(patchify(draw(spots, width, height, rng)))
        labels.append(token_labels(spots, width, height))
    return ImageGroup((height // PATCH, width // PATCH), np.stack(patches), np.stack(labels))


def name_loss(head: nn.Linear, features: Tensor, labels: np.ndarray) -> tuple[Tensor, list[float]]:
    """Mean cross entropy over the fields for tokens (images, tokens, hidden), and the share of right names in each."""
    logits = head(features.flatten(0, 1)).float().split(FIELDS, -1)
    right = torch.from_numpy(labels).flatten(0, 1)
    losses = [F.cross_entropy(part, right[:, idx], ignore_index=IGNORED) for idx, part in enumerate(logits)]
    known = [right[:, idx] != IGNORED for idx in range(len(FIELDS))]
    shares = [float((part.argmax(-1) == right[:, idx])[known[idx]].float().mean()) for idx, part in enumerate(logits)]
    return torch.stack(losses).mean(), shares


def learn_to_see(
    model: Qwen2VLForConditionalGeneration,
    head: nn.Linear,
    seed: int,
    num_steps: int,
    num_images: int,
    peak: float,
    autocast: bool,
) -> None:
    """Trains the tower of `model` and the head in place."""
    weights = [*model.model.visual.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    mean_loss, mean_shares = 0.0, [0.0] * len(FIELDS)
    with tqdm(range(num_steps), "learning to see", mininterval=10) as bar:
        for step in bar:
            rate = peak * min(1.0, (step + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / num_steps)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            views = make_views(seed, step, num_images, small=step < SMALL_SHARE * num_steps)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss, shares = name_loss(head, encode_images(model, views), views.labels)
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
