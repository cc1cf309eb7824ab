from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity_helpers import Oracle


@pytest.fixture(scope="session")
def oracle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Tiny models are built once a session."""
    made: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in made:
            torch.manual_seed(0)
            made[name] = Oracle(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get
