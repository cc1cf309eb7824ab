"""One-line logs with the time in front, as `[2026-11-23 01:14:48] text`. Contents of requests (text, images, keys) are
never logged by any part; `RequestLine` is all that `--log-requests` tells of one."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

LEVELS = ("debug", "info", "warning", "error", "critical")


class _Formatter(logging.Formatter):
    """The level is told only where it matters: warnings and worse."""

    def __init__(self) -> None:
        super().__init__("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        if record.levelno >= logging.WARNING:
            record.message = f"{record.levelname}: {record.message}"
        return super().formatMessage(record)


def setup_logging(level: str) -> None:
    """Send all loggers to stderr; third parties only from warnings up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, level_number(level)))
    logging.getLogger("lightvl").setLevel(level_number(level))


def level_number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


@dataclass(frozen=True, slots=True)
class RequestLine:
    """One finished request, by its numbers."""

    request_id: str
    prompt_tokens: int
    num_images: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float | None  # None: it ended before its first token
    duration_s: float
    finish: str  # the choices' finish reasons, or how it broke off

    def __str__(self) -> str:
        ttft = "-" if self.ttft_s is None else f"{self.ttft_s * 1e3:.0f} ms"
        return (
            f"request {self.request_id}: prompt {self.prompt_tokens} tokens, images {self.num_images}, "
            f"cached {self.cached_tokens}, ttft {ttft}, generated {self.completion_tokens} tokens, "
            f"{self.duration_s:.3f} s, finish {self.finish}"
        )
