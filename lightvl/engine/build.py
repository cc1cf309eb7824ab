"""The composition root: a checked `ServerConfig` in, a service ready to start out. The one place that wires all parts,
and the one that knows the defaults per device; each choice is told in the start-up report with its reason."""

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

from lightvl.attention.cpu import CpuAttention, encoder_attention
from lightvl.config import NO_CHUNKING, ModelInfo, ServerConfig, sampling_defaults
from lightvl.core import SamplingParams
from lightvl.demo import demo_path
from lightvl.engine.device import CpuDevice
from lightvl.engine.engine import Engine
from lightvl.engine.features import FeatureStore
from lightvl.engine.inputs import PageTable
from lightvl.engine.memory import MemoryPlan, plan_memory
from lightvl.engine.runner import Runner
from lightvl.errors import BadRequest, ConfigError
from lightvl.images.cache import MediaCounters
from lightvl.images.fetch import ImageFetcher
from lightvl.metrics import Metrics
from lightvl.models.config import decoder_config, read_config
from lightvl.models.families import default_image_tokens
from lightvl.models.family import Family
from lightvl.models.linear import pick_dtype
from lightvl.models.load import resolve_checkpoint
from lightvl.models.model import Model, load_model
from lightvl.prompt.build import PromptBuilder, PromptLimits
from lightvl.prompt.detokenizer import Detokenizer
from lightvl.prompt.template import choose_template
from lightvl.prompt.tokenizer import Tokenizer
from lightvl.scheduling.image_store import ImageStore
from lightvl.scheduling.limits import SchedulerLimits
from lightvl.scheduling.pages import PagePool
from lightvl.scheduling.radix_cache import RadixCache
from lightvl.scheduling.scheduler import Scheduler

DEMO_NAME = "lightvl-demo"
CPU_PAGE_SIZE = 16
CPU_MAX_RUNNING = 64
CPU_CHUNK_TOKENS = 512
CPU_STEP_BUDGET_S = 0.2  # of a step that decodes: what a reader of a stream may have to wait for others' prefill
CPU_ENCODE_BUDGET_S = 0.1  # of images, in a step that decodes; one tower layer at least
PROBE_SIZES = ((16384, 16384), (16384, 8192), (8192, 16384), (16384, 1024), (1024, 16384))


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
    """Loads the model. Raises ConfigError for what the operator can mend."""
    device = _pick_device(config)
    dtype, dtype_reason = _pick_dtype(config, device)
    checkpoint = _checkpoint(config)
    hf_config = read_config(checkpoint)
    context_len, context_reason = _context_len(config, decoder_config(hf_config).max_positions)
    image_tokens = config.max_image_tokens
    if image_tokens is None:
        image_tokens = default_image_tokens(hf_config, device)

    began = time.monotonic()
    model = load_model(
        checkpoint, dtype=dtype, device=device, load_format=config.load_format, max_image_tokens=image_tokens
    )
    load_s = time.monotonic() - began
    family = model.family
    takes_images = family.image_token_id is not None

    tokenizer_path = config.tokenizer_path or str(checkpoint)
    tokenizer = Tokenizer.load(tokenizer_path, image_token_id=family.image_token_id)
    template, template_choice = choose_template(
        config.chat_template, tokenizer, family_template=family.chat_template, takes_images=takes_images
    )
    generation_config = _read_json(checkpoint / "generation_config.json")

    page_size = config.page_size or CPU_PAGE_SIZE
    max_running = config.max_running_requests or CPU_MAX_RUNNING
    chunk_tokens = config.chunked_prefill_size or CPU_CHUNK_TOKENS
    largest_tokens, largest_cross_pages = _largest_image(family) if takes_images else (0, 0)
    memory = plan_memory(
        config,
        model.config,
        dtype=dtype,
        page_size=page_size,
        context_len=context_len,
        max_running=max_running,
        takes_images=takes_images,
        cross_page_len=family.cross_page_len,
        pages_per_cross_image=largest_cross_pages,
        largest_image_tokens=largest_tokens,
    )

    attention = CpuAttention(
        model.config.kv_shape,
        num_pages=memory.num_pages,
        page_size=page_size,
        dtype=dtype,
        num_cross_pages=memory.num_cross_pages,
        cross_page_len=family.cross_page_len,
    )
    limits = SchedulerLimits(
        page_size=page_size,
        max_running=max_running,
        chunk_tokens=chunk_tokens,
        context_len=context_len,
        step_budget_s=CPU_STEP_BUDGET_S,
        encode_budget_s=CPU_ENCODE_BUDGET_S,
    )
    engine = _build_engine(model, attention, tokenizer, limits, memory, metrics, config)

    counters = MediaCounters()
    _expose(counters, metrics)
    image_threads = ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 2), thread_name_prefix="lightvl-image")
    fetcher = ImageFetcher(
        executor=image_threads, allowed_domains=config.allowed_media_domains or None, counters=counters
    )
    prompts = PromptBuilder(
        family,
        tokenizer,
        template,
        fetcher,
        image_threads,
        PromptLimits(context_len=context_len, vocab_size=model.config.vocab_size),
        counters=counters,
        generation_eos_ids=_eos_ids(generation_config),
    )

    name = config.served_model_name or (DEMO_NAME if _demo_name(config) else str(config.model_path))
    report = (
        f"model: {name} ({family.name}), loaded in {load_s:.1f} s from {checkpoint}",
        f"device: {device}, {torch.get_num_threads()} threads; dtype: {_told(dtype)} ({dtype_reason})",
        f"chat template: {template_choice.name} ({template_choice.reason})",
        f"context: {context_len} tokens ({context_reason})",
        *memory.report,
        *_image_report(family, largest_tokens, largest_cross_pages, config.max_image_tokens, image_tokens),
        f"running at once: up to {max_running} sequences; prefill chunks: up to "
        f"{'whole prompts' if chunk_tokens >= NO_CHUNKING else f'{chunk_tokens} tokens'}, "
        f"fewer while others decode (about {CPU_STEP_BUDGET_S:g} s a step)",
        f"prefix cache: {'off (--disable-radix-cache)' if config.disable_radix_cache else 'on'}",
    )
    info = ModelInfo(
        served_name=name,
        model_path=config.model_path or "demo",
        tokenizer_path=tokenizer_path,
        family=family.name,
        context_len=context_len,
        created=int(time.time()),
        takes_images=takes_images,
        chat_template=template_choice.name,
        aliases=(str(checkpoint),) if config.served_model_name is None else (),
        sampling_defaults=sampling_defaults(generation_config),
        sample_image=str(checkpoint / "sample.png") if _demo_name(config) else None,
    )
    return LightVLService(engine, prompts, info, report, fetcher, image_threads)


