"""The weight files of a checkpoint folder, safetensors or PyTorch's own, one or many: which names are in which.

Used by `load.load_weights`, and by families that must know what a checkpoint holds before they are built. Knows nothing
of parts and targets. A pickle is read as tensors only, never run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from lightvl.errors import ConfigError

_KINDS = (
    ("model.safetensors.index.json", "*.safetensors"),
    # other .bin files lie beside these, such as LLaVA's mm_projector.bin, whose weights the shards repeat
    ("pytorch_model.bin.index.json", "pytorch_model*.bin"),
)


class Tensors(Protocol):
    """One open file. Tensors are read when asked for, and are not valid after the file has been closed."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


def weight_files(checkpoint: Path) -> list[Path]:
    """By the index where there is one. ConfigError when there are none, or one that the index names is missing."""
    for index_name, pattern in _KINDS:
        index = checkpoint / index_name
        if index.is_file():
            files = [checkpoint / name for name in sorted(set(_weight_map(index).values()))]
        else:
            files = sorted(checkpoint.glob(pattern))
        for file in files:
            if not file.is_file():
                raise ConfigError(f"{checkpoint} lacks {file.name}, which {index.name} names (an incomplete download?)")
        if files:
            return files
    raise ConfigError(f"{checkpoint} holds no *.safetensors or pytorch_model*.bin weights")


def weight_names(checkpoint: Path) -> list[str]:
    """All names, without reading tensors; none for a folder without weights."""
    for index_name, pattern in _KINDS:
        if (checkpoint / index_name).is_file():
            return list(_weight_map(checkpoint / index_name))
        names = []
        for file in sorted(checkpoint.glob(pattern)):
            with open_shard(file) as tensors:
                names += tensors.keys()
        if names:
            return names
    return []


@contextmanager
def open_shard(file: Path) -> Iterator[Tensors]:
    """Raises ConfigError for a file that is damaged, also for what goes wrong while it is open."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                yield tensors
        else:
            yield _Pickled(file)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ConfigError(f"{file} cannot be read: {_first_line(error)} (an incomplete download?)") from error


class _Pickled:
    def __init__(self, file: Path) -> None:
        try:
            # files written before PyTorch 1.6 are no zip archives and cannot be mapped
            self._tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except RuntimeError as error:
            raise OSError(_first_line(error)) from error
        if not isinstance(self._tensors, dict):
            raise OSError("it does not hold a dict of tensors")

    def keys(self) -> list[str]:
        return [name for name, value in self._tensors.items() if isinstance(value, torch.Tensor)]

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._tensors[name]
        return tensor


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        weight_map: dict[str, Any] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{index} is not an index of weights: {error!r}") from error
    return weight_map


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
