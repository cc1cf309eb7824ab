"""The composition root: a checked `ServerConfig` in, a service ready to start out. The one place that wires all parts;
what differs per device comes from a `Platform`. Each choice is told in the start-up report with its reason."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightvl import demo
from lightvl.config import NO_CHUNKING, ModelInfo, ServerConfig, sampling_defaults
from lightvl.core import SamplingParams
from lightvl.engine.cpu import CpuPlatform
from lightvl.engine.cuda import CudaPlatform, cuda_device
from lightvl.engine.engine import Engine
from lightvl.engine.largest import probe_layouts
from lightvl.engine.memory import LargestImage
from lightvl.engine.platform import Machine, Platform
from lightvl.engine.watchdog import Watchdog
from lightvl.errors import ConfigError
from lightvl.images.cache import MediaCounters
from lightvl.images.fetch import ImageFetcher
from lightvl.metrics import Metrics
from lightvl.models.config import decoder_config, read_config
from lightvl.models.families import default_image_tokens
from lightvl.models.family import Family
from lightvl.models.load import resolve_checkpoint
from lightvl.models.model import Model, build_model
from lightvl.prompt.build import PromptBuilder, PromptLimits
from lightvl.prompt.choice import choose_template
from lightvl.prompt.detokenizer import Detokenizer
from lightvl.prompt.tokenizer import Tokenizer
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.radix_cache import RadixCache
from lightvl.scheduling.scheduler import Scheduler

DEMO_NAME = "lightvl-demo"
COUNTED = ("downloads", "download_hits", "decodes", "decode_hits", "preprocesses", "pixel_hits")


@dataclass(slots=True)
class LightVLService:
    """Implements `server.service.Service`."""

    engine: Engine
    prompts: PromptBuilder
    info: ModelInfo
    report: Sequence[str]
    fetcher: ImageFetcher
    image_threads: ThreadPoolExecutor

    @property
    def healthy(self) -> bool:
        return self.engine.healthy

    async def start(self) -> None:
        await self.fetcher.start()
        self.engine.start()

    async def drain(self, timeout_s: float) -> None:
        await self.engine.drain(timeout_s)

    async def close(self) -> None:
        await self.engine.close()
        await self.fetcher.close()
        self.image_threads.shutdown(wait=False, cancel_futures=True)


def build_service(config: ServerConfig, metrics: Metrics) -> LightVLService:
    """Loads the model, after all that can be wrong with the flags has been checked. Raises ConfigError."""
    platform = _pick_platform(config)
    device, defaults = platform.device, platform.defaults
    dtype, dtype_reason = platform.pick_dtype(config)
    checkpoint = _checkpoint(config)
    hf_config = read_config(checkpoint)
    generation_config = _read_json(checkpoint / "generation_config.json")
    context_len, context_reason = _context_len(config, decoder_config(hf_config).max_positions)
    image_tokens = config.max_image_tokens or default_image_tokens(hf_config, device)
    model = build_model(checkpoint, dtype=dtype, device=device, max_image_tokens=image_tokens)
    tokenizer_path = config.tokenizer_path or str(checkpoint)
    tokenizer = Tokenizer.load(tokenizer_path, image_token_id=model.family.image_token_id)
    template, template_choice = choose_template(
        config.chat_template,
        tokenizer,
        family_template=model.family.chat_template,
        takes_images=model.family.image_token_id is not None,
    )

    began = time.monotonic()
    model.load(checkpoint, config.load_format)
    load_s = time.monotonic() - began
    limits = SchedulerLimits(
        page_size=config.page_size or defaults.page_size,
        max_running=config.max_running_requests or defaults.max_running,
        # never more than one whole prompt: memory is measured for that
        chunk_tokens=min(config.chunked_prefill_size or defaults.chunk_tokens, context_len),
        context_len=context_len,
        step_budget_s=defaults.step_budget_s,
        encode_budget_s=defaults.encode_budget_s,
        max_steps_in_flight=defaults.max_steps_in_flight,
        mix_rows=defaults.mix_rows,
    )
    largest_image = _largest_image(model.family)
    machine = platform.assemble(model, limits, config, largest_image)

    counters = MediaCounters()
    for field in COUNTED:
        metrics.gauge(f"image_{field}_total", lambda field=field: getattr(counters, field))  # type: ignore[misc]
    image_threads = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="lightvl-image")
    domains = config.allowed_media_domains or None
    fetcher = ImageFetcher(executor=image_threads, allowed_domains=domains, counters=counters)
    prompt_limits = PromptLimits(context_len=context_len, vocab_size=model.config.vocab_size)
    prompts = PromptBuilder(
        model.family,
        tokenizer,
        template,
        fetcher,
        image_threads,
        prompt_limits,
        generation_eos_ids=_eos_ids(generation_config),
    )
    is_demo = _demo_name(config) is not None
    info = ModelInfo(
        served_name=config.served_model_name or (DEMO_NAME if is_demo else str(config.model_path)),
        model_path=config.model_path or "demo",
        tokenizer_path=tokenizer_path,
        family=model.family.name,
        context_len=context_len,
        created=int(time.time()),
        takes_images=model.family.image_token_id is not None,
        chat_template=template_choice.name,
        sampling_defaults=sampling_defaults(generation_config),
        sample_image=str(demo.SAMPLE) if is_demo else None,
    )
    report = [
        f"model: {info.served_name} ({info.family}), loaded in {load_s:.1f} s from {checkpoint}",
        f"device: {platform.told}; dtype: {_told(dtype)} ({dtype_reason})"
        + (f", stored as {_told(model.config.stored_dtype)}" if model.config.stored_dtype else ""),
        f"chat template: {template_choice.name} ({template_choice.reason})",
        f"context: {context_len} tokens ({context_reason})",
        *machine.memory.report,
        *machine.report,
        _image_line(model.family, largest_image, config.max_image_tokens, image_tokens),
        *_scheduling_lines(limits, config),
    ]
    watchdog = Watchdog(config.watchdog_timeout or defaults.watchdog_timeout_s)
    engine = _build_engine(model, tokenizer, limits, machine, metrics, config, watchdog)
    return LightVLService(engine, prompts, info, report, fetcher, image_threads)


def _build_engine(
    model: Model,
    tokenizer: Tokenizer,
    limits: SchedulerLimits,
    machine: Machine,
    metrics: Metrics,
    config: ServerConfig,
    watchdog: Watchdog,
) -> Engine:
    memory = machine.memory
    pages = PagePool(memory.num_pages)
    radix = None if config.disable_radix_cache else RadixCache(limits.page_size, pages)
    is_cross = model.family.cross_page_len > 0
    images = ImageStore(memory.num_cross_pages if is_cross else memory.num_feature_rows, paged=is_cross)
    scheduler = Scheduler(limits, pages, radix, images)

    def make_detokenizer(params: SamplingParams) -> Detokenizer:
        return Detokenizer(tokenizer, params.stop, not params.keep_special_tokens)

    metrics.gauge("kv_pages_free", lambda: pages.num_free)
    metrics.gauge("kv_pages_held", lambda: pages.num_held)
    metrics.gauge("kv_pages_cached", lambda: pages.num_cached)
    metrics.gauge("preemptions_total", lambda: scheduler.num_preempted)
    return Engine(scheduler, machine.device, make_detokenizer, metrics, watchdog)


def _pick_platform(config: ServerConfig) -> Platform:
    """Raises ConfigError where CUDA is asked for and torch cannot use it."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return CpuPlatform()
    return CudaPlatform(cuda_device(config.device))


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _demo_name(config: ServerConfig) -> str | None:
    """Name of the embedded model that is asked for; None when it is another model."""
    if config.model_path in (None, "demo"):
        return demo.DEFAULT
    assert config.model_path is not None
    return config.model_path.removeprefix("demo:") if config.model_path.startswith("demo:") else None


