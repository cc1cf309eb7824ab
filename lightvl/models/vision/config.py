"""Shapes and pixel settings of vision towers, out of config.json's `vision_config` and preprocessor_config.json.

Called by the families when they are built. As in `models/config.py`, HF's field names end here: what leaves this module
has one spelling. Raises ConfigError, naming the field, for what a tower cannot serve.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightvl.errors import ConfigError
from lightvl.images.transforms import Grid, tile_grids

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: dict[str, Activation] = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
BILINEAR, BICUBIC = 2, 3  # Pillow's numbers


@dataclass(frozen=True, slots=True)
class PixelConfig:
    """A byte becomes `byte * scale + shift`, per channel; `resample` is Pillow's number of the resizing filter."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]
    resample: int


@dataclass(frozen=True, slots=True)
class QwenVisionConfig:
    """One tower for Qwen2-VL and Qwen2.5-VL."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    out_size: int  # the decoder's hidden size
    activation: Activation
    gated_mlp: bool  # with RMS norms (Qwen2.5-VL); else a plain MLP with layer norms
    rope_theta: float
    patch: int
    merge: int  # a token is merge x merge patches
    frames: int  # how many times the patch embedding sees a still image
    window: int  # side of an attention window in tokens; 0: every layer attends to the whole image
    full_attention_layers: frozenset[int]
    min_pixels: int
    max_pixels: int
    image_token_id: int
    pixels: PixelConfig


@dataclass(frozen=True, slots=True)
class MllamaVisionConfig:
    hidden_size: int
    num_layers: int
    num_global_layers: int
    num_heads: int
    mlp_size: int
    activation: Activation
    norm_eps: float
    patch: int
    tile: int  # side of a tile, in pixels
    max_tiles: int
    grids: tuple[Grid, ...]  # aspect ratio id - 1 -> tiles (high, wide)
    kept_layers: tuple[int, ...]  # local layers whose outputs join the features
    out_size: int  # the decoder's hidden size
    image_token_id: int
    pixels: PixelConfig

    @property
    def tile_len(self) -> int:
        """Feature rows of one tile: its patches and a class token."""
        return (self.tile // self.patch) ** 2 + 1

    @property
    def feature_size(self) -> int:
        return self.hidden_size * (1 + len(self.kept_layers))


def qwen_vision_config(hf_config: Mapping[str, Any], checkpoint: Path) -> QwenVisionConfig:
    """Of a Qwen2VL or Qwen2_5_VL checkpoint folder."""
    vision: Mapping[str, Any] = _get(hf_config, "vision_config")
    windowed = "window_size" in vision or "fullatt_block_indexes" in vision or "out_hidden_size" in vision
    processor = read_processor(checkpoint)
    size: Mapping[str, Any] = processor.get("size") or {}
    patch, merge = int(vision.get("patch_size", 14)), int(vision.get("spatial_merge_size", 2))
    for field, value in (("patch_size", patch), ("merge_size", merge)):
        if processor.get(field, value) != value:
            raise ConfigError(f"preprocessor_config.json: {field} is {processor[field]}, the vision tower has {value}")
    if windowed:
        hidden_size, out_size = int(_get(vision, "hidden_size")), int(_get(vision, "out_hidden_size"))
        mlp_size = int(_get(vision, "intermediate_size"))
    else:
        hidden_size, out_size = int(_get(vision, "embed_dim")), int(_get(vision, "hidden_size"))
        mlp_size = int(hidden_size * vision.get("mlp_ratio", 4))
    return QwenVisionConfig(
        hidden_size=hidden_size,
        num_layers=int(_get(vision, "depth")),
        num_heads=int(_get(vision, "num_heads")),
        mlp_size=mlp_size,
        out_size=out_size,
        activation=read_activation(vision.get("hidden_act", "silu" if windowed else "quick_gelu")),
        gated_mlp=windowed,
        rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", 10000.0)),
        patch=patch,
        merge=merge,
        frames=int(vision.get("temporal_patch_size", 2)),
        window=int(vision.get("window_size", 112)) // merge // patch if windowed else 0,
        full_attention_layers=frozenset(vision.get("fullatt_block_indexes", (7, 15, 23, 31)) if windowed else ()),
        # the old fields win over `size`, and `size` itself has had two spellings
        min_pixels=_first(processor.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), 56 * 56),
        max_pixels=_first(
            processor.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), 28 * 28 * 1280
        ),
        image_token_id=int(hf_config.get("image_token_id", 151655)),
        pixels=pixel_config(processor, mean=CLIP_MEAN, std=CLIP_STD, resample=BICUBIC),
    )


def mllama_vision_config(hf_config: Mapping[str, Any], checkpoint: Path) -> MllamaVisionConfig:
    vision: Mapping[str, Any] = _get(hf_config, "vision_config")
    processor = read_processor(checkpoint)
    tile, max_tiles = int(vision.get("image_size", 448)), int(vision.get("max_num_tiles", 4))
    size = processor.get("size") or {"height": 224, "width": 224}
    if (size.get("height"), size.get("width")) != (tile, tile):
        raise ConfigError(f"preprocessor_config.json: size is {size}, the vision tower's tiles are {tile}x{tile}")
    grids = tile_grids(max_tiles)
    supported = vision.get("supported_aspect_ratios")
    if supported is not None and [tuple(grid) for grid in supported] != grids:
        raise ConfigError(f"config.json: supported_aspect_ratios are not those of {max_tiles} tiles in order")
    if processor.get("max_image_tiles", max_tiles) != max_tiles:
        raise ConfigError(
            f"preprocessor_config.json: max_image_tiles is {processor['max_image_tiles']}, "
            f"the vision tower has {max_tiles}"
        )
    num_layers = int(_get(vision, "num_hidden_layers"))
    kept_layers = tuple(vision.get("intermediate_layers_indices") or (3, 7, 15, 23, 30))
    if not all(0 <= layer_idx < num_layers for layer_idx in kept_layers):
        raise ConfigError(f"config.json: intermediate_layers_indices {kept_layers} go beyond {num_layers} layers")
    return MllamaVisionConfig(
        hidden_size=int(_get(vision, "hidden_size")),
        num_layers=num_layers,
        num_global_layers=int(_get(vision, "num_global_layers")),
        num_heads=int(_first(vision.get("attention_heads"), vision.get("num_attention_heads"), 16)),
        mlp_size=int(_get(vision, "intermediate_size")),
        activation=read_activation(vision.get("hidden_act", "gelu")),
        norm_eps=float(vision.get("norm_eps", 1e-5)),
        patch=int(vision.get("patch_size", 14)),
        tile=tile,
        max_tiles=max_tiles,
        grids=tuple(grids),
        kept_layers=kept_layers,
        out_size=int(_get(_get(hf_config, "text_config"), "hidden_size")),
        image_token_id=int(_first(hf_config.get("image_token_index"), hf_config.get("image_token_id"), 128256)),
        pixels=pixel_config(processor, mean=HALF, std=HALF, resample=BILINEAR),
    )


def read_processor(checkpoint: Path) -> dict[str, Any]:
    """As `find_processor`, but ConfigError where there are none."""
    settings = find_processor(checkpoint)
    if settings is None:
        raise ConfigError(f"{checkpoint} lacks preprocessor_config.json, which says how images are prepared")
    return settings


def find_processor(checkpoint: Path) -> dict[str, Any] | None:
    """The image processor's settings: preprocessor_config.json, or inside processor_config.json in newer folders."""
    for name, key in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        path = checkpoint / name
        if not path.is_file():
            continue
        try:
            data = json.loads(path.read_text())
            settings = data if key is None else data.get(key)
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        if isinstance(settings, dict):
            return settings
    return None


def pixel_config(
    processor: Mapping[str, Any], *, mean: tuple[float, ...], std: tuple[float, ...], resample: int
) -> PixelConfig:
    if not processor.get("do_resize", True):
        raise ConfigError("preprocessor_config.json: do_resize false is not served")
    factor = float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0
    mean, std = tuple(processor.get("image_mean") or mean), tuple(processor.get("image_std") or std)
    if not processor.get("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return PixelConfig(
        scale=tuple(factor / deviation for deviation in std),
        shift=tuple(-middle / deviation for middle, deviation in zip(mean, std, strict=True)),
        resample=int(processor.get("resample", resample)),
    )


def read_activation(name: str) -> Activation:
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json: vision hidden_act {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _get(config: Mapping[str, Any], field: str) -> Any:
    if config.get(field) is None:
        raise ConfigError(f"config.json: {field} is missing")
    return config[field]


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
