"""Features of single images against HF's: sizes that are odd, wide, tall and tiny, the settings of original
checkpoints, and the budget."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llava_helpers import LlavaOracle
from oracle import load_model
from parity_helpers import noise_image
from PIL import Image
from tiny_llava import ROWS, SIDE
from vision_helpers import features_together

from lightvl.attention.cpu import encoder_attention
from lightvl.errors import BadRequest
from lightvl.models.families import build_family
from lightvl.models.families.llava_anyres import padded_view
from lightvl.models.model import Model
from lightvl.models.vision import clip_siglip

GetOracle = Callable[[str], LlavaOracle]
CPU = torch.device("cpu")
SIZES = [(57, 43), (56, 56), (9, 11), (1, 1), (500, 333), (40, 300), (1000, 13), (11, 700), (112, 56), (57, 56)]
KINDS = ["llava-onevision-qwen2-7b-ov-chat", "llava-v1.6-vicuna-7b", "llava-v1.5-7b", "llava-1.5-7b-hf"]
KINDS += ["llava-next-interleave-qwen-7b", "llava-interleave-qwen-7b-hf"]


def load(folder: Path, max_image_tokens: int | None = None) -> Model:
    return load_model(folder, max_image_tokens=max_image_tokens)


def features_of(model: Model, image: Any, num_images: int = 1) -> torch.Tensor:
    return features_together(model.family, [np.asarray(image)], num_images=num_images)[0]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_one_image_of_any_size(oracle_of: GetOracle, name: str) -> None:
    oracle = oracle_of(name)
    model = load(oracle.folder)
    for seed, size in enumerate(SIZES):
        image = noise_image(*size, seed)
        (want,) = oracle.features(oracle.process([image]))
        assert_close(features_of(model, image), want)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in ROWS if name != "llava-square"])
def test_many_sizes(oracle_of: GetOracle, name: str) -> None:
    oracle = oracle_of(name)
    model = load(oracle.folder)
    rng = np.random.default_rng(7)
    for seed in range(60):
        width, height = (int(2 ** rng.uniform(0, 9.5)) for _ in range(2))
        if max(width, height) > 60 * min(width, height):  # of which some are refused here and fail in HF
            continue
        image = noise_image(width, height, seed)
        (want,) = oracle.features(oracle.process([image]))
        assert_close(features_of(model, image), want)


@pytest.mark.parametrize("name", KINDS)
def test_several_images(oracle_of: GetOracle, name: str) -> None:
    oracle = oracle_of(name)
    model = load(oracle.folder)
    images = [noise_image(*size, seed) for seed, size in enumerate(SIZES[:5])]
    for image, want in zip(images, oracle.features(oracle.process(images)), strict=True):
        assert_close(features_of(model, image, num_images=len(images)), want)


@pytest.mark.parametrize("name", KINDS)
def test_images_together_are_the_same_as_alone(
    oracle_of: GetOracle, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One view and many, in one encode, whose groups of views begin and end anywhere in an image."""
    oracle = oracle_of(name)
    model = load(oracle.folder)
    images = [np.asarray(noise_image(*size, seed)) for seed, size in enumerate(SIZES[:7])]
    monkeypatch.setattr(clip_siglip, "GROUP_ROWS", 17 * 4)
    together = features_together(model.family, images)
    for image, got in zip(images, together, strict=True):
        (want,) = oracle.features(oracle.process([Image.fromarray(image)]))
        assert_close(got, want)
        torch.testing.assert_close(got, features_together(model.family, [image])[0])


