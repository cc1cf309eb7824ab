from __future__ import annotations

from collections.abc import Callable

import pytest
from llava_helpers import LlavaOracle
from tiny_llava import ROWS


@pytest.fixture(scope="session")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LlavaOracle]:
    """By the checkpoint's name; built once a session."""
    made: dict[str, LlavaOracle] = {}

    def get(name: str) -> LlavaOracle:
        if name not in made:
            made[name] = LlavaOracle(ROWS[name], tmp_path_factory.mktemp("llava"))
        return made[name]

    return get
