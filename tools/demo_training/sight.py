"""Teaching the tower to see before it is asked: each image token learns to name what it shows.

A small head reads the tower's output at every token; it stays beside the answers' loss and is thrown away at the end.
The tower alone is cheap (no text), and a text model that starts with tokens that tell shape, colour, letter and order
learns to answer many times sooner.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .labels import FIELDS, IGNORED, NOTHING
from .pictures import KINDS, Picture, make_crowd, make_page, pick_size, training_picture
from .samples import Writer
from .views import ImageGroup

PAGE_SHARE, CROWD_SHARE = 0.45, 0.15  # of pictures: there is more to name in them than in those that are asked about
SHARES = (45, 35, 12, 8)  # percent of all others of each of KINDS


def make_head(hidden_size: int) -> nn.Linear:
    """The head that names what a token shows."""
    return nn.Linear(hidden_size, sum(FIELDS.values()))


def make_views(writer: Writer, seed: str, step: int, num_images: int) -> ImageGroup:
    """Images of one size, with the labels of their tokens."""
    rng = random.Random(f"sight {seed} {step}")
    size = writer.fits(*pick_size(rng))
    return writer.group([_draw(*size, rng) for _ in range(num_images)])


def _draw(width: int, height: int, rng: random.Random) -> Picture:
    which = rng.random()
    if which < PAGE_SHARE:
        return make_page(width, height, rng)
    if which < PAGE_SHARE + CROWD_SHARE:
        return make_crowd(width, height, rng)
    return training_picture(rng.choices(KINDS, SHARES)[0], width, height, rng)


def field_surprises(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each field, (tokens, fields), of the head's logits; 0 where a label is IGNORED."""
    parts = logits.split(list(FIELDS.values()), -1)
    surprises = [
        F.cross_entropy(part, truth, ignore_index=IGNORED, reduction="none")
        for part, truth in zip(parts, labels.unbind(-1), strict=True)
    ]
    return torch.stack(surprises, -1)


def name_loss(head: nn.Linear, features: Tensor, group: ImageGroup) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy over the fields for tokens (images, tokens, hidden), and the logits of all fields."""
    logits = head(features).float()
    surprises = field_surprises(logits.flatten(0, 1), group.labels.flatten(0, 1))
    return (surprises * group.weights.flatten(0, 1)).sum(), logits


def name_shares(logits: Tensor, group: ImageGroup) -> dict[str, Tensor]:
    """The share of right names in each field, over tokens that show something (not a number where none does)."""
    shares = {}
    for idx, (name, part) in enumerate(zip(FIELDS, logits.split(list(FIELDS.values()), -1), strict=True)):
        truth = group.labels[..., idx]
        is_some = (truth != IGNORED) & (truth != NOTHING.get(name, IGNORED))
        shares[name] = ((part.argmax(-1) == truth) & is_some).sum() / is_some.sum()
    return shares