def test_an_image_is_done_with_its_last_view(oracle_of: GetOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one does not wait for the others of its job."""
    family = load(oracle_of("llava-1.5-7b-hf").folder).family
    layout = family.plan_image(57, 43, num_images=1)
    inputs = [(family.preprocess(np.asarray(noise_image(57, 43, seed)), layout), layout) for seed in range(5)]
    monkeypatch.setattr(clip_siglip, "GROUP_ROWS", 17 * 2)
    with torch.inference_mode():
        done = [sorted(features) for features in family.encode(inputs, encoder_attention) if features is not None]
    assert done == [[0, 1], [2, 3], [4]]


def test_one_view_and_tiles_of_an_image_have_different_identities(oracle_of: GetOracle) -> None:
    family = load(oracle_of("llava-onevision-qwen2-7b-ov-hf").folder).family
    alone, in_company = (family.plan_image(50, 50, num_images=n) for n in (1, 2))
    assert alone.num_tokens != in_company.num_tokens and alone.grid != in_company.grid


# --- settings of original checkpoints ---------------------------------------------------------------------------------


def changed(oracle: LlavaOracle, parent: Path, **config: Any) -> Path:
    """A copy of the checkpoint (and of its tower's folder) with other settings."""
    shutil.copytree(oracle.folder.parent, parent, dirs_exist_ok=True)
    file = parent / oracle.name / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return file.parent


def views_of(oracle: LlavaOracle, image: Any, *, layer: int = -2, drop: int = 1) -> torch.Tensor:
    """(views, rows, hidden): each view through HF's tower and projector."""
    model, pixels = oracle.twin.model.model, oracle.process([image])["pixel_values"]
    with torch.no_grad():
        states = model.vision_tower(pixels.reshape(-1, *pixels.shape[-3:]), output_hidden_states=True).hidden_states
        projected: torch.Tensor = model.multi_modal_projector(states[layer][:, drop:])
    return projected


@pytest.mark.parametrize("merge", ["flat", "spatial"])
def test_merging_tiles_without_unpadding(oracle_of: GetOracle, tmp_path: Path, merge: str) -> None:
    oracle = oracle_of("llava-v1.6-vicuna-7b")
    model = load(changed(oracle, tmp_path, mm_patch_merge_type=merge))
    for seed, size in enumerate([(57, 43), (300, 90), (40, 300)]):
        image = noise_image(*size, seed)
        views = views_of(oracle, image)
        layout = model.family.plan_image(*size, num_images=1)
        high, wide = layout.grid[:2]
        want = views.flatten(0, 1)
        if merge == "spatial":
            rows = [views[1 + r * wide : 1 + (r + 1) * wide].view(wide, 4, 4, -1) for r in range(high)]
            picture = torch.cat([torch.cat(list(row), 1) for row in rows], 0)
            want = torch.cat((views[0], picture.flatten(0, 1)))
        assert_close(features_of(model, image), want)


@pytest.mark.parametrize(
    ("config", "layer", "drop"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, -2, 0),
        ({"mm_vision_select_layer": -1}, -1, 1),
        ({"mm_vision_select_layer": 1}, 1, 1),
    ],
)
def test_selected_layer_and_feature(
    oracle_of: GetOracle, tmp_path: Path, config: dict[str, Any], layer: int, drop: int
) -> None:
    oracle = oracle_of("llava-v1.5-7b")
    model = load(changed(oracle, tmp_path, **config))
    image = noise_image(70, 50, 1)
    assert_close(features_of(model, image), views_of(oracle, image, layer=layer, drop=drop)[0])


def test_several_layers_side_by_side_as_transformers_saves_them(oracle_of: GetOracle, tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    oracle = oracle_of("llava-1.5-7b-hf")
    config = copy.deepcopy(oracle.twin.model.config)
    config.vision_feature_layer = [1, -2, 0]
    torch.manual_seed(0)
    hf = LlavaForConditionalGeneration(config).eval()
    hf.save_pretrained(tmp_path)
    shutil.copy(oracle.folder / "preprocessor_config.json", tmp_path)
    image = noise_image(70, 50, 1)
    with torch.no_grad():
        (want,) = hf.model.get_image_features(**oracle.process([image]), return_dict=True).pooler_output
    assert_close(features_of(load(tmp_path), image), want)


@pytest.mark.parametrize("max_tiles", [1, 2, 4])
def test_anyres_max_scales_down(oracle_of: GetOracle, tmp_path: Path, max_tiles: int) -> None:
    oracle = oracle_of("llava-onevision-qwen2-7b-ov-chat")
    model = load(changed(oracle, tmp_path, image_aspect_ratio=f"anyres_max_{max_tiles}"))
    for seed, size in enumerate([(500, 333), (120, 300), (60, 60)]):
        image = noise_image(*size, seed)
        (want,) = oracle.twin.model.model.get_image_features(
            **oracle.process([image]), vision_aspect_ratio=f"anyres_max_{max_tiles}", return_dict=True
        ).pooler_output
        assert_close(features_of(model, image), want.detach())


def test_a_projector_of_three_layers(oracle_of: GetOracle, tmp_path: Path) -> None:
    oracle = oracle_of("llava-square")
    folder = changed(oracle, tmp_path, mm_projector_type="mlp3x_gelu")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for part in ("weight", "bias"):
        weights[f"model.mm_projector.0.{part}"] = weights.pop(f"model.mm_projector.{part}")
    for idx in (2, 4):
        weights[f"model.mm_projector.{idx}.weight"] = torch.randn(64, 64) / 8
        weights[f"model.mm_projector.{idx}.bias"] = torch.randn(64)
    save_file(weights, folder / "model.safetensors")
    image = noise_image(70, 50, 1)
    (first,) = oracle.features(oracle.process([image]))
    want = first
    for idx in (2, 4):
        want = torch.nn.functional.gelu(want) @ weights[f"model.mm_projector.{idx}.weight"].T
        want = want + weights[f"model.mm_projector.{idx}.bias"]
    assert_close(features_of(load(folder), image), want)


# --- real sizes: counts only ------------------------------------------------------------------------------------------


def real_family(folder: Path, **config: Any) -> Any:
    """As a published config.json has it; without weights the tower's shape is a known one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return build_family(config, folder, dtype=torch.float32, device=CPU, max_image_tokens=None)


def random_sizes() -> list[tuple[int, int]]:
    rng = np.random.default_rng(3)
    sizes = [tuple(int(2 ** rng.uniform(3, 12.5)) for _ in range(2)) for _ in range(400)]
    return [(width, height) for width, height in sizes if max(width, height) < 60 * min(width, height)]


def test_counts_at_the_size_of_llava_next(tmp_path: Path) -> None:
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    family = real_family(
        tmp_path / "llava-v1.6-vicuna-7b",
        architectures=["LlavaLlamaForCausalLM"],
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        mm_projector_type="mlp2x_gelu",
        image_grid_pinpoints=pinpoints,
    )
    hf = SimpleNamespace(patch_size=14, num_additional_image_tokens=0)
    hf.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    hf._get_unpadded_features = partial(LlavaNextProcessor._get_unpadded_features, hf)
    for width, height in random_sizes():
        want = LlavaNextProcessor._get_number_of_features(hf, height, width, 336, 336)
        assert family.plan_image(width, height, num_images=2).num_tokens == want


def test_counts_at_the_size_of_llava_onevision(tmp_path: Path) -> None:
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    family = real_family(
        tmp_path / "llava-onevision-qwen2-7b-ov",
        architectures=["LlavaQwenForCausalLM"],
        mm_vision_tower="google/siglip-so400m-patch14-384",
        image_aspect_ratio="anyres_max_9",
        mm_patch_merge_type="spatial_unpad",
        mm_projector_type="mlp2x_gelu",
        image_grid_pinpoints="(1x1),...,(6x6)",
        image_token_index=151646,
    )
    hf = SimpleNamespace(num_image_tokens=729, vision_aspect_ratio="anyres_max_9")
    grids = [[384 * high, 384 * wide] for high in range(1, 7) for wide in range(1, 7)]
    hf.image_processor = SimpleNamespace(image_grid_pinpoints=grids)
    hf._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, hf)
    for width, height in random_sizes():
        want = LlavaOnevisionProcessor._get_number_of_features(hf, height, width, 384, 384)
        assert family.plan_image(width, height, num_images=1).num_tokens == want
        assert family.plan_image(width, height, num_images=2).num_tokens == 729 + 1


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_budget_drops_grids_and_keeps_one_view(oracle_of: GetOracle) -> None:
    folder = oracle_of("llava-v1.6-vicuna-7b").folder
    free = load(folder).family.plan_image(300, 300, num_images=1)
    for budget in (free.num_tokens, 60, 40, 1):
        model = load(folder, max_image_tokens=budget)
        layout = model.family.plan_image(300, 300, num_images=1)
        assert layout.num_tokens <= max(budget, 17)
        assert (layout == free) == (budget == free.num_tokens)
        features_of(model, noise_image(300, 300, 0))
    assert not layout.grid and layout.num_tokens == 17, "one view and a newline"


def test_an_image_of_which_nothing_would_be_left_is_refused(oracle_of: GetOracle) -> None:
    for name in ("llava-v1.6-vicuna-7b", "llava-1.5-7b-hf"):
        with pytest.raises(BadRequest, match="too narrow"):
            load(oracle_of(name).folder).family.plan_image(20000, 1, num_images=1)


def test_a_long_narrow_image_does_not_fill_the_memory(oracle_of: GetOracle) -> None:
    model = load(oracle_of("llava-v1.5-7b").folder)
    for width, height in ((10**6, 2), (2, 10**5)):
        layout = model.family.plan_image(width, height, num_images=1)
        rgb = np.zeros((height, width, 3), np.uint8)
        assert model.family.preprocess(rgb, layout).shape == (1, 16, 14 * 14 * 3)


def test_padding_takes_the_mean_colour_and_the_middle() -> None:
    image = np.full((2, 5, 3), 9, np.uint8)
    square = padded_view(image, 5, (1, 2, 3), 3)
    assert square.shape == (5, 5, 3)
    assert (square[1:3] == 9).all() and (square[[0, 3, 4]] == (1, 2, 3)).all()


def test_views_are_encoded_in_bounded_groups(oracle_of: GetOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = oracle_of("llava-onevision-qwen2-7b-ov-hf")
    model, image = load(oracle.folder), noise_image(500, 333, 0)
    whole = features_of(model, image)
    seen: list[int] = []

    def counting(q: Any, k: Any, v: Any, seg_lens: list[int], kv_lens: list[int] | None = None) -> torch.Tensor:
        seen.append(len(seg_lens))
        return encoder_attention(q, k, v, seg_lens, kv_lens)

    monkeypatch.setattr(clip_siglip, "GROUP_ROWS", 16 * 5)
    (features,) = features_together(model.family, [np.asarray(image)], attention=counting)
    torch.testing.assert_close(features, whole)
    assert max(seen) == 5


def test_side_of_siglip_leaves_pixels_over() -> None:
    """So that the tests see that pixels behind the last patch are left out."""
    assert SIDE["siglip"] % 14
