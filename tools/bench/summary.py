"""Answers to numbers, and numbers to a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.client import Answer


def percentile(values: Sequence[float], q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else 0.0


def summarize(answers: Sequence[Answer], wall_s: float) -> dict[str, Any]:
    """Milliseconds and rates of one scenario."""
    ttfts = [1e3 * answer.ttft for answer in answers]
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps]
    num_out = sum(answer.completion_tokens for answer in answers)
    return {
        "requests": len(answers),
        "ttft_ms_p50": percentile(ttfts, 50),
        "ttft_ms_p99": percentile(ttfts, 99),
        "itl_ms_p50": percentile(gaps, 50),
        "itl_ms_p99": percentile(gaps, 99),
        "max_pause_ms": max(gaps, default=0.0),
        "output_tok_s": num_out / wall_s,
        "total_tok_s": (num_out + sum(answer.prompt_tokens for answer in answers)) / wall_s,
        "requests_s": len(answers) / wall_s,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers) / len(answers),
        "cached_tokens": sum(answer.cached_tokens for answer in answers) / len(answers),
        "wall_s": wall_s,
    }


def together_tok_s(answers: Sequence[Answer]) -> float:
    """Tokens a second of all answers together while every one of them is being written. Where they never all are
    (short answers), from the first token to the last, others' prefill included: then it tells less than the truth."""
    begin = max(answer.times[0] for answer in answers)
    end = min(answer.times[-1] for answer in answers)
    if end <= begin:
        begin = min(answer.times[0] for answer in answers)
        end = max(answer.times[-1] for answer in answers)
    num_tokens = 0.0
    for answer in answers:
        pieces = sum(begin < at <= end for at in answer.times)
        num_tokens += pieces * (answer.completion_tokens - 1) / max(1, len(answer.times) - 1)
    return num_tokens / (end - begin) if end > begin else 0.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Right-aligned columns; the keys of the first row are the header."""
    header = list(rows[0])
    cells = [header] + [[_cell(row.get(key)) for key in header] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return "-" if value is None else str(value)


def rounded(value: Any) -> Any:
    """For the JSON line: four digits say enough."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
