"""What the operator chose (`ServerConfig`, from the flags) and what is served (`ModelInfo`, from the checkpoint).

Made once at start, frozen, read by every part; no torch, no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NO_CHUNKING = 1 << 30
"""`chunked_prefill_size` of `--chunked-prefill-size -1`: larger than any prompt."""


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The flags, checked each by itself. None: chosen at start by `engine/build.py`, with a line in the report."""

    model_path: str | None = None  # None, "demo" or "demo:NAME": the embedded model; else a folder or a hub id
    tokenizer_path: str | None = None
    chat_template: str | None = None  # a built-in template's name or a Jinja file
    served_model_name: str | None = None
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # auto | cpu | cuda[:N]
    context_length: int | None = None  # tokens

    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None  # tokens of K,V in the page pool
    max_running_requests: int | None = None
    chunked_prefill_size: int | None = None  # tokens per step; NO_CHUNKING: whole prompts
    page_size: int | None = None  # tokens
    disable_radix_cache: bool = False
    cuda_graph_max_bs: int | None = None  # rows of the largest decode step that is captured
    disable_cuda_graph: bool = False
    watchdog_timeout: float | None = None  # seconds that a step may take
    random_seed: int | None = None

    max_image_tokens: int | None = None
    allowed_media_domains: tuple[str, ...] = ()  # empty: any public host

    host: str = "127.0.0.1"
    port: int = 30000  # 0: any free port
    api_key: str | None = None

    log_level: str = "info"
    log_requests: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is served, for /v1/models, /get_model_info, the checks of a request and the start-up greeting."""

    served_name: str
    model_path: str
    family: str
    context_len: int  # tokens, prompt and answer together
    created: int  # unix seconds
    tokenizer_path: str = ""
    takes_images: bool = True
    chat_template: str = ""
    aliases: tuple[str, ...] = ()  # further names that requests may use; "default" always works
    sampling_defaults: Mapping[str, float | int] = field(default_factory=dict)  # see `sampling_defaults` below
    sample_image: str | None = None  # a file to show in the greeting's curl command
    sample_question: str = "What is in this image?"

    def answers_to(self, name: str | None) -> bool:
        return name is None or name in ("default", self.served_name) or name in self.aliases


def sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, float | int]:
    """The sampling fields of a checkpoint's generation_config.json that a request's absent fields take. A config that
    says `do_sample: false` and no temperature means greedy decoding; otherwise OpenAI's own default, 1.0, holds."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        defaults.setdefault("temperature", 0.0)
    return defaults
