"""Teaching the text model where to look: a word that names things attends to the image tokens that show them.

Left alone, the model finds things by place within minutes, and by shape or colour not within an hour. So the first head
of three layers is held to look: in the first layer from a word (" red", " star") at all that it is true of, in the
second from the last token of a name in a question ("large red star") at what the whole name fits, in the third, before
each token of an answer that speaks of something, at that thing; at the bare ground where a name fits nothing and where
a list ends, or it would end early or go on. The loss of the answers does the rest.

Two things more are taught. mllama's text sees an image only up to the next one: each row between them takes one thing
along in the first layer, after which it must tell that thing as the image's own tokens do; and what speaks of that
thing later looks at this row, in self-attention. Where two images are compared, each token of the second description
looks at its counterpart in the first, and then tells whether it differs: without the one, whether the images are the
same stayed a guess, without the other one differing word went unnoticed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from .labels import FIELD_IDX, FIELDS, IGNORED
from .questions import heading, plural
from .samples import (
    CARRIED_NAME_LAYER,
    CARRIED_NEXT_LAYER,
    COMPARED_LAYER,
    NAME_LAYER,
    NEXT_LAYER,
    WORD_LAYER,
    Batch,
    Look,
)
from .scenes import COLOURS, PLACES, SHAPES, SIZES
from .sight import field_surprises
from .views import OnDevice

MATCH_SCALE, DIFFERING_WEIGHT = 4.0, 3.0  # a normed number is about 1; a token that differs weighs more, being rarer
KEPT_FIELDS = np.array([name in ("colour", "shape", "size", "place", "order", "glyph", "rank") for name in FIELDS])


@dataclass(frozen=True)
class Target(OnDevice):
    """From where to look, and what may be seen: (looks) row and column, (looks, image tokens of a row, or columns)
    truth."""

    rows: Tensor
    columns: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Kept(OnDevice):
    """Rows (by row and column) that take one thing along from an image that is seen no more, and what is true of it."""

    rows: Tensor
    columns: Tensor
    labels: Tensor  # int64 (kept rows, fields)


@dataclass(frozen=True)
class Matched(OnDevice):
    """Tokens of second descriptions (by row and column), and whether each differs from its counterpart in the first."""

    rows: Tensor
    columns: Tensor
    differs: Tensor  # float32: 1 or 0


@dataclass(frozen=True)
class Guidance(OnDevice):
    """All that a batch is taught beside its answers."""

    targets: dict[int, Target]  # of each guided layer
    kept: Kept | None
    matched: Matched | None


class Guide:
    """Knows which token ids are words that name things."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.get_vocab_size() + 64
        self._field = np.full(size, -1)  # which of FIELDS a token speaks of, -1 none
        self._value = np.zeros(size, np.int64)
        for field, words in (("colour", tuple(COLOURS)), ("size", SIZES), ("shape", SHAPES)):
            for value, word in enumerate(words):
                for text in (f" {word}", f" {plural(word)}"):
                    ids = tokenizer.encode(text).ids
                    self._field[ids[-1]], self._value[ids[-1]] = FIELD_IDX[field], value
        for value, word in enumerate(PLACES):
            ids = tokenizer.encode(f" {word}").ids
            if len(ids) == 1:
                self._field[ids[0]], self._value[ids[0]] = FIELD_IDX["place"], value
        self._heading = tokenizer.encode(heading(1)).ids

    def guidance(self, batch: Batch) -> Guidance:
        return Guidance(self.targets(batch), self.kept(batch), self.matched(batch))

    def targets(self, batch: Batch) -> dict[int, Target]:
        """For each guided layer, what is to be looked at in this batch (layers without a target are left out)."""
        columns = np.broadcast_to(np.arange(batch.ids.shape[1]), batch.ids.shape)
        compared = _looks(batch, COMPARED_LAYER, lambda _, at, look: (_counterpart(at, look),), columns.shape[1])
        targets = {COMPARED_LAYER: _target(*compared, columns)} | self._targets_of_images(batch, columns)
        return {layer: target for layer, target in targets.items() if len(target.rows)}

    def _targets_of_images(self, batch: Batch, columns: np.ndarray) -> dict[int, Target]:
        if not batch.images:
            return {}
        labels = np.concatenate([group.labels.numpy() for group in batch.images], 1)  # (rows, image tokens, fields)
        shown = [group.shown.numpy() for group in batch.images]
        is_bare = np.concatenate([(marks < 0).all(-1) for marks in shown], 1)  # (rows, image tokens)
        firsts = np.cumsum([0, *(group.labels.shape[1] for group in batch.images)])
        taken = {(row, *look.shown[0]): at for row, at, look in batch.looks if look.layer == WORD_LAYER}
        # The image's own row is always one; where there are more, words stand between it and the next image. What
        # speaks only of images that are seen no more looks at bare ground: all else would mislead. What speaks only of
        # the last one looks at the first row of all, for the same reason.
        left = {(row, image) for row, image, mark in taken if mark > 0}
        left_rows = {row for row, _ in left}

        def in_image(row: int, at: int, look: Look) -> Sequence[int]:
            found = [
                np.flatnonzero((shown[image][row] == mark).any(-1)) + firsts[image]
                for image, mark in look.shown
                if (row, image) not in left or look.layer == WORD_LAYER
            ]
            return np.concatenate(found) if found else np.flatnonzero(is_bare[row])

        def in_rows(row: int, at: int, look: Look) -> Sequence[int]:
            if row not in left_rows:
                return ()
            kept = [(row, image, mark) for image, mark in look.shown if (row, image) in left]
            return [taken[key] for key in kept if key in taken] if kept else (0,)

        images = batch.stands_at.numpy()
        targets = {
            layer: _target(*_looks(batch, source, show, stands_at.shape[1]), stands_at)
            for layer, source, show, stands_at in (
                (NAME_LAYER, NAME_LAYER, in_image, images),
                (NEXT_LAYER, NEXT_LAYER, in_image, images),
                (CARRIED_NAME_LAYER, NAME_LAYER, in_rows, columns),
                (CARRIED_NEXT_LAYER, NEXT_LAYER, in_rows, columns),
            )
        }
        rows, at = np.nonzero(self._field[batch.ids.numpy()] >= 0)
        ids = batch.ids.numpy()[rows, at]
        is_named = labels[rows, :, self._field[ids]] == self._value[ids][:, None]
        is_named[np.isin(rows, list(left_rows)), : firsts[-2]] = False  # of images that are seen no more
        both = zip((rows, at, is_named), _looks(batch, WORD_LAYER, in_image, images.shape[1]), strict=True)
        targets[WORD_LAYER] = _target(*(np.concatenate(parts) for parts in both), images)
        return targets

    def kept(self, batch: Batch) -> Kept | None:
        """What rows between images should keep; None where there are no such rows."""
        found = []
        for row, column, look in batch.looks:
            if look.layer == WORD_LAYER:
                image, mark = look.shown[0]
                group = batch.images[image]
                labels, shown = group.labels[row].numpy(), group.shown[row].numpy()
                at = np.argwhere(shown == mark)
                if len(at):
                    token, place = at[0]
                    values = np.where(KEPT_FIELDS, labels[token], IGNORED)
                    if place:  # the second glyph of a token
                        values[FIELD_IDX["glyph"]] = labels[token, FIELD_IDX["glyph2"]]
                        values[FIELD_IDX["order"]] = IGNORED
                    found.append((row, column, values))
        if not found:
            return None
        rows, columns, values = (torch.from_numpy(np.array(column, np.int64)) for column in zip(*found, strict=True))
        return Kept(rows, columns, values)

    def matched(self, batch: Batch) -> Matched | None:
        """Which tokens of a second description differ from the first (its heading always does); None without any."""
        ids = batch.ids.numpy()
        found = [
            (row, at, ids[row, at] != ids[row, _counterpart(at, look)])
            for row, at, look in batch.looks
            if look.layer == COMPARED_LAYER and ids[row, at] not in self._heading
        ]
        if not found:
            return None
        rows, columns, differs = (torch.from_numpy(np.array(column)) for column in zip(*found, strict=True))
        return Matched(rows, columns, differs.float())


