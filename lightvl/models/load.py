"""Weights from a checkpoint folder into the parts of a model: each checkpoint name used or excused, each target filled
once. Called by `Model.load`; the parts declare beside their own parameters which names fill them.

Knows nothing about layers or families: a part is a dict from names to targets, and the regular expressions that strip
the prefixes under which checkpoints of different ages carry these names.

How a tower takes part, in three lines:

    part = WeightPart("vision tower", (r"(?:model\\.)?visual\\.(.+)",), module_targets(tower))

`module_targets` maps parameter and buffer names one to one (built on the meta device or not); submodules that hold
fused or packed weights (`linear.Linear`) declare their own by a `weight_targets()` method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import nn
from tqdm import tqdm

from lightvl.errors import ConfigError
from lightvl.models.shards import Tensors, open_shard, weight_files
from lightvl.models.staging import stage

LoadFormat = Literal["auto", "safetensors", "dummy"]
CPU = torch.device("cpu")

NEVER_WEIGHTS = re.compile(r"(?:.*\.)?(?:inv_freq|position_ids|original_inv_freq)")
"""Buffers that old checkpoints carry and that every model computes for itself."""


@dataclass(frozen=True, slots=True)
class Target:
    """A place that one checkpoint tensor fills: `fill` gets a tensor of exactly `shape`, any floating dtype, on the
    host or on the model's device."""

    shape: tuple[int, ...]
    fill: Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """`patterns` match whole checkpoint names; their one group is the name inside the part. A name belongs to the part
    when that group is one of `targets` or matches `excused` (present in some checkpoints, not needed). `folder`: where
    the names are read from, if not from the checkpoint itself (a vision tower that is published on its own)."""

    title: str  # for error messages: "vision tower"
    patterns: tuple[str, ...]
    targets: dict[str, Target]
    excused: str = r"(?!)"
    folder: Path | None = None


WeightMap = list[WeightPart]


def module_targets(
    module: nn.Module, prefix: str = "", *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> dict[str, Target]:
    """Targets of a plain module, named `prefix` + parameter or persistent buffer name.

    Parameters on the meta device come into being when filled, as `dtype` on `device`; others are copied into.
    Submodules with a `weight_targets()` method answer for themselves.
    """
    own = getattr(module, "weight_targets", None)
    if own is not None:
        return {prefix + name: target for name, target in own().items()}
    targets: dict[str, Target] = {}
    buffers = {name: value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set}
    for name, value in {**module._parameters, **buffers}.items():
        if value is not None:
            targets[prefix + name] = _tensor_target(module, name, value, dtype, device)
    for name, child in module.named_children():
        targets.update(module_targets(child, f"{prefix}{name}.", dtype=dtype, device=device))
    return targets


def _tensor_target(
    owner: nn.Module, name: str, value: torch.Tensor, dtype: torch.dtype | None, device: torch.device | None
) -> Target:
    def fill(tensor: torch.Tensor) -> None:
        if not value.is_meta:
            with torch.no_grad():
                value.copy_(tensor)
            return
        # clone: the source may be a view of the mapped file, which must not outlive the loading
        made = tensor.to(device=device, dtype=dtype or value.dtype, copy=True)
        if isinstance(value, nn.Parameter):
            owner._parameters[name] = nn.Parameter(made, requires_grad=False)
        else:
            owner._buffers[name] = made

    return Target(tuple(value.shape), fill)


class _Ledger:
    """Which names were used and which targets are still empty."""

    def __init__(self, parts: Iterable[WeightPart]) -> None:
        self.parts = [([re.compile(p) for p in part.patterns], re.compile(part.excused), part) for part in parts]
        self.empty = {(part.title, name) for _, _, part in self.parts for name in part.targets}
        self.unused: list[str] = []

    def claim(self, name: str) -> Target | None:
        """The target that this name fills, once; None for a name that fills none."""
        hits: dict[tuple[str, str], Target | None] = {}
        for patterns, excused, part in self.parts:
            for pattern in patterns:
                match = pattern.fullmatch(name)
                if match is None:
                    continue
                local = match.group(1)
                if local in part.targets:
                    hits[part.title, local] = part.targets[local]
                elif excused.fullmatch(local):
                    hits[part.title, local] = None
        if not hits:
            if not NEVER_WEIGHTS.fullmatch(name):
                self.unused.append(name)
            return None
        assert len(hits) == 1, f"{name} belongs to several parts: {sorted(hits)}"
        (key, target), *_ = hits.items()
        if target is None:
            return None
        if key not in self.empty:
            raise ConfigError(f"the checkpoint gives {key[0]} weight {key[1]} twice (second time as {name})")
        self.empty.remove(key)
        return target

    def read(self, tensors: Tensors, name: str, target: Target) -> torch.Tensor:
        """What the target asks for, still in its file."""
        tensor = tensors.get_tensor(name)
        if tuple(tensor.shape) != target.shape:
            raise ConfigError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint, {list(target.shape)} in the model"
            )
        if not tensor.is_floating_point():
            raise ConfigError(f"{name} is stored as {tensor.dtype}; quantized checkpoints are not served")
        return tensor

    def close(self) -> None:
        if self.empty:
            names = sorted(f"{name} ({title})" for title, name in self.empty)
            raise ConfigError(f"the checkpoint lacks {_some(names)}")
        if self.unused:
            raise ConfigError(f"the checkpoint has weights that this model does not know: {_some(sorted(self.unused))}")


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_weights(
    parts: Iterable[WeightPart], checkpoint: Path, load_format: LoadFormat = "auto", *, device: torch.device = CPU
) -> None:
    """Fill every target of `parts`, which are on `device`. Raises ConfigError for missing, unknown, doubled or
    misshapen weights."""
    parts = list(parts)
    if load_format == "dummy":
        _fill_dummy(parts, device)
        return
    for folder in dict.fromkeys(part.folder or checkpoint for part in parts):
        _load_folder([part for part in parts if (part.folder or checkpoint) == folder], folder, device)


