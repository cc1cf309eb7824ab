"""What a LLaVA checkpoint says about its images and, by its names, about its template, out of both formats: HF's
(`LlavaForConditionalGeneration`...) and the original one (`LlavaLlamaForCausalLM`...), whose config.json has the
language model's sizes at top level and only the name of its vision tower.

Called by families/llava.py when it is built. HF's and LLaVA's field names end here. Raises ConfigError, naming the
field, for what is not served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightvl.errors import ConfigError
from lightvl.images.transforms import Grid
from lightvl.models.config import ORIGINAL_LLAVA, decoder_config, decoder_type, read_config
from lightvl.models.load import resolve_checkpoint
from lightvl.models.shards import weight_names
from lightvl.models.vision.config import (
    BICUBIC,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Activation,
    PixelConfig,
    find_processor,
    pixel_config,
    read_activation,
)

Merge = Literal["flat", "spatial", "spatial_unpad"]
MERGES: tuple[Merge, ...] = ("flat", "spatial", "spatial_unpad")


@dataclass(frozen=True, slots=True)
class ViewTowerConfig:
    hidden_size: int
    num_layers: int  # as published; those behind the last kept state are not built
    num_heads: int
    mlp_size: int
    activation: Activation
    norm_eps: float
    patch: int
    side: int  # of a view, in pixels
    has_class_token: bool  # CLIP; else SigLIP
    kept_states: tuple[int, ...]  # the features are the states after so many layers, side by side
    pixels: PixelConfig

    @property
    def patches(self) -> int:
        """Along a side; pixels that fill no patch are left out."""
        return self.side // self.patch

    @property
    def view_len(self) -> int:
        return self.patches**2 + self.has_class_token


@dataclass(frozen=True, slots=True)
class LlavaConfig:
    tower: ViewTowerConfig
    tower_folder: Path | None  # where its weights are, if not in the checkpoint
    first_row: int  # rows of a view that are left out at its front: 1 without the class token
    fit: Literal["pad", "crop", "stretch"]  # how an image becomes one square view
    edge: int  # crop: length of the shorter edge before the middle is cut out
    background: tuple[int, int, int]  # pad
    grids: tuple[Grid, ...]  # of tiles, in the order of their choice; empty: one view is all
    max_tiles: int  # larger grids are scaled down to about as many; 0: never
    one_view_each: bool  # of several images in a prompt
    merge: Merge
    projector_names: tuple[str, ...]  # of its linear layers, in the checkpoint
    projector_activation: Activation
    projector_bias: bool
    out_size: int  # the decoder's hidden size
    image_token_id: int


def llava_config(hf_config: Mapping[str, Any], checkpoint: Path) -> LlavaConfig:
    """Of a checkpoint folder in either format."""
    architecture = next(iter(hf_config.get("architectures") or ()), "")
    if architecture in ORIGINAL_LLAVA:
        return _original(hf_config, checkpoint)
    return _hf(hf_config, checkpoint, architecture)


def template_name(hf_config: Mapping[str, Any], checkpoint: Path) -> str:
    """The built-in template of a checkpoint that has none, by its language model. Llamas are told apart by vocabulary
    and name; of a path, only the folder and the hub's `models--owner--name` are names."""
    decoder = decoder_type(dict(hf_config))
    if decoder != "llama":
        return "mistral-llava" if decoder == "mistral" else "chatml-llava"
    text = hf_config.get("text_config") or {}
    of_hub = [part for part in checkpoint.parts if part.startswith("models--")]
    names = " ".join(map(str, (hf_config.get("_name_or_path"), text.get("_name_or_path"), checkpoint.name, *of_hub)))
    vocab_size = text.get("vocab_size") or hf_config.get("vocab_size") or 0
    if vocab_size >= 128000 or re.search(r"llama-?3", names, re.IGNORECASE):
        return "llava_llama_3"
    return "chatml-llava" if 64000 <= vocab_size < 65000 or re.search(r"\b34b\b", names) else "vicuna_v1.1"


