"""Teaching the text model where to look: a word that names things attends to the image tokens that show them.

Left alone, the model finds things by place within minutes, and by shape or colour not within an hour. So one head of
the first layer is held to look from a word (" red", " star") at what it names, and one head of the third layer from the
last word of a name ("large red stars") at what the whole name fits. The loss of the answers does the rest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .labels import FIELDS, IGNORED
from .samples import Batch
from .scenes import COLOURS, SHAPES, SIZES

WORD_LAYER, NAME_LAYER = 0, 2
HEAD = 0
MAX_NAME_LEN = 3  # size, colour, shape
ANY = -1


@dataclass(frozen=True)
class Target:
    """From where to look, and what may be seen: (tokens) row and column, and (tokens, length) truth."""

    rows: Tensor
    columns: Tensor
    seen: Tensor


class Guide:
    """Knows which token ids are words that name things."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        size = tokenizer.get_vocab_size()
        self._field = np.full(size + 64, -1)  # which of FIELDS a token speaks of, -1 none
        self._value = np.zeros(size + 64, np.int64)
        self._ends_name = np.zeros(size + 64, bool)
        words = [(f" {word}", 0, idx) for idx, word in enumerate(COLOURS)]
        words += [(f" {word}", 2, idx) for idx, word in enumerate(SIZES)]
        plural = ["circles", "squares", "triangles", "stars", "diamonds", "crosses"]
        words += [(f" {word}", 1, idx) for names in (SHAPES, plural) for idx, word in enumerate(names)]
        for text, field, value in words:
            ids = tokenizer.encode(text).ids
            self._field[ids[-1]], self._value[ids[-1]] = field, value
            self._ends_name[ids[-1]] = field == 1
        for text in (" shape", " shapes"):
            self._ends_name[tokenizer.encode(text).ids[-1]] = True

    def targets(self, batch: Batch) -> dict[int, Target]:
        """For each guided layer, what is to be looked at in this batch (layers without a target are left out)."""
        shown = np.full((*batch.ids.shape, len(FIELDS)), IGNORED, np.int64)
        labels = [group.labels.reshape(-1, len(FIELDS)) for group in batch.images if group.labels is not None]
        if not labels:
            return {}
        shown.reshape(-1, len(FIELDS))[batch.image_slots] = np.concatenate(labels)
        field = self._field[batch.ids]
        wanted = np.full((*batch.ids.shape, 3), ANY, np.int64)  # colour, shape, size of the name so far
        for row, column in zip(*np.nonzero(field >= 0), strict=True):
            wanted[row, column, field[row, column]] = self._value[batch.ids[row, column]]
        names = wanted.copy()
        for back in range(1, MAX_NAME_LEN):
            joined = (field[:, :-back] >= 0) & (names[:, back - 1 : -1].max(-1) != ANY if back > 1 else True)
            earlier = np.where((joined & (field[:, :-back] != 1))[..., None], wanted[:, :-back], ANY)
            names[:, back:] = np.where(names[:, back:] == ANY, earlier, names[:, back:])
        is_name = self._ends_name[batch.ids] & (names.max(-1) != ANY)
        found = {WORD_LAYER: self._target(field >= 0, wanted, shown), NAME_LAYER: self._target(is_name, names, shown)}
        return {layer: target for layer, target in found.items() if len(target.rows)}

    @staticmethod
    def _target(where: np.ndarray, wanted: np.ndarray, shown: np.ndarray) -> Target:
        rows, columns = np.nonzero(where)
        asked = wanted[rows, columns][:, None]
        seen = ((asked == ANY) | (asked == shown[rows][:, :, :3])).all(-1)
        seen &= (shown[rows][:, :, 1] != IGNORED) & (np.arange(shown.shape[1]) < columns[:, None])
        kept = seen.any(-1)
        return Target(torch.from_numpy(rows[kept]), torch.from_numpy(columns[kept]), torch.from_numpy(seen[kept]))


def look_loss(targets: dict[int, Target], looks: dict[int, Tensor]) -> tuple[Tensor, dict[int, float]]:
    """Mean surprise of the attention (rows, heads, length, length) in guided layers, and the share that is right."""
    losses, shares = [torch.zeros(())], {}
    for layer, target in targets.items():
        attention = looks[layer][target.rows, HEAD, target.columns].float()
        right = (attention * target.seen).sum(-1)
        losses.append(-torch.log(right + 1e-4).mean())
        shares[layer] = float(right.detach().mean())
    return torch.stack(losses).sum(), shares
