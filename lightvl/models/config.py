"""The decoder's sizes and options, read from a checkpoint's config.json.

HF's field names end here, and for towers in vision/config.py and vision/llava_config.py; only `architectures` is read
elsewhere too, by families/, to choose the family.

Reads both shapes of file: flat (published Qwen2-VL, text-only models) and nested (`text_config`), written by
transformers 4 (`rope_scaling`, `rope_theta`, `torch_dtype`) or 5 (`rope_parameters`, `dtype`). What the decoder cannot
serve exactly is refused with a ConfigError here, before anything is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lightvl.attention.store import KVShape
from lightvl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How the inverse frequencies are stretched; `models/rope.py` has the formulas."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: from mscale, else from factor
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int  # rows of the head: ids that have a logit
    embedding_rows: int
    rms_eps: float
    qkv_bias: bool
    tied_head: bool
    rope_theta: float
    rope_scaling: RopeScaling | None
    mrope_section: tuple[int, ...] | None  # t, h, w shares of head_dim / 2
    cross_layers: tuple[int, ...]  # indices of the cross-attention layers (mllama)
    max_positions: int  # longest context, in tokens; a sliding window counts as its end
    stored_dtype: torch.dtype | None  # as config.json says, for the start-up report

    @property
    def kv_shape(self) -> KVShape:
        num_self_layers = self.num_layers - len(self.cross_layers)
        return KVShape(
            num_self_layers,
            self.num_kv_heads,
            self.head_dim,
            num_cross_layers=len(self.cross_layers),
            num_heads=self.num_heads,
        )


# What transformers' config classes assume when a file does not say: nested text_configs are often written as
# differences from these (published LLaVA-1.5 gives little more than its vocabulary).
_LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}
_QWEN2 = _LLAMA | {
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}
_QWEN2_VL = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
_MLLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
}
_MISTRAL = _LLAMA | {
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "mllama": _MLLAMA,
    "mllama_text_model": _MLLAMA,
}
ORIGINAL_LLAVA = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
"""Architectures of the original LLaVA format, and the type of their decoders."""


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json as it is. ConfigError when absent or not an object."""
    file = checkpoint / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} does not hold an object")
    return config


def decoder_type(hf_config: dict[str, Any]) -> str | None:
    """HF's model type of the decoder. Original LLaVA has all in one level, and its `model_type` tells nothing."""
    for architecture in hf_config.get("architectures") or ():
        if architecture in ORIGINAL_LLAVA:
            return ORIGINAL_LLAVA[architecture]
    nested = hf_config.get("text_config") or {}
    # LLaVA's config classes take a Llama where nothing is said, OneVision's a Qwen2
    unsaid = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2"}
    outer = hf_config.get("model_type")
    return nested.get("model_type") or unsaid.get(str(outer), outer)


def decoder_config(hf_config: dict[str, Any]) -> DecoderConfig:
    """The decoder's part of a whole model's config."""
    nested = hf_config.get("text_config") or {}
    kind = decoder_type(hf_config)
    if kind not in DEFAULTS:
        raise ConfigError(f"a decoder of type {kind!r} is not served; known: {', '.join(sorted(DEFAULTS))}")
    source = nested or hf_config
    given = {key: value for key, value in source.items() if value is not None}
    text = DEFAULTS[kind] | given
    if source.get("sliding_window", ...) is None:  # said, and none: not the default window
        text["sliding_window"] = None
    _refuse_unserved(text)

    is_qwen2, is_mllama = kind.startswith("qwen2"), kind.startswith("mllama")
    heads, hidden = int(text["num_attention_heads"]), int(text["hidden_size"])
    kv_heads = int(text.get("num_key_value_heads", heads))
    head_dim = int(text.get("head_dim", hidden // heads))
    if heads % kv_heads or head_dim % 2:
        raise ConfigError(f"{heads} query heads, {kv_heads} K,V heads of size {head_dim} do not fit together")
    rope = _rope_fields(text)
    section = rope.get("mrope_section")
    if section is not None and sum(section) != head_dim // 2:
        raise ConfigError(f"mrope_section {section} does not add up to half of head_dim {head_dim}")
    cross = tuple(sorted(text["cross_attention_layers"])) if is_mllama else ()
    num_layers = int(text["num_hidden_layers"])
    return DecoderConfig(
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=int(text["intermediate_size"]),
        vocab_size=int(text["vocab_size"]),
        # mllama's eight extra rows hold <|image|>, which has no logit
        embedding_rows=int(text["vocab_size"]) + (8 if is_mllama else 0),
        rms_eps=float(text["rms_norm_eps"]),
        qkv_bias=is_qwen2,
        tied_head=bool(given.get("tie_word_embeddings", hf_config.get("tie_word_embeddings", False))),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope, int(text["max_position_embeddings"])),
        mrope_section=None if section is None else tuple(section),
        cross_layers=tuple(idx for idx in cross if idx < num_layers),
        max_positions=_max_positions(text, is_qwen2=is_qwen2),
        stored_dtype=_stored_dtype(hf_config, nested),
    )


def _refuse_unserved(text: dict[str, Any]) -> None:
    if text.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {text['hidden_act']!r} is not served, only silu")
    for field in ("attention_bias", "mlp_bias"):
        if text.get(field):
            raise ConfigError(f"{field} is not served")
    if text.get("partial_rotary_factor", 1.0) != 1.0 or _rope_fields(text).get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("partial_rotary_factor is not served")
    if "quantization_config" in text:
        raise ConfigError("quantized checkpoints are not served")


def _rope_fields(text: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 has everything in `rope_parameters`; 4 has `rope_scaling` beside a top-level `rope_theta`."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return {"rope_theta": text["rope_theta"]} | {key: value for key, value in given.items() if value is not None}


def _rope_scaling(rope: dict[str, Any], max_positions: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", "mrope"):
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise ConfigError(f"rope scaling {kind!r} is not served; served: linear, llama3, yarn")
    original = int(rope.get("original_max_position_embeddings", max_positions))
    if "factor" not in rope and kind != "yarn":
        raise ConfigError(f"rope scaling {kind!r} lacks its factor")
    fields = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale")
    return RopeScaling(
        kind=kind,
        factor=float(rope.get("factor") or max_positions / original),
        original_max_positions=original,
        truncate=bool(rope.get("truncate", True)),
        **{field: float(rope[field]) for field in (*fields, "mscale_all_dim") if field in rope},
    )


def _max_positions(text: dict[str, Any], *, is_qwen2: bool) -> int:
    """Attention is always full here; a sliding window equals it as long as the context does not exceed the window."""
    positions = int(text["max_position_embeddings"])
    window = text.get("sliding_window")
    if window is None or (is_qwen2 and not text.get("use_sliding_window")):
        return positions
    return min(positions, int(window))


def _stored_dtype(*configs: dict[str, Any]) -> torch.dtype | None:
    for config in configs:
        name = config.get("dtype") or config.get("torch_dtype")
        dtype = getattr(torch, str(name).removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    return None
