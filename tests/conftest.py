from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_law_is_broken(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The engine tells a leak in its log when it becomes idle."""
    yield
    assert "conservation law" not in caplog.text
