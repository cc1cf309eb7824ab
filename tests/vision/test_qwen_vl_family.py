"""Qwen2-VL and Qwen2.5-VL: features, positions and budgets equal transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vision_helpers import family_of, features_of, noise

from lightvl.attention import cpu
from lightvl.errors import BadRequest, ConfigError
from lightvl.models.vision import vit
from lightvl.models.vision.qwen_vl import window_order

KINDS = ["qwen2_vl", "qwen2_5_vl"]
SIZES = [(300, 200), (57, 333), (1, 1), (1000, 40), (641, 482), (112, 112)]
ODD = {"qwen2_vl": {"embed_dim": 36, "num_heads": 3, "mlp_ratio": 3, "hidden_act": "gelu"}}
ODD["qwen2_5_vl"] = {"hidden_size": 36, "num_heads": 3, "intermediate_size": 52, "window_size": 84}


def hf_features(folder: Path, model: Any, rgb: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    inputs = Qwen2VLImageProcessorPil.from_pretrained(folder)(Image.fromarray(rgb), return_tensors="pt")
    with torch.inference_mode():
        out = model.model.visual(inputs["pixel_values"].to(dtype), grid_thw=inputs["image_grid_thw"])
    return out.pooler_output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_features_are_hf_s(checkpoints: Any, kind: str, size: tuple[int, int]) -> None:
    folder, model = checkpoints(kind)
    rgb = noise(*size)
    torch.testing.assert_close(
        features_of(family_of(folder), rgb), hf_features(folder, model, rgb), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", ["published", "memory"])
def test_both_name_styles_load_and_odd_shapes_fit(checkpoints: Any, kind: str, names: str) -> None:
    folder, model = checkpoints(kind, names=names, **ODD[kind])
    rgb = noise(333, 250)
    torch.testing.assert_close(
        features_of(family_of(folder), rgb), hf_features(folder, model, rgb), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_error_is_no_worse_than_twice_hf_s(checkpoints: Any, kind: str, tmp_path: Path) -> None:
    folder, model = checkpoints(kind)
    rgb = noise(333, 250)
    exact = hf_features(folder, model, rgb)
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16).eval()
    # both from the same rounded weights: only the arithmetic is compared
    hf_error = (hf_features(folder, half, rgb, torch.bfloat16).float() - exact).square().mean().sqrt()
    ours = (features_of(family_of(folder, dtype=torch.bfloat16), rgb).float() - exact).square().mean().sqrt()
    assert 0 < ours <= 2 * hf_error


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_positions_are_hf_s(checkpoints: Any, kind: str, data: st.DataObject) -> None:
    """0 to 3 images in any places; HF itself needs a text token between two (real prompts have three)."""
    folder, model = checkpoints(kind)
    family = family_of(folder, load=False)
    sizes = data.draw(st.lists(st.tuples(st.integers(28, 400), st.integers(28, 400)), max_size=3))
    texts = [data.draw(st.integers(int(0 < idx < len(sizes)), 5)) for idx in range(len(sizes) + 1)]
    token_ids: list[int] = [7] * texts[0]
    for num_text in texts[1:]:
        token_ids += [family.image_token_id, *[7] * num_text]
    layouts = [family.plan_image(*size, num_images=len(sizes)) for size in sizes]
    got = family.expand(token_ids, layouts)
    assert [end - begin for begin, end in got.image_rows] == [layout.num_tokens for layout in layouts]
    is_image = got.token_ids == family.image_token_id
    in_rows = np.zeros(len(got.token_ids), bool)
    for begin, end in got.image_rows:
        in_rows[begin:end] = True
    np.testing.assert_array_equal(is_image, in_rows)
    if not layouts:
        assert got.positions is None and got.rope_delta == 0
        return
    want, delta = model.model.get_rope_index(
        torch.from_numpy(got.token_ids)[None],
        mm_token_type_ids=torch.from_numpy(is_image.astype(np.int32))[None],
        image_grid_thw=torch.tensor([layout.grid for layout in layouts]),
    )
    np.testing.assert_array_equal(got.positions, want[:, 0].numpy())
    assert got.rope_delta == delta.item()


def test_images_without_text_between_keep_their_own_grids(checkpoints: Any) -> None:
    family = family_of(checkpoints("qwen2_vl")[0], load=False)
    wide, tall = family.plan_image(112, 56, num_images=2), family.plan_image(56, 112, num_images=2)
    got = family.expand([family.image_token_id] * 2, [wide, tall])
    assert got.image_rows == [(0, 8), (8, 16)]
    assert got.positions is not None
    assert got.positions[:, 8].tolist() == [4, 4, 4] and got.positions[:, -1].tolist() == [4, 7, 5]
    assert got.rope_delta == 8 - 16


def test_image_budget_bounds_tokens_by_the_resizing_rule(checkpoints: Any) -> None:
    folder, _ = checkpoints("qwen2_vl")
    for size in [(4000, 3000), (500, 2000), (30, 30), (1, 200)]:
        for budget in (4, 16, 100, 10_000):
            layout = family_of(folder, max_image_tokens=budget, load=False).plan_image(*size, num_images=1)
            free = family_of(folder, load=False).plan_image(*size, num_images=1)
            assert layout.num_tokens <= free.num_tokens
            if max(size) <= budget * min(size):  # else one token a side is too many already
                assert layout.num_tokens <= budget
    with pytest.raises(BadRequest, match="201"):
        family_of(folder, load=False).plan_image(1, 201, num_images=1)


def test_settings_tell_apart_what_changes_features(checkpoints: Any) -> None:
    folder, _ = checkpoints("qwen2_vl")
    full, small = family_of(folder, load=False), family_of(folder, max_image_tokens=16, load=False)
    plan = full.plan_image(640, 480, num_images=1)
    assert plan.settings == full.plan_image(640, 480, num_images=3).settings
    assert plan.settings != small.plan_image(640, 480, num_images=1).settings


@pytest.mark.parametrize(
    "processor",
    [
        {"min_pixels": 28 * 28 * 20, "max_pixels": 28 * 28 * 30},
        {"size": {"shortest_edge": 28 * 28 * 20, "longest_edge": 28 * 28 * 30}},
        {"size": {"min_pixels": 28 * 28 * 20, "max_pixels": 28 * 28 * 30}},
    ],
)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_processor_files_of_all_ages(checkpoints: Any, tmp_path: Path, processor: dict[str, Any], file: str) -> None:
    shutil.copy(checkpoints("qwen2_vl")[0] / "config.json", tmp_path)
    nested = {"image_processor": processor} if file == "processor_config.json" else processor
    (tmp_path / file).write_text(json.dumps(nested))
    family = family_of(tmp_path, load=False)
    assert 20 <= family.plan_image(20, 20, num_images=1).num_tokens <= 30
    assert 20 <= family.plan_image(2000, 2000, num_images=1).num_tokens <= 30


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("preprocessor_config.json", {"do_resize": False}, "do_resize"),
        ("preprocessor_config.json", {"patch_size": 16}, "patch_size"),
        ("config.json", {"architectures": ["FuyuForCausalLM"]}, "Qwen2VLForConditionalGeneration"),
        ("config.json", {"vision_config": {"embed_dim": 32}}, "hidden_size"),
    ],
)
def test_what_cannot_be_served_is_named(
    checkpoints: Any, tmp_path: Path, file: str, change: dict[str, Any], complaint: str
) -> None:
    for name in ("config.json", "preprocessor_config.json"):
        data = json.loads((checkpoints("qwen2_vl")[0] / name).read_text())
        (tmp_path / name).write_text(json.dumps(data | (change if name == file else {})))
    with pytest.raises(ConfigError, match=complaint):
        family_of(tmp_path, load=False)


def test_missing_processor_file_is_named(checkpoints: Any, tmp_path: Path) -> None:
    shutil.copy(checkpoints("qwen2_vl")[0] / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="preprocessor_config"):
        family_of(tmp_path, load=False)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6))
def test_windows_hold_every_token_once(high: int, wide: int, window: int) -> None:
    order, lens = window_order(high, wide, window)
    assert sorted(order.tolist()) == list(range(high * wide))
    begin = 0
    for num in lens:
        tokens = order[begin : begin + num]
        places = {(token // wide // window, token % wide // window) for token in tokens.tolist()}
        assert len(places) == 1
        begin += num
    assert begin == high * wide


@pytest.mark.parametrize("kind", [*KINDS, "mllama"])
def test_pieces_of_any_size_give_the_same(checkpoints: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of rows, heads and queries bound the work between two pauses; they must not show in the features."""
    family, rgb = family_of(checkpoints(kind)[0]), noise(300, 250)
    want = features_of(family, rgb)
    for name, size in (("ROW_CHUNK", 7), ("PAUSE_ROWS", 14), ("PAUSE_SCORES", 1)):
        monkeypatch.setattr(vit, name, size)
    monkeypatch.setattr(cpu, "SCORE_BLOCK", 3000)
    torch.testing.assert_close(features_of(family, rgb), want)
