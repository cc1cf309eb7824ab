"""Teaching the text model where to look: a word that names things attends to the image tokens that show them.

Left alone, the model finds things by place within minutes, and by shape or colour not within an hour. So the first head
of three layers is held to look: in the first layer from a word (" red", " star") at all that it is true of, in the
second from the last token of a name in a question ("large red star") at what the whole name fits, in the third, before
each token of an answer that speaks of something, at that thing. The loss of the answers does the rest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .labels import FIELD_IDX
from .questions import plural
from .samples import Batch
from .scenes import COLOURS, PLACES, SHAPES, SIZES
from .views import OnDevice

WORD_LAYER, NAME_LAYER, NEXT_LAYER = 0, 1, 2


@dataclass(frozen=True)
class Target(OnDevice):
    """From where to look, and what may be seen: (looks) row and column, (looks, image tokens of a row) truth."""

    rows: Tensor
    columns: Tensor
    seen: Tensor


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

    def targets(self, batch: Batch) -> dict[int, Target]:
        """For each guided layer, what is to be looked at in this batch (layers without a target are left out)."""
        if not batch.images:
            return {}
        labels = np.concatenate([group.labels.numpy() for group in batch.images], 1)  # (rows, image tokens, fields)
        at, column = np.nonzero(self._field[batch.ids.numpy()] >= 0)
        ids = batch.ids.numpy()[at, column]
        found = {WORD_LAYER: (at, column, labels[at, :, self._field[ids]] == self._value[ids][:, None])}
        shown = [group.shown.numpy() for group in batch.images]
        firsts = np.cumsum([0, *(group.labels.shape[1] for group in batch.images)])
        for layer, is_next in ((NAME_LAYER, False), (NEXT_LAYER, True)):
            looks = [(row, column, look) for row, column, look in batch.looks if look.is_next == is_next]
            seen = np.zeros((len(looks), labels.shape[1]), bool)
            for idx, (row, _, look) in enumerate(looks):
                first, last = firsts[look.image : look.image + 2]
                for mark in look.marks:
                    seen[idx, first:last] |= (shown[look.image][row] == mark).any(-1)
            at, column = np.array([look[:2] for look in looks], np.int64).reshape(-1, 2).T
            found[layer] = (at, column, seen)
        targets = {layer: _target(*parts, batch.stands_at.numpy()) for layer, parts in found.items()}
        return {layer: target for layer, target in targets.items() if len(target.rows)}


def _target(rows: np.ndarray, columns: np.ndarray, seen: np.ndarray, stands_at: np.ndarray) -> Target:
    seen = seen & (stands_at[rows] < columns[:, None])  # what comes later cannot be seen yet
    kept = seen.any(-1)
    return Target(torch.from_numpy(rows[kept]), torch.from_numpy(columns[kept]), torch.from_numpy(seen[kept]))


def look_loss(targets: dict[int, Target], looks: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The sum over guided layers of the mean surprise of their heads' attention, and its share that is right in each.

    `looks`: for each guided layer, the attention (rows, length, image tokens of a row) of its head.
    """
    losses, shares = [], {}
    for layer, target in targets.items():
        right = (looks[layer][target.rows, target.columns].float() * target.seen).sum(-1)
        losses.append(-torch.log(right + 1e-4).mean())
        shares[layer] = right.detach().mean()
    return sum(losses), shares