def _build_engine(
    model: Model,
    attention: CpuAttention,
    tokenizer: Tokenizer,
    limits: SchedulerLimits,
    memory: MemoryPlan,
    metrics: Metrics,
    config: ServerConfig,
) -> Engine:
    pages = PagePool(memory.num_pages)
    radix = None if config.disable_radix_cache else RadixCache(limits.page_size, pages)
    is_cross = model.family.cross_page_len > 0
    images = ImageStore(memory.num_cross_pages if is_cross else memory.num_feature_rows, paged=is_cross)
    scheduler = Scheduler(limits, pages, radix, images)
    runner = Runner(
        model,
        attention,
        FeatureStore(model, attention, encoder_attention),
        PageTable(limits.max_running, min(memory.num_pages, -(-limits.context_len // limits.page_size))),
        limits.page_size,
    )

    def make_detokenizer(params: SamplingParams) -> Detokenizer:
        return Detokenizer(tokenizer, params.stop, not params.keep_special_tokens)

    metrics.gauge("kv_pages_free", lambda: pages.num_free)
    metrics.gauge("kv_pages_held", lambda: pages.num_held)
    metrics.gauge("kv_pages_cached", lambda: pages.num_cached)
    metrics.gauge("preemptions_total", lambda: scheduler.num_preempted)
    return Engine(scheduler, CpuDevice(runner.run), make_detokenizer, metrics)


def _expose(counters: MediaCounters, metrics: Metrics) -> None:
    for name in ("downloads", "download_hits", "decodes", "decode_hits", "preprocesses", "pixel_hits"):
        metrics.gauge(f"image_{name}_total", lambda name=name: getattr(counters, name))  # type: ignore[misc]


def _pick_device(config: ServerConfig) -> torch.device:
    if config.device.startswith("cuda"):
        raise ConfigError(f"--device {config.device}: CUDA is not served yet; use --device cpu")
    return torch.device("cpu")


def _pick_dtype(config: ServerConfig, device: torch.device) -> tuple[torch.dtype, str]:
    if config.dtype == "auto":
        return pick_dtype(device)
    if config.dtype == "float16" and device.type == "cpu":
        raise ConfigError("--dtype float16: CPUs are very slow at it; use bfloat16 or float32")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype], "--dtype"


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _demo_name(config: ServerConfig) -> str | None:
    """Name of the embedded model that is asked for; None when it is another model."""
    if config.model_path in (None, "demo"):
        return "qwen2-vl"
    assert config.model_path is not None
    return config.model_path.removeprefix("demo:") if config.model_path.startswith("demo:") else None


def _checkpoint(config: ServerConfig) -> Path:
    demo_name = _demo_name(config)
    if demo_name is None:
        return resolve_checkpoint(str(config.model_path))
    try:
        return demo_path(demo_name)
    except KeyError:
        raise ConfigError(f"--model-path {config.model_path}: there is no embedded model of this name") from None


def _context_len(config: ServerConfig, max_positions: int) -> tuple[int, str]:
    if config.context_length is None:
        return max_positions, "the model's own limit"
    if config.context_length > max_positions:
        raise ConfigError(
            f"--context-length {config.context_length}: the model was made for at most {max_positions} tokens"
        )
    return config.context_length, "--context-length"


def _largest_image(family: Family) -> tuple[int, int]:
    """Most tokens and most cross pages of one image, by asking for large ones of several shapes."""
    layouts = []
    for width, height in PROBE_SIZES:
        try:
            layouts.append(family.plan_image(width, height, num_images=1))
        except BadRequest:
            continue
    return max(layout.num_tokens for layout in layouts), max(layout.num_cross_pages for layout in layouts)


def _image_report(
    family: Family, num_tokens: int, num_cross_pages: int, asked: int | None, bound: int | None
) -> list[str]:
    if family.image_token_id is None:
        return ["images: none, a text-only model"]
    reason = "the model's own limit"
    largest_rows = num_cross_pages * family.cross_page_len or num_tokens
    if bound is not None and 2 * largest_rows > bound:  # rounding to whole rows of tokens keeps it below the bound
        reason = "--max-image-tokens" if asked is not None else "the default of --max-image-tokens on a CPU"
    if family.cross_page_len:
        return [f"images: 1 token and up to {num_cross_pages} tiles each ({reason})"]
    return [f"images: up to {num_tokens} tokens each ({reason}); larger ones are scaled down"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return content


def _eos_ids(generation_config: dict[str, Any]) -> list[int]:
    eos = generation_config.get("eos_token_id")
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