def _counterpart(at: int, look: Look) -> int:
    """The column at which a token in this column looks."""
    return at - look.slot + look.counterpart


def _looks(
    batch: Batch, layer: int, show: Callable[[int, int, Look], Sequence[int]], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and what they may see, (looks, width), of this layer's looks."""
    looks = [entry for entry in batch.looks if entry[2].layer == layer]
    seen = np.zeros((len(looks), width), bool)
    for idx, entry in enumerate(looks):
        seen[idx, show(*entry)] = True
    rows, columns = np.array([entry[:2] for entry in looks], np.int64).reshape(-1, 2).T
    return rows, columns, seen


def _target(rows: np.ndarray, columns: np.ndarray, seen: np.ndarray, stands_at: np.ndarray) -> Target:
    seen = seen & (stands_at[rows] <= columns[:, None])  # what comes later cannot be seen yet
    kept = seen.any(-1)
    return Target(torch.from_numpy(rows[kept]), torch.from_numpy(columns[kept]), torch.from_numpy(seen[kept]))


def kept_loss(head: torch.nn.Linear, kept: Kept, states: Tensor) -> Tensor:
    """Mean surprise of `head` (the tower's own: it learns nothing here) at what rows keep in (rows, length, hidden)."""
    logits = F.linear(states[kept.rows, kept.columns], head.weight.detach(), head.bias.detach()).float()
    return field_surprises(logits, kept.labels).sum() / (kept.labels != IGNORED).sum()


def match_loss(matched: Matched, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean surprise at which tokens differ, as the first number of their normed states (rows, length, hidden) tells it,
    and the shares that are right of those that differ and of those that do not."""
    states = states[matched.rows, matched.columns].float()
    logits = MATCH_SCALE * F.rms_norm(states, states.shape[-1:])[:, 0]
    weight = 1 + (DIFFERING_WEIGHT - 1) * matched.differs
    loss = F.binary_cross_entropy_with_logits(logits, matched.differs, weight)
    is_right = (logits > 0) == (matched.differs > 0)
    shares = {"differing": matched.differs, "equal": 1 - matched.differs}
    return loss, {name: (is_right * those).sum() / those.sum() for name, those in shares.items()}


def look_loss(targets: dict[int, Target], looks: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The sum over guided layers of the mean surprise of their heads' attention, and its share that is right in each.

    `looks`: for each guided layer, the attention (rows, length, image tokens of a row, or columns) of its head.
    """
    losses, shares = [], {}
    for layer, target in targets.items():
        right = (looks[layer][target.rows, target.columns].float() * target.seen).sum(-1)
        losses.append(-torch.log(right + 1e-4).mean())
        shares[layer] = right.detach().mean()
    return sum(losses), shares