def _hf(hf_config: Mapping[str, Any], checkpoint: Path, architecture: str) -> LlavaConfig:
    is_next, is_onevision = architecture.startswith("LlavaNext"), architecture.startswith("LlavaOnevision")
    vision: dict[str, Any] = dict(hf_config.get("vision_config") or {})
    if not vision:  # the config classes have a whole tower for this case
        vision = KNOWN_TOWERS["siglip-so400m-patch14-384" if is_onevision else "clip-vit-large-patch14-336"]
        vision = vision | {"num_hidden_layers": 26} if is_onevision else vision
    is_siglip = str(vision.get("model_type") or ("siglip" if is_onevision else "clip")).startswith("siglip")
    processor = find_processor(checkpoint) or {}
    layers = hf_config.get("vision_feature_layer", -1 if is_onevision else -2)
    tower = _tower(vision, processor, layers if isinstance(layers, list) else [layers], is_siglip=is_siglip)
    strategy = hf_config.get("vision_feature_select_strategy", "full" if is_onevision else "default")
    if strategy not in ("default", "full"):
        raise ConfigError(f"config.json: vision_feature_select_strategy {strategy!r} is not default or full")
    grids: tuple[Grid, ...] = ()
    if is_next or is_onevision:
        pinpoints = hf_config.get("image_grid_pinpoints") or (_ONEVISION_PINPOINTS if is_onevision else _NEXT_PINPOINTS)
        if processor.get("image_grid_pinpoints", pinpoints) != pinpoints:
            raise ConfigError("image_grid_pinpoints of config.json and preprocessor_config.json differ")
        grids = _grids(pinpoints, tower.side)
    decoder = decoder_config(dict(hf_config))
    default_id = 151646 if is_onevision else 32000
    return _checked(
        LlavaConfig(
            tower=tower,
            tower_folder=None,
            first_row=int(strategy == "default"),
            **_square_view(processor, tower, pads=bool(grids) or bool(processor.get("do_pad"))),
            grids=grids,
            max_tiles=_max_tiles(hf_config.get("vision_aspect_ratio", "anyres_max_9")) if is_onevision else 0,
            one_view_each=is_onevision,
            merge="spatial_unpad" if grids else "flat",
            projector_names=("linear_1", "linear_2"),
            projector_activation=read_activation(hf_config.get("projector_hidden_act", "gelu")),
            projector_bias=bool(hf_config.get("multimodal_projector_bias", True)),
            out_size=decoder.hidden_size,
            image_token_id=int(hf_config.get("image_token_index") or hf_config.get("image_token_id") or default_id),
        )
    )


def _original(hf_config: Mapping[str, Any], checkpoint: Path) -> LlavaConfig:
    name = hf_config.get("mm_vision_tower") or hf_config.get("vision_tower")
    if not name:
        raise ConfigError("config.json: mm_vision_tower is missing, so this checkpoint takes no images")
    if hf_config.get("mm_use_im_start_end"):
        raise ConfigError("config.json: mm_use_im_start_end (LLaVA 1.0) is not served")
    names = weight_names(checkpoint)
    is_inside = not names or any("vision_tower." in weight for weight in names)
    folder, vision = _find_tower(str(name), checkpoint, is_inside=is_inside)
    is_siglip = "siglip" in str(vision.get("model_type") or name)
    processor = (find_processor(folder) if folder else None) or find_processor(checkpoint) or {}
    tower = _tower(vision, processor, [hf_config.get("mm_vision_select_layer", -2)], is_siglip=is_siglip)
    feature = hf_config.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ConfigError(f"config.json: mm_vision_select_feature {feature!r} is not patch or cls_patch")
    aspect = hf_config.get("image_aspect_ratio") or "square"
    if aspect not in ("square", "pad", "anyres") and not _is_anyres_max(aspect):
        raise ConfigError(f"config.json: image_aspect_ratio {aspect!r} is not square, pad, anyres or anyres_max_N")
    is_anyres = aspect.startswith("anyres")
    merge = hf_config.get("mm_patch_merge_type") or "flat"
    if merge not in MERGES:
        raise ConfigError(f"config.json: mm_patch_merge_type {merge!r} is not one of {', '.join(MERGES)}")
    decoder = decoder_config(dict(hf_config))
    image_token_id = hf_config.get("image_token_index") or -1
    return _checked(
        LlavaConfig(
            tower=tower,
            tower_folder=None if is_inside else folder,
            first_row=int(feature == "patch" and not is_siglip),
            **_square_view(processor, tower, pads=aspect != "square"),
            grids=_grids(hf_config.get("image_grid_pinpoints") or (), tower.side) if is_anyres else (),
            max_tiles=_max_tiles(aspect) if _is_anyres_max(aspect) and merge == "spatial_unpad" else 0,
            one_view_each=_is_anyres_max(aspect),
            merge=merge,
            projector_names=_projector_names(hf_config.get("mm_projector_type") or "linear"),
            projector_activation="gelu",
            projector_bias=True,
            out_size=decoder.hidden_size,
            # one past all ids with an embedding where the tokenizer has no such token: it is never looked up
            image_token_id=int(image_token_id) if image_token_id >= 0 else decoder.embedding_rows,
        )
    )


def _checked(config: LlavaConfig) -> LlavaConfig:
    if config.grids and config.tower.has_class_token and not config.first_row:
        raise ConfigError("config.json: images in tiles are not served with their class tokens (cls_patch, full)")
    return config


def _tower(
    vision: Mapping[str, Any], processor: Mapping[str, Any], layers: list[int], *, is_siglip: bool
) -> ViewTowerConfig:
    vision = _TOWER_DEFAULTS[is_siglip] | {name: value for name, value in vision.items() if value is not None}
    num_layers = int(vision["num_hidden_layers"])
    kept = tuple(layer if layer >= 0 else num_layers + 1 + layer for layer in layers)
    if not kept or not all(0 <= state_idx <= num_layers for state_idx in kept):
        raise ConfigError(f"config.json: vision feature layers {layers} go beyond the tower's {num_layers} layers")
    mean, std = (HALF, HALF) if is_siglip else (CLIP_MEAN, CLIP_STD)
    return ViewTowerConfig(
        hidden_size=int(vision["hidden_size"]),
        num_layers=num_layers,
        num_heads=int(vision["num_attention_heads"]),
        mlp_size=int(vision["intermediate_size"]),
        activation=read_activation(vision["hidden_act"]),
        norm_eps=float(vision["layer_norm_eps"]),
        patch=int(vision["patch_size"]),
        side=int(vision["image_size"]),
        has_class_token=not is_siglip,
        kept_states=kept,
        pixels=pixel_config(processor, mean=mean, std=std, resample=BICUBIC),
    )


