"""How much of everything fits: pages of both pools and feature rows, from the memory that is there. Pure numbers and
their reasons; `cpu.py` and `measured.py` ask, the start-up report tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lightvl.errors import ConfigError
from lightvl.models.config import DecoderConfig
from lightvl.scheduling.limits import SchedulerLimits

FEATURE_SHARE = 0.1  # of the K,V memory, for features that replace rows
CROSS_SHARE = 0.5  # of the K,V memory, for cross pages
MIN_FEATURE_ROWS = 4096
MIN_CROSS_IMAGES = 4


@dataclass(frozen=True, slots=True)
class LargestImage:
    """Most that one image can take; both 0 for a text-only model."""

    num_tokens: int
    num_cross_pages: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What pages and features may take. `told`: why, for reports and errors. `most_tokens`: of K,V, more are of no
    use. `is_hard`: what is beyond is surely not there."""

    num_bytes: int
    told: str
    most_tokens: int | None = None
    is_hard: bool = False


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    num_pages: int
    num_cross_pages: int
    num_feature_rows: int
    report: tuple[str, ...]


def available_bytes() -> int:
    """Free memory of this machine, within the cgroup's limit where there is one."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit_file, used_file = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit_file.is_file() and (limit := limit_file.read_text().strip()) != "max":
        available = min(available, int(limit) - int(used_file.read_text()))
    return max(0, available)


def plan_memory(
    given: Budget,
    max_total_tokens: int | None,
    decoder: DecoderConfig,
    limits: SchedulerLimits,
    dtype: torch.dtype,
    cross_page_len: int,
    largest: LargestImage,
) -> MemoryPlan:
    """Raises ConfigError when not even one page fits."""
    shape = decoder.kv_shape
    budget, told = given.num_bytes, given.told
    report = []

    num_cross_pages = 0
    if cross_page_len:
        page_bytes = shape.bytes_per_cross_page(cross_page_len, dtype)
        wanted = limits.max_running * largest.num_cross_pages
        least = MIN_CROSS_IMAGES * largest.num_cross_pages
        num_cross_pages = max(least, min(wanted, int(budget * CROSS_SHARE) // page_bytes))
        budget -= num_cross_pages * page_bytes
        report.append(
            f"cross pages: {num_cross_pages} of {cross_page_len} rows, one per image tile "
            f"({num_cross_pages * page_bytes / 2**20:,.0f} MiB)"
        )

    num_feature_rows = 0
    if largest.num_tokens and not cross_page_len:
        row_bytes = decoder.hidden_size * dtype.itemsize
        least = max(MIN_FEATURE_ROWS, 2 * largest.num_tokens)
        num_feature_rows = max(least, min(int(budget * FEATURE_SHARE) // row_bytes, 16 * least))
        budget -= num_feature_rows * row_bytes
        report.append(f"image features: {num_feature_rows} rows held ({num_feature_rows * row_bytes / 2**20:,.0f} MiB)")

    token_bytes = shape.bytes_per_token(dtype)
    if max_total_tokens is not None:
        num_tokens, why = max_total_tokens, "--max-total-tokens"
        if num_tokens * token_bytes > budget:
            if given.is_hard:
                raise ConfigError(
                    f"--max-total-tokens {num_tokens}: takes {num_tokens * token_bytes / 2**30:.1f} GiB, "
                    f"{max(0, budget) / 2**30:.1f} are left of {told}"
                )
            why += f", more than {told}: it may not fit"
    else:
        num_tokens, why = budget // token_bytes, told
        if given.most_tokens is not None and num_tokens >= given.most_tokens:
            num_tokens, why = given.most_tokens, "as many as are of use; less than the memory allows"
    num_pages = num_tokens // limits.page_size
    page_bytes = limits.page_size * token_bytes
    if num_pages < 1:
        raise ConfigError(
            f"no memory for K,V pages: a page of {limits.page_size} tokens takes {page_bytes} bytes, "
            f"{max(0, budget)} are left of {told}; lower --page-size or raise --mem-fraction-static"
        )
    report.insert(
        0,
        f"K,V pages: {num_pages} of {limits.page_size} tokens ({num_pages * page_bytes / 2**20:,.0f} MiB; {why})",
    )
    return MemoryPlan(num_pages, num_cross_pages, num_feature_rows, tuple(report))
