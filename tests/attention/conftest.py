"""flashinfer on a CPU, for the tests of what calls it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from flashinfer_helpers import Places, fake_flashinfer

from lightvl.attention import cuda_encoder, cuda_kernels, cuda_library


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in, and tensors that know whether they are on the host or on the "device"."""
    places = Places()
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer(places))
    monkeypatch.setattr(cuda_kernels, "host", places.host)
    monkeypatch.setattr(cuda_kernels, "pinned", places.pinned)
    monkeypatch.setattr(cuda_kernels, "send", places.send)
    monkeypatch.setattr(cuda_encoder, "send", places.send)
    cuda_library.flashinfer.cache_clear()
    cuda_encoder._ends.cache_clear()
    yield
    cuda_library.flashinfer.cache_clear()
    cuda_encoder._ends.cache_clear()
