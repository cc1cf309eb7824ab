"""What the rows of a sequence see of its images: pure functions over `PromptImage` spans.

Called by the scheduler for each chunk; knows neither steps nor who holds what."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from lightvl.core import PromptImage
from lightvl.scheduling.plan import CrossView


def overlapping(images: tuple[PromptImage, ...], start: int, end: int) -> tuple[PromptImage, ...]:
    """Images that rows `start <= row < end` need, in prompt order."""
    return tuple(image for image in images if image.first_row < end and image.end_row > start)


def cross_views(
    images: tuple[PromptImage, ...], start: int, end: int, pages_of: Callable[[int], tuple[int, ...]]
) -> tuple[CrossView, ...]:
    """Cut rows `start <= row < end` wherever an image begins or ceases to be seen. Disjoint and ascending; rows that
    see no image are in no view. `pages_of`: cross pages of an image key."""
    seen = overlapping(images, start, end)
    if not seen:
        return ()
    borders = {start, end}
    for image in seen:
        borders.add(max(image.first_row, start))
        borders.add(min(image.end_row, end))
    cuts = sorted(borders)
    views = []
    for first, last in pairwise(cuts):
        pages = [page for i in overlapping(seen, first, first + 1) for page in pages_of(i.key)]
        if pages:
            views.append(CrossView(first, last, tuple(pages)))
    return tuple(views)


def largest_union(images: tuple[PromptImage, ...]) -> int:
    """Most units that any single row sees at once, each image counted once."""
    most = 0
    for image in images:  # the number of visible images grows only where one begins
        row = image.first_row
        most = max(most, sum({i.key: i.size for i in overlapping(images, row, row + 1)}.values()))
    return most