def _checkpoint(config: ServerConfig) -> Path:
    demo_name = _demo_name(config)
    if demo_name is None:
        return resolve_checkpoint(str(config.model_path))
    try:
        return demo.demo_path(demo_name)
    except KeyError:
        names = ", ".join(f"demo:{name}" for name in demo.FOLDERS)
        raise ConfigError(f"--model-path {config.model_path}: there is no such embedded model, but {names}") from None


def _context_len(config: ServerConfig, max_positions: int) -> tuple[int, str]:
    if config.context_length is None:
        return max_positions, "the model's own limit"
    if config.context_length > max_positions:
        raise ConfigError(
            f"--context-length {config.context_length}: the model was made for at most {max_positions} tokens"
        )
    return config.context_length, "--context-length"


def _largest_image(family: Family) -> LargestImage:
    layouts = probe_layouts(family)
    most_tokens = max((layout.num_tokens for layout in layouts), default=0)
    return LargestImage(most_tokens, max((layout.num_cross_pages for layout in layouts), default=0))


def _image_line(family: Family, largest: LargestImage, asked: int | None, bound: int | None) -> str:
    if family.image_token_id is None:
        return "images: none, a text-only model"
    reason = "the model's own limit"
    num_rows = largest.num_cross_pages * family.cross_page_len or largest.num_tokens
    if bound is not None and 2 * num_rows > bound:  # rounding to whole rows of tokens keeps it below the bound
        reason = "--max-image-tokens" if asked is not None else "the default of --max-image-tokens on a CPU"
    if family.cross_page_len:
        return f"images: 1 token and up to {largest.num_cross_pages} tiles each ({reason})"
    return f"images: up to {largest.num_tokens} tokens each ({reason}); larger ones are scaled down"


def _scheduling_lines(limits: SchedulerLimits, config: ServerConfig) -> list[str]:
    chunk = "whole prompts" if config.chunked_prefill_size == NO_CHUNKING else f"{limits.chunk_tokens} tokens"
    return [
        f"running at once: up to {limits.max_running} sequences; prefill chunks: up to {chunk}, "
        f"fewer while others decode (about {limits.step_budget_s:g} s a step)",
        f"prefix cache: {'off (--disable-radix-cache)' if config.disable_radix_cache else 'on'}",
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return content


def _eos_ids(generation_config: dict[str, Any]) -> list[int]:
    eos = generation_config.get("eos_token_id")
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
