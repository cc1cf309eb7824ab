"""The loader's ledger: every name used or excused, every target filled once, and one clear line when not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import Drive, DriveRow, load_model, tiny_llama
from safetensors.torch import load_file, save_file
from torch import nn

from lightvl.attention.cpu import CpuAttention
from lightvl.errors import ConfigError
from lightvl.models.linear import Linear
from lightvl.models.load import LoadFormat, WeightPart, load_weights, module_targets, resolve_checkpoint

CPU = torch.device("cpu")
IDS = [5, 9, 200, 31, 7]


def logits(folder: Path, load_format: LoadFormat = "auto") -> torch.Tensor:
    model = load_model(folder, load_format=load_format)
    backend = CpuAttention(model.config.kv_shape, num_pages=4, page_size=4, dtype=torch.float32)
    return Drive(model.decoder, backend, page_size=4, num_pages=4).step([DriveRow("a", IDS)])[0]


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Add, replace or (None) remove tensors of the one file."""
    file = folder / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, file)


def test_shards_prefixes_and_excused_names_load_the_same_weights(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "plain")
    tiny_llama(tmp_path / "nested")
    want = logits(tmp_path / "plain")
    tensors = load_file(tmp_path / "nested" / "model.safetensors")
    (tmp_path / "nested" / "model.safetensors").unlink()
    tensors = {f"language_model.{name}": value for name, value in tensors.items()}
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, own in shards.items():
        save_file({name: tensors[name] for name in own}, tmp_path / "nested" / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (tmp_path / "nested" / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.testing.assert_close(logits(tmp_path / "nested"), want, rtol=0, atol=0)

    (tmp_path / "nested" / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        logits(tmp_path / "nested")


def test_a_tied_head_may_be_stored_twice(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tie_word_embeddings=True)
    want = logits(tmp_path)
    rewrite(tmp_path, {"lm_head.weight": torch.zeros(320, 64)})
    torch.testing.assert_close(logits(tmp_path), want, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.1.self_attn.k_proj.weight": None}, r"lacks layers\.1\.self_attn\.k_proj\.weight \(decoder\)"),
        ({"lm_head.weight": None}, r"lacks lm_head\.weight"),
        (
            {"model.layers.9.mlp.up_proj.weight": torch.ones(1)},
            r"does not know: model\.layers\.9\.mlp\.up_proj\.weight",
        ),
        ({"vision_tower.q_proj.weight": torch.ones(1)}, r"does not know: vision_tower\.q_proj\.weight"),
        ({"model.norm.weight": torch.ones(65)}, r"model\.norm\.weight has shape \[65\].*\[64\] in the model"),
        ({"model.norm.weight": torch.ones(64).to(torch.int8)}, r"quantized"),
        ({"language_model.model.norm.weight": torch.ones(64)}, r"norm\.weight twice"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    tiny_llama(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ConfigError, match=message) as error:
        logits(tmp_path)
    assert "\n" not in str(error.value)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read"):
        logits(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        logits(tmp_path)


def test_dummy_weights_are_seeded_and_need_no_files(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, second = logits(tmp_path, "dummy"), logits(tmp_path, "dummy")
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.isfinite().all() and first.std() > 0.01


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2)
        self.qkv = Linear(8, {"q": 8, "k": 8}, bias=True, dtype=torch.float32, device=CPU)
        self.gate = nn.Parameter(torch.zeros(1))
        self.register_buffer("scale", torch.zeros(2))
        self.register_buffer("position_ids", torch.arange(3), persistent=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_modules_are_filled_name_by_name(device: str, tmp_path: Path) -> None:
    with torch.device(device):
        tower = Tower()
    part = WeightPart("tower", (r"(?:model\.)?tower\.(.+)",), module_targets(tower, dtype=torch.float32, device=CPU))
    shapes = {
        "patch.weight": (8, 3, 2, 2),
        "patch.bias": (8,),
        "q.weight": (8, 8),
        "k.weight": (8, 8),
        "q.bias": (8,),
        "k.bias": (8,),
        "gate": (1,),
        "scale": (2,),
    }
    own = tower.qkv.weight_targets()
    assert set(part.targets) == set(shapes) - set(own) | {f"qkv.{name}" for name in own}
    tensors = {
        f"tower.{'qkv.' + name if name in own else name}": torch.randn(shape).to(torch.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors | {"model.tower.position_ids": torch.arange(3)}, tmp_path / "model.safetensors")
    with torch.inference_mode():
        load_weights([part], tmp_path)
        x = torch.randn(4, 8)
        weight = torch.cat([tensors["tower.qkv.q.weight"], tensors["tower.qkv.k.weight"]]).float()
        bias = torch.cat([tensors["tower.qkv.q.bias"], tensors["tower.qkv.k.bias"]]).float()
        torch.testing.assert_close(tower.qkv(x), x @ weight.T + bias)
    assert torch.equal(tower.patch.weight, tensors["tower.patch.weight"].float())
    assert torch.equal(tower.scale, tensors["tower.scale"].float()) and tower.gate == tensors["tower.gate"]


@pytest.mark.parametrize("name", ["no/such/folder/here", "justaname"])
def test_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a hub id"):
        resolve_checkpoint(name)


def test_offline_hub_id_and_folder_without_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        resolve_checkpoint("nobody/nothing")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        resolve_checkpoint(str(tmp_path))