def _load_folder(parts: list[WeightPart], folder: Path, device: torch.device) -> None:
    ledger = _Ledger(parts)
    files = weight_files(folder)
    num_names = 0
    for file in files:  # all of them first: a damaged one is told at once, not after minutes of reading
        with open_shard(file) as tensors:
            num_names += len(tensors.keys())
    with tqdm(total=num_names, desc="Loading weights", unit="tensor", leave=False) as bar:
        for file in files:
            with open_shard(file) as tensors:
                claimed = _claimed(ledger, tensors, bar)
                for target, tensor in claimed if device.type == "cpu" else stage(claimed, device):
                    target.fill(tensor)
    ledger.close()


def _claimed(ledger: _Ledger, tensors: Tensors, bar: tqdm[NoReturn]) -> Iterator[tuple[Target, torch.Tensor]]:
    for name in tensors.keys():  # noqa: SIM118  (not a dict)
        target = ledger.claim(name)
        if target is not None:
            yield target, ledger.read(tensors, name, target)
        bar.update()


def _fill_dummy(parts: list[WeightPart], device: torch.device, *, seed: int = 0, std: float = 0.02) -> None:
    """Seeded random weights, norm weights near one. Rows overlap in one block of noise: drawing every weight of a 2B
    model would take longer than reading a real checkpoint."""
    targets = [item for part in parts for item in sorted(part.targets.items())]
    most = max((_matrix_shape(target.shape)[1] for _, target in targets), default=0)
    block = torch.empty(max(1 << 22, 2 * most), device=device)
    block.normal_(std=std, generator=torch.Generator(device).manual_seed(seed))
    for idx, (name, target) in enumerate(tqdm(targets, desc="Dummy weights", unit="tensor", leave=False)):
        num_rows, row_len = _matrix_shape(target.shape)
        stride = (len(block) // 2 - row_len) // num_rows
        noise = block.as_strided((num_rows, row_len), (stride, 1), idx * 1009 % (len(block) // 2)).reshape(target.shape)
        target.fill(noise + 1.0 if len(target.shape) == 1 and name.endswith("weight") else noise)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    num_rows = shape[0] if len(shape) > 1 else 1
    return num_rows, torch.Size(shape).numel() // num_rows


def resolve_checkpoint(path_or_id: str) -> Path:
    """A local folder as it is; else a hub id, downloaded (or found in the hub's cache). ConfigError when neither."""
    local = Path(path_or_id).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ConfigError(f"{local} has no config.json")
        return local
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path_or_id):
        raise ConfigError(f"{path_or_id} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        unused = ["*.bin", "*.pth", "*.h5", "*.msgpack", "*.gguf", "original/*"]
        folder = Path(snapshot_download(path_or_id, ignore_patterns=unused))
        if not any(folder.glob("*.safetensors")):  # few are published as pickles only, but many as both
            snapshot_download(path_or_id, allow_patterns=["pytorch_model*.bin*"])
        return folder
    except GatedRepoError as error:
        raise ConfigError(f"{path_or_id} is gated on the Hugging Face hub: accept its licence and log in") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{path_or_id} is not a local folder and not found on the Hugging Face hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ConfigError(
            f"{path_or_id} is not a local folder, and the Hugging Face hub cannot be reached ({type(error).__name__})"
        ) from error
