"""What the server is given: the `Service` that engine/build.py makes, seen through protocols, and the `Context` that
the handlers share. Structural typing keeps the engine from importing the server."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lightvl.config import ModelInfo, ServerConfig
from lightvl.core import EngineClient, Grammar, GrammarKind, ImagePart, Message, Prompt
from lightvl.errors import NotFound
from lightvl.metrics import Metrics
from lightvl.server.lifecycle import Lifecycle


class PromptBuilder(Protocol):
    """Messages or text in, Prompt out; images are fetched and decoded on the way. Raises LightVLError for what is
    wrong with the request. May be cancelled at any await."""

    @property
    def vocab_size(self) -> int:
        """Ids that may be generated: from 0 up to this one, which is none."""
        ...

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """End a turn, beside the request's own stops."""
        ...

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """EOS of tokenizer and generation_config, and the template's."""
        ...

    async def build_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> Prompt: ...

    async def build_text(self, text: str, images: Sequence[ImagePart] = (), *, param: str) -> Prompt:
        """`param`: the field that the text came in, for errors."""
        ...

    async def build_ids(self, token_ids: Sequence[int], images: Sequence[ImagePart] = (), *, param: str) -> Prompt: ...

    async def grammar(self, kind: GrammarKind, source: str, *, param: str) -> Grammar:
        """`param`: the field that the source came in, for errors."""
        ...

    def token_text(self, token_id: int) -> str:
        """For logprobs: the token by itself, a replacement character for half of a character."""
        ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def text_of(self, prompt: Prompt) -> str:
        """As the model reads it, control tokens spelled out and each image as one image token."""
        ...

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


def check_model(info: ModelInfo, name: str | None) -> None:
    """Raises NotFound for a name that is not served."""
    if not info.answers_to(name):
        raise NotFound(f"The model '{name}' does not exist.", param="model", code="model_not_found")


class Service(Protocol):
    """Everything below HTTP. Built without a running loop; what needs one is made in `start`."""

    @property
    def engine(self) -> EngineClient: ...

    @property
    def prompts(self) -> PromptBuilder: ...

    @property
    def info(self) -> ModelInfo: ...

    @property
    def report(self) -> Sequence[str]:
        """The start-up report: one line per thing chosen, with the reason."""
        ...

    @property
    def healthy(self) -> bool: ...

    async def start(self) -> None: ...

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more; return when all running sequences have ended, or after `timeout_s` seconds."""
        ...

    async def close(self) -> None:
        """End what still runs with Overloaded, then free everything. May be called without `drain`."""
        ...


@dataclass(slots=True)
class Context:
    """What all handlers share. Holds nothing about any one request."""

    service: Service
    config: ServerConfig
    metrics: Metrics
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    seeds: random.Random = field(init=False)  # where requests without a seed get one

    def __post_init__(self) -> None:
        self.seeds = random.Random(self.config.random_seed)
