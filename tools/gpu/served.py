"""A real-size model of random weights in a service of its own, without HTTP, for the parts that load it."""

from __future__ import annotations

import asyncio
import base64
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench.workload import random_jpeg, random_words

from gpu.devices import free
from lightvl.config import ServerConfig
from lightvl.core import ImagePart, Message, Prompt, SamplingParams, TextPart
from lightvl.engine.build import LightVLService, build_service
from lightvl.metrics import Metrics


class Served:
    """Made when first needed, and again in a new process that goes on after a check that broke the last one."""

    def __init__(self, architecture: str, folder: Path, device: str, **flags: Any) -> None:
        """`architecture` of tools/make_random_model.py."""
        self.architecture, self.folder, self.device = architecture, folder, device
        self._flags = {"load_format": "dummy", "dtype": "bfloat16", "device": device} | flags
        self._loop = asyncio.Runner()
        self._service: LightVLService | None = None

    @property
    def service(self) -> LightVLService:
        if self._service is None:
            if not self.folder.exists():
                write_checkpoint(self.folder, self.architecture)
            service = build_service(ServerConfig(model_path=str(self.folder), **self._flags), Metrics())
            self._loop.run(service.start())
            self._service = service
        return self._service

    def run(self, make: Callable[[], Any]) -> Any:
        """The result of the coroutine that `make` makes, on the service's loop."""
        assert self.service is not None  # it cannot be made within its own loop
        return self._loop.run(make())

    def close(self) -> None:
        """Ends the service, and frees the device's memory for the next one."""
        if self._service is not None:
            self._loop.run(self._service.close())
            self._service = None
            free(self.device)
        self._loop.close()

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Exception | None]:
        """All at once; what each ended with, None for well."""

        async def consume(prompt: Prompt) -> None:
            async for _ in self.service.engine.submit(prompt, params):
                pass

        ends = await asyncio.gather(*(consume(prompt) for prompt in prompts), return_exceptions=True)
        return [end if isinstance(end, Exception) else None for end in ends]

    async def image_prompt(self, seed: str, size: tuple[int, int], num_words: int = 4) -> Prompt:
        parts = (ImagePart(_data_url(*size, seed)), TextPart(random_words(num_words, seed)))
        return await self.service.prompts.build_chat([Message("user", parts)])


def random_prompt(rng: np.random.Generator, length: int) -> Prompt:
    """Of plain tokens, whatever they mean."""
    ids = rng.integers(300, 3000, length)
    return Prompt(ids, ids.tolist())


@functools.lru_cache(maxsize=32)
def _data_url(width: int, height: int, seed: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(random_jpeg(width, height, seed)).decode()


def write_checkpoint(folder: Path, architecture: str) -> None:
    """All of a published checkpoint but its weights."""
    import make_random_model as maker

    folder.mkdir(parents=True)
    checkpoint = maker.ARCHITECTURES[architecture]
    for name in ("config", "generation_config", "preprocessor_config"):
        maker.write_json(folder / f"{name}.json", getattr(checkpoint, name))
    maker.save_tokenizer(folder, checkpoint)
