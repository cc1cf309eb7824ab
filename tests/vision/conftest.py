"""Tiny checkpoints, once per session: folder and HF model (float32, eval)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models

Checkpoint = tuple[Path, Any]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """checkpoints("qwen2_vl", names="memory", ...) -> (folder, HF model); equal arguments build once."""
    built: dict[str, Checkpoint] = {}

    def get(kind: str, **options: Any) -> Checkpoint:
        key = repr((kind, sorted(options.items())))
        if key not in built:
            folder = tmp_path_factory.mktemp(kind)
            built[key] = folder, getattr(tiny_models, f"tiny_{kind}")(folder, **options)
        return built[key]

    return get