def _square_view(processor: Mapping[str, Any], tower: ViewTowerConfig, *, pads: bool) -> dict[str, Any]:
    """`fit`, `edge` and `background`. CLIP's processor cuts the middle out, SigLIP's stretches."""
    side = tower.side
    default = {"shortest_edge": side} if tower.has_class_token else {"height": side, "width": side}
    size = processor.get("size") or default
    edge = size if isinstance(size, int) else size.get("shortest_edge") or 0
    crop = processor.get("crop_size") or side if processor.get("do_center_crop", bool(edge)) else side
    crop_side = crop if isinstance(crop, int) else crop.get("height")
    fits = edge >= side if edge else (size["height"], size["width"]) == (side, side)
    if not fits or crop_side != side or (edge > side and not processor.get("do_center_crop", True)):
        raise ConfigError(f"preprocessor_config.json: size {size} does not fit the vision tower's {side}x{side}")
    mean = processor.get("image_mean") or (CLIP_MEAN if tower.has_class_token else HALF)
    background = tuple(int(value * 255) for value in mean)
    return {"fit": "pad" if pads else "crop" if edge else "stretch", "edge": int(edge), "background": background}


def _grids(pinpoints: Any, side: int) -> tuple[Grid, ...]:
    """Pixels, or "(1x1),...,(6x6)" in tiles: every pair between the first and the last. (high, wide), as HF reads
    them; LLaVA's own code takes the first number as the width."""
    if isinstance(pinpoints, str):
        ends = [(int(high), int(wide)) for high, wide in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if not ends:
            raise ConfigError(f"config.json: image_grid_pinpoints {pinpoints!r} is not of the form (1x1),...,(6x6)")
        (high_from, wide_from), (high_to, wide_to) = ends[0], ends[-1]
        return tuple((h, w) for h in range(high_from, high_to + 1) for w in range(wide_from, wide_to + 1))
    if not pinpoints or any(high % side or wide % side for high, wide in pinpoints):
        raise ConfigError(f"config.json: image_grid_pinpoints are not multiples of the vision tower's {side} pixels")
    return tuple((high // side, wide // side) for high, wide in pinpoints)


def _is_anyres_max(aspect: str) -> bool:
    return re.fullmatch(r"anyres_max_\d+", aspect) is not None


def _max_tiles(aspect: str) -> int:
    if not _is_anyres_max(aspect):
        raise ConfigError(f"config.json: vision_aspect_ratio {aspect!r} is not anyres_max_N")
    return int(aspect.rpartition("_")[2])


def _projector_names(kind: str) -> tuple[str, ...]:
    match = re.fullmatch(r"linear|mlp(\d+)x_gelu", kind)
    if match is None:
        raise ConfigError(f"config.json: mm_projector_type {kind!r} is not linear or mlpNx_gelu")
    # an nn.Sequential whose every other module is an activation; a lone linear layer has no name
    return tuple(str(2 * i) for i in range(int(match[1]))) if match[1] else ("",)


def _find_tower(name: str, checkpoint: Path, *, is_inside: bool) -> tuple[Path | None, dict[str, Any]]:
    """The tower's folder (None where only its shape is needed, and known) and its config: as a folder, inside or beside
    the checkpoint, or on the hub."""
    own_name = Path(name).name
    for folder in (Path(name).expanduser(), checkpoint / name, checkpoint / own_name, checkpoint.parent / own_name):
        if (folder / "config.json").is_file():
            return folder, _vision_config(folder)
    if is_inside and own_name in KNOWN_TOWERS:
        return None, KNOWN_TOWERS[own_name]
    try:
        folder = resolve_checkpoint(name)
    except ConfigError as error:
        raise ConfigError(
            f"the vision tower {name}, which config.json names as mm_vision_tower, is not found: there is no folder "
            f"{checkpoint.parent / own_name}, and {error}. Put its folder there, or its path into mm_vision_tower"
        ) from error
    return folder, _vision_config(folder)


def _vision_config(folder: Path) -> dict[str, Any]:
    """Of a tower's own folder, which may hold a text side as well."""
    config = read_config(folder)
    return {"model_type": config.get("model_type"), **(config.get("vision_config") or config)}


_TOWER_DEFAULTS: dict[bool, dict[str, Any]] = {  # of HF's config classes; key: is it SigLIP
    False: {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    True: {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""Towers of the published checkpoints, so that those which bring its weights need nothing from elsewhere."""

_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINPOINTS = [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)]
