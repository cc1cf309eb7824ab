"""Rows to a table, to JSON beside it, and two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.summary import rounded

from gpu.rows import Row

MANY = 20  # rows of a part that passed


def write_json(path: Path, machine: dict[str, Any], parts: dict[str, Any], rows: Iterable[Row]) -> None:
    """Replaces the file at once, so that whoever stops us leaves a whole one."""
    content = {"machine": machine, "parts": parts, "rows": [vars(row) for row in rows]}
    new = path.with_suffix(".new")
    new.write_text(json.dumps(rounded(content), indent=1) + "\n")
    new.replace(path)


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def line(row: Row) -> str:
    """One row, as it is told when it is known."""
    return "  ".join(_cells(row)).rstrip()


def condensed(rows: list[Row]) -> list[Row]:
    """For a screen, and for a tool that keeps the end of an output only: of a part with many checks that passed, one
    row with the worst of them."""
    told: list[Row] = []
    for part in dict.fromkeys(row.part for row in rows):
        own = [row for row in rows if row.part == part]
        passed = [row for row in own if row.verdict == "pass" and row.value is not None]
        if len(passed) <= MANY:
            told += own
            continue
        worst = max(passed, key=lambda row: row.value or 0)
        told += [row for row in own if row not in passed]
        seconds = sum(row.seconds for row in passed)
        told.append(replace(worst, check=f"{len(passed)} more, the worst", seconds=seconds, note=worst.check))
    return told


def table(rows: list[Row]) -> str:
    header = ("part", "check", "", "value", "goal", "s", "note")
    cells = [header, *(_cells(row, pad=False) for row in rows)]
    widths = [max(len(cell[i]) for cell in cells) for i in range(len(header) - 1)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(cell, widths, strict=False)), cell[-1]]) for cell in cells
    ]
    return "\n".join(text.rstrip() for text in lines)


def _cells(row: Row, *, pad: bool = True) -> tuple[str, ...]:
    value = "" if row.value is None else f"{number(row.value)} {row.unit}".rstrip()
    cells = (row.part, row.check, row.verdict, value, row.goal, f"{row.seconds:.1f}", row.note)
    widths = (9, 44, 4, 14, 10, 5, 0) if pad else (0,) * 7
    return tuple(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def compare(old: list[Row], new: list[Row]) -> str:
    """A line per check with a number in either run: before, after, after / before; and verdicts that changed."""
    before = {(row.part, row.check): row for row in old}
    after = {(row.part, row.check): row for row in new}
    lines = [("part", "check", "before", "after", "ratio", "")]
    for key in dict.fromkeys([*after, *before]):
        ours, theirs = after.get(key), before.get(key)
        values = [None if row is None else row.value for row in (theirs, ours)]
        verdicts = ["-" if row is None else row.verdict for row in (theirs, ours)]
        changed = " -> ".join(verdicts) if verdicts[0] != verdicts[1] else ""
        if values == [None, None] and not changed:
            continue
        ratio = f"{values[1] / values[0]:.3f}" if values[0] and values[1] is not None else ""
        lines.append((*key, *("" if value is None else number(value) for value in values), ratio, changed))
    widths = [max(len(cells[i]) for cells in lines) for i in range(6)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, 1, 5) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )
