"""Damaged and foreign LLaVA checkpoints end in one clear line; towers are found where they lie; tokenizers of original
checkpoints and the choice of the template."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_helpers import LlavaOracle
from oracle import load_model
from safetensors.torch import load_file, save_file

from lightvl.config import ServerConfig
from lightvl.engine.build import build_service
from lightvl.errors import ConfigError
from lightvl.metrics import Metrics
from lightvl.models.vision.llava_config import template_name
from lightvl.prompt.template import ClientText, Control, ImageSlot
from lightvl.prompt.tokenizer import Tokenizer

GetOracle = Callable[[str], LlavaOracle]
CPU = torch.device("cpu")


@pytest.fixture
def copy_of(oracle_of: GetOracle, tmp_path: Path) -> Callable[[str], Path]:
    """The checkpoint and its tower's folder, to be damaged."""

    def copy(name: str) -> Path:
        shutil.copytree(oracle_of(name).folder.parent, tmp_path, dirs_exist_ok=True)
        return tmp_path / name

    return copy


def load(folder: Path) -> Any:
    return load_model(folder)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(file: Path) -> None:
    """A pickle that would run code."""

    class Evil:
        def __reduce__(self) -> Any:
            return print, ("this must never run",)

    torch.save({"x": Evil()}, file)


BIN, TENSORS = "pytorch_model-00002-of-00002.bin", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("llava-v1.5-7b", lambda f: (f / BIN).unlink(), f"lacks {BIN}"),
        ("llava-v1.5-7b", lambda f: halve(f / BIN), f"{BIN} cannot be read"),
        ("llava-v1.5-7b", lambda f: poison(f / BIN), f"{BIN} cannot be read"),
        ("llava-v1.6-34b", lambda f: (f / TENSORS).unlink(), f"lacks {TENSORS}"),
        ("llava-v1.6-34b", lambda f: halve(f / TENSORS), f"{TENSORS} cannot be read"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", intermediate_size=80), "has shape"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", num_hidden_layers=3), r"lacks layers\.2\..* \(decoder\)"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", num_hidden_layers=1), r"does not know: model\.layers\.1"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_projector_type="linear"), "does not know|lacks"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_projector_type="resampler"), "resampler.*mlpNx_gelu"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", image_aspect_ratio="highres"), "highres.*anyres_max_N"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_patch_merge_type="maxpool2x2"), "maxpool2x2.*flat"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_vision_select_feature="x"), "x.*cls_patch"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_vision_select_feature="cls_patch"), "class tokens"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_vision_select_layer=-9), "beyond the tower's 3"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", image_grid_pinpoints=[[50, 56]]), "multiples of .* 56"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", image_grid_pinpoints="6x6"), r"not of the form \(1x1\)"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_use_im_start_end=True), "mm_use_im_start_end"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", mm_vision_tower=None), "mm_vision_tower is missing"),
        ("llava-v1.6-34b", lambda f: edit(f / "config.json", architectures=["LlavaMptForCausalLM"]),
         "LlavaMptForCausalLM is not served; served are .*LlavaQwenForCausalLM"),
        ("llava-v1.6-34b-hf", lambda f: edit(f / "preprocessor_config.json", crop_size={"height": 8, "width": 8}),
         "does not fit the vision tower's 56x56"),
        ("llava-onevision-qwen2-7b-ov-hf", lambda f: edit(f / "config.json", vision_aspect_ratio="anyres"),
         "anyres_max_N"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_at_once(
    copy_of: Callable[[str], Path], name: str, damage: Callable[[Path], Any], complaint: str
) -> None:
    folder = copy_of(name)
    damage(folder)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=complaint):
        load(folder)
    assert time.monotonic() - began < 5


def test_a_missing_tower_says_what_to_do(copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = copy_of("llava-v1.5-7b")
    tower = folder.parent / "clip-vit-large-patch14-336"
    (tower / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"clip-vit-large-patch14-336 holds no \*\.safetensors"):
        load(folder)
    shutil.rmtree(tower)
    with pytest.raises(
        ConfigError, match=r"openai/clip-vit-large-patch14-336, which .* mm_vision_tower, is not found.*"
    ):
        load(folder)


def test_a_tower_lies_beside_inside_or_anywhere(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy_of("llava-v1.5-7b")
    beside = folder.parent / "clip-vit-large-patch14-336"
    load(folder)
    shutil.move(beside, folder / beside.name)
    load(folder)
    elsewhere = tmp_path / "towers" / "my-own"
    shutil.move(folder / beside.name, elsewhere)
    edit(folder / "config.json", mm_vision_tower=str(elsewhere))
    load(folder)
    weights = torch.load(elsewhere / "pytorch_model.bin", weights_only=True)
    (elsewhere / "pytorch_model.bin").unlink()
    save_file({name: value.contiguous() for name, value in weights.items()}, elsewhere / "model.safetensors")
    load(folder)
    save_file({"vision_model.pre_layrnorm.weight": torch.ones(32)}, elsewhere / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks embeddings\..* \(vision tower\)"):
        load(folder)


def test_known_towers_need_no_folder_where_their_weights_are_inside(copy_of: Callable[[str], Path]) -> None:
    """The tiny tower has other sizes than the real one, so this ends at a shape: without asking the hub."""
    folder = copy_of("llava-v1.6-34b")
    shutil.rmtree(folder.parent / "clip-vit-large-patch14-336")
    with pytest.raises(ConfigError, match=r"has shape|multiples of .* 336 pixels"):
        load(folder)


def test_a_pickle_from_before_zip_archives_loads(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llava-v1.5-7b")
    weights = torch.load(folder / BIN, weights_only=True)
    torch.save(weights, folder / BIN, _use_new_zipfile_serialization=False)
    load(folder)


def test_a_tower_layer_too_many_is_excused_and_one_too_few_is_not(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("llava-onevision-qwen2-0.5b-ov")
    weights = load_file(folder / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.vision_model.encoder.layers."
    spare = {
        name.replace(".layers.2.", ".layers.3."): value.clone()
        for name, value in weights.items()
        if f"{prefix}2." in name
    }
    save_file(weights | spare, folder / "model.safetensors")
    load(folder)
    fewer = {name: value for name, value in weights.items() if f"{prefix}2." not in name}
    save_file(fewer, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks encoder\.layers\.2\."):
        load(folder)


# --- tokenizer and template -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-v1.5-7b", "llava-v1.6-34b", "llava-v1.6-mistral-7b"])
def test_a_slow_tokenizer_of_an_original_checkpoint(oracle_of: GetOracle, name: str) -> None:
    """As sentencepiece itself spells; `<image>` from a client stays text, the template's is one token."""
    import sentencepiece

    oracle = oracle_of(name)
    spelled = sentencepiece.SentencePieceProcessor(model_file=str(oracle.folder / "tokenizer.model"))
    family = load(oracle.folder).family
    tokenizer = Tokenizer.load(str(oracle.folder), image_token_id=family.image_token_id)
    text = "USER: What is in this image?"
    own = [tokenizer.bos_token_id] if tokenizer.adds_bos else []
    assert tokenizer.encode([Control(text)]) == own + spelled.encode(text)
    assert family.image_token_id == oracle.twin.num_logits, "an id without an embedding"
    ids = tokenizer.encode([Control("USER: "), ImageSlot(), Control("\n"), ClientText("say <image> please")])
    assert ids.count(family.image_token_id) == 1
    assert "say <image> please" in tokenizer.decode([i for i in ids if i != family.image_token_id])


@pytest.mark.parametrize(
    ("config", "path", "template"),
    [
        ({"architectures": ["LlavaQwenForCausalLM"]}, "x/llava-next-110b", "chatml-llava"),
        ({"architectures": ["LlavaMistralForCausalLM"]}, "x/llava-v1.6-mistral-7b", "mistral-llava"),
        ({"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 32000}, "x/llava-v1.5-13b", "vicuna_v1.1"),
        ({"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 64000}, "x/mine", "chatml-llava"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "/models--l--llava-v1.6-34b/snapshots/f0", "chatml-llava"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "/c/models--l--llava-v1.5-7b/snapshots/a34b", "vicuna_v1.1"),
        ({"architectures": ["LlavaLlamaForCausalLM"], "vocab_size": 128256}, "x/mine", "llava_llama_3"),
        ({"architectures": ["LlavaLlamaForCausalLM"]}, "/models--l--llama3-llava-next-8b/s/f", "llava_llama_3"),
        ({"architectures": ["LlavaNextForConditionalGeneration"], "text_config": {"vocab_size": 64064}}, "x",
         "chatml-llava"),
        ({"architectures": ["LlavaNextForConditionalGeneration"], "text_config": {"model_type": "mistral"}}, "x",
         "mistral-llava"),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, "x", "vicuna_v1.1"),
        ({"architectures": ["LlavaOnevisionForConditionalGeneration"], "model_type": "llava_onevision"}, "x",
         "chatml-llava"),
    ],
)  # fmt: skip
def test_the_template_is_chosen_by_language_model_and_name(config: dict[str, Any], path: str, template: str) -> None:
    if "LlavaNext" in config["architectures"][0]:
        config = {"model_type": "llava_next", **config}
    assert template_name(config, Path(path)) == template


async def test_the_start_up_report_tells_it(oracle_of: GetOracle) -> None:
    folder = oracle_of("llava-v1.6-34b").folder
    service = build_service(ServerConfig(model_path=str(folder), dtype="float32", max_total_tokens=1024), Metrics())
    told = "\n".join(service.report)
    assert "chat template: chatml-llava (built-in of the family" in told
    assert "LLaVA-NeXT" in told and "the model's own limit" in told
    await service.close()
