"""Counters, gauges and histograms of one server, in Prometheus' text format for `GET /metrics`.

Any part adds to a counter by name or registers a function to be read when asked; nothing here knows what they mean.
Used from the event loop and, for `add`, from worker threads as well."""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

PREFIX = "lightvl:"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
"""Default upper bounds of a histogram's buckets, in seconds."""

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


class Histogram:
    """Counts per bucket, their sum and number."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    def __init__(self) -> None:
        self._counters: dict[str, int] = {}
        self._gauges: dict[str, Callable[[], float]] = {}
        self._histograms: dict[str, Histogram] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: int = 1) -> None:
        """Add to a counter; its name ends in `_total`. Adding 0 makes it appear."""
        with self._lock:  # += on a dict entry is not atomic, and image threads count too
            if name not in self._counters:
                assert _NAME.match(name) and name.endswith("_total"), name
            self._counters[name] = self._counters.get(name, 0) + value

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Register a function that is called, on the event loop, whenever the metrics are asked for. A name that ends
        in `_total` is told as a counter: its owner counts by itself."""
        assert _NAME.match(name) and name not in self._gauges, name
        self._gauges[name] = read

    def observe(self, name: str, value: float, bounds: Sequence[float] = SECONDS) -> None:
        """Add one value to a histogram; `bounds` count at its first use."""
        histogram = self._histograms.get(name)
        if histogram is None:
            assert _NAME.match(name), name
            histogram = self._histograms[name] = Histogram(bounds)
        histogram.observe(value)

    def value(self, name: str) -> float:
        """A counter's or gauge's value; 0 for a counter that nobody has added to."""
        read = self._gauges.get(name)
        return read() if read is not None else self._counters.get(name, 0)

    def render(self) -> str:
        """Prometheus' text exposition format, version 0.0.4."""
        lines = []
        with self._lock:
            counters = dict(self._counters)
        values: dict[str, float] = {**counters, **{name: read() for name, read in self._gauges.items()}}
        for name, value in sorted(values.items()):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE {PREFIX}{name} {kind}", f"{PREFIX}{name} {value}"]
        for name, histogram in sorted(self._histograms.items()):
            lines += _histogram_lines(PREFIX + name, histogram)
        return "\n".join(lines) + "\n"


def _histogram_lines(name: str, histogram: Histogram) -> list[str]:
    lines, count = [f"# TYPE {name} histogram"], 0
    for bound, num in zip((*histogram.bounds, "+Inf"), histogram.counts, strict=True):
        count += num
        lines.append(f'{name}_bucket{{le="{bound}"}} {count}')
    return [*lines, f"{name}_sum {histogram.sum}", f"{name}_count {count}"]
