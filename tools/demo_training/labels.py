"""What each image token shows, as class numbers: the truth that `sight` teaches and `guide` points at."""

import numpy as np

from .charts import HEIGHTS
from .pictures import KINDS, UNIT, Picture
from .prints import GLYPHS, MAX_LEN
from .scenes import COLOURS, PLACES, SHAPES, SIZES

# Field -> number of classes. The ground is a colour of its own; `glyph2` is the second glyph within one token; `order`
# is the how-manieth thing, glyph or bar it is; `rank` is how many bars are taller; `center` is 1 in the one token where
# a thing has its center.
FIELDS = {
    "picture": len(KINDS),
    "colour": len(COLOURS) + 1,
    "shape": len(SHAPES),
    "size": len(SIZES),
    "place": len(PLACES),
    "order": MAX_LEN,
    "glyph": len(GLYPHS) + 1,
    "glyph2": len(GLYPHS) + 1,
    "rank": len(HEIGHTS) - 1,
    "center": 2,
}
FIELD_IDX = {name: idx for idx, name in enumerate(FIELDS)}
NOTHING = {"colour": len(COLOURS), "glyph": len(GLYPHS), "glyph2": len(GLYPHS), "center": 0}  # the class of no thing
IGNORED = -100
MAX_SHOWN = 2  # marks that one token can show
IMPORTANCE = {"shape": 2.0, "glyph": 2.0, "order": 1.5}  # of the fields in the loss: the hard ones; 1 for all others


def token_labels(picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, fields): what each image token shows; and (tokens, MAX_SHOWN): by which marks, -1 for none.

    Tokens at the edge of a thing are neither the thing nor the ground: they are left out.
    """
    columns, rows = picture.image.width // UNIT, picture.image.height // UNIT
    labels = np.full((rows, columns, len(FIELDS)), IGNORED, np.int64)
    shown = np.full((rows, columns, MAX_SHOWN), -1, np.int64)
    labels[..., FIELD_IDX["picture"]] = KINDS.index(picture.kind)
    if not picture.marks:
        return labels.reshape(-1, len(FIELDS)), shown.reshape(-1, MAX_SHOWN)
    y, x = (np.arange(rows)[:, None] + 0.5) * UNIT, (np.arange(columns)[None, :] + 0.5) * UNIT
    boxes = np.array([[mark.left, mark.top, mark.right, mark.bottom] for mark in picture.marks])
    left, top, right, bottom = boxes.T[..., None, None]
    away = np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom))  # (marks, rows, columns)
    labels[(away > UNIT / 2).all(0), FIELD_IDX["colour"]] = len(COLOURS)
    labels[..., FIELD_IDX["center"]] = 0
    is_print = picture.kind == "print"
    if is_print:
        labels[..., FIELD_IDX["glyph"]] = labels[..., FIELD_IDX["glyph2"]] = len(GLYPHS)
    for idx, mark in enumerate(picture.marks):
        center_x, center_y = mark.center
        at = min(max(int(center_y // UNIT), 0), rows - 1), min(max(int(center_x // UNIT), 0), columns - 1)
        if is_print:
            second = int(shown[*at, 0] >= 0)
            shown[*at, second] = idx
            labels[*at, FIELD_IDX["glyph2" if second else "glyph"]] = mark.values["glyph"]
            if not second:
                labels[*at, FIELD_IDX["order"]] = mark.values["order"]
            labels[*at, FIELD_IDX["colour"]] = mark.values["colour"]
        else:
            across, down = (mark.right - mark.left) / 2, (mark.bottom - mark.top) / 2
            within = ((x - center_x) / across) ** 2 + ((y - center_y) / down) ** 2 < 0.7
            if picture.kind == "chart":
                within = (abs(x - center_x) < across * 0.9) & (abs(y - center_y) < down * 0.95)
            within[at] = True
            shown[within, 0] = idx
            for name, value in mark.values.items():
                labels[within, FIELD_IDX[name]] = value
        labels[*at, FIELD_IDX["center"]] = 1
    return labels.reshape(-1, len(FIELDS)), shown.reshape(-1, MAX_SHOWN)


def name_weights(labels: np.ndarray) -> np.ndarray:
    """What each label of a batch weighs in the loss of naming, float32 of the same shape; the sum is 1.

    Where a field has a class for nothing, tokens of that class weigh as much as all others together: they would
    outweigh the few letters. A label that is IGNORED weighs nothing.
    """
    weights = np.zeros(labels.shape, np.float32)
    total = 0.0
    for idx, name in enumerate(FIELDS):
        field = labels[..., idx]
        is_none = field == NOTHING.get(name, IGNORED)
        groups = [group for group in ((field != IGNORED) & ~is_none, is_none & (field != IGNORED)) if group.any()]
        for group in groups:
            weights[..., idx][group] = IMPORTANCE.get(name, 1.0) / (len(groups) * group.sum())
        total += IMPORTANCE.get(name, 1.0) if groups else 0.0
    return weights / total
