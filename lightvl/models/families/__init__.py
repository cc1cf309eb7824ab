"""Model families, by the `architectures` of config.json: what stands around the one decoder.

    build_family(config.json's content, folder, ...) -> Family      weights are filled later, through `weight_parts()`

A family says how large an image becomes, how its pixels are prepared, which rows of the prompt it takes or is seen by,
and what its features are. A new family is a module here and a line in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightvl.errors import ConfigError
from lightvl.models.families.llava import LlavaFamily
from lightvl.models.families.mllama import MllamaFamily
from lightvl.models.families.qwen2_vl import Qwen2VLFamily
from lightvl.models.families.text import TextFamily
from lightvl.models.family import Family

FAMILIES: dict[str, Callable[..., Family]] = {
    "MllamaForConditionalGeneration": MllamaFamily,
    "Qwen2VLForConditionalGeneration": Qwen2VLFamily,
    "Qwen2_5_VLForConditionalGeneration": Qwen2VLFamily,
    "LlavaForConditionalGeneration": LlavaFamily,
    "LlavaNextForConditionalGeneration": LlavaFamily,
    "LlavaOnevisionForConditionalGeneration": LlavaFamily,
    "LlavaLlamaForCausalLM": LlavaFamily,
    "LlavaMistralForCausalLM": LlavaFamily,
    "LlavaQwenForCausalLM": LlavaFamily,
    "LlamaForCausalLM": TextFamily,
    "MistralForCausalLM": TextFamily,
    "Qwen2ForCausalLM": TextFamily,
}


def build_family(
    hf_config: dict[str, Any],
    checkpoint: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_image_tokens: int | None,
) -> Family:
    """ConfigError for an architecture that is not served, naming those that are."""
    architectures = hf_config.get("architectures") or []
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture](
                hf_config, checkpoint, dtype=dtype, device=device, max_image_tokens=max_image_tokens
            )
    raise ConfigError(
        f"config.json: architecture {', '.join(map(str, architectures)) or 'not given'} is not served; "
        f"served are {', '.join(FAMILIES)}"
    )


CPU_IMAGE_TOKENS = 1280
"""Default of `--max-image-tokens` on a CPU, where a tower takes seconds for more."""


def default_image_tokens(hf_config: dict[str, Any], device: torch.device) -> int | None:
    """What bounds an image when the operator does not say; None: the model's own limit, for all but Qwen2-VL, whose
    images alone shrink smoothly. A cross-attention tower always computes all its tiles, so there a bound would cost
    detail and save nothing; of LLaVA's tiles it would leave none."""
    shrinks = any(FAMILIES.get(name) is Qwen2VLFamily for name in hf_config.get("architectures") or [])
    return CPU_IMAGE_TOKENS if device.type == "cpu" and shrinks else None
