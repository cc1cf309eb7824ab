"""A service without a model, for the HTTP tests: one token per character, and an engine that repeats the prompt's last
text or follows a script. It keeps what it was asked, and can be made to break at each stage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lightvl.config import ModelInfo
from lightvl.core import (
    Delta,
    Finish,
    Grammar,
    GrammarKind,
    ImagePart,
    Matcher,
    Message,
    Prompt,
    PromptImage,
    SamplingParams,
    TextPart,
    TokenLogprob,
)
from lightvl.errors import BadRequest, LightVLError, Overloaded

IMAGE_TOKENS = 4
CONTEXT_LEN = 2000


@dataclass(frozen=True)
class FakeGrammar:
    kind: GrammarKind
    source: str

    def start(self) -> Matcher:
        raise NotImplementedError


class FakePrompts:
    stop_strings: tuple[str, ...] = ("<end>",)
    stop_token_ids = frozenset({7})
    vocab_size = 1000

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.messages: Sequence[Message] = ()
        self.images: list[ImagePart] = []
        self.continued = False
        self.last_text = ""
        self.num_cancelled = 0

    async def build_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> Prompt:
        assert add_generation_prompt != continue_final_message
        self.messages, self.continued = messages, continue_final_message
        parts = [part for message in messages for part in message.parts]
        text = "".join(part.text for part in parts if isinstance(part, TextPart))
        self.last_text = next((part.text for part in reversed(parts) if isinstance(part, TextPart)), "")
        return await self._prompt([ord(c) for c in text], [part for part in parts if isinstance(part, ImagePart)])

    async def build_text(self, text: str, images: Sequence[ImagePart] = (), *, param: str) -> Prompt:
        self.last_text = text
        return await self._prompt([ord(c) for c in text], list(images))

    async def build_ids(self, token_ids: Sequence[int], images: Sequence[ImagePart] = (), *, param: str) -> Prompt:
        self.last_text = "".join(map(chr, token_ids))
        return await self._prompt(list(token_ids), list(images))

    async def _prompt(self, ids: list[int], images: list[ImagePart]) -> Prompt:
        self.images = images
        if self.gate is not None:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        if self.error is not None:
            raise self.error
        pictures = tuple(PromptImage(i, 0, IMAGE_TOKENS, IMAGE_TOKENS, None) for i in range(len(images)))
        ids = [0] * (IMAGE_TOKENS * len(images)) + ids
        return Prompt(np.array(ids, np.int64), ids, pictures, num_image_tokens=IMAGE_TOKENS * len(images))

    async def grammar(self, kind: GrammarKind, source: str, *, param: str) -> Grammar:
        if "bad" in source:
            raise BadRequest(f"Invalid value for '{param}'", param=param)
        return FakeGrammar(kind, source)

    def text_of(self, prompt: Prompt) -> str:
        return "".join(map(chr, prompt.token_ids.tolist()))

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + [ord(c) for c in text]

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in token_ids if i != 1 or not skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


class FakeGeneration:
    def __init__(self, engine: FakeEngine, deltas: AsyncIterator[Delta]) -> None:
        self.engine = engine
        self.deltas = deltas
        self.aborted = asyncio.Event()
        self.finished = False

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for delta in self.deltas:
            yield delta
        self.finished = True

    def abort(self) -> None:
        if not self.finished and not self.aborted.is_set():
            self.aborted.set()
            self.engine.num_aborted += 1


class FakeEngine:
    """Answers with the last text of the prompt, one character per token. `delay_s` before each token; `break_after`
    tokens it raises `error`."""

    def __init__(self, prompts: FakePrompts) -> None:
        self.prompts = prompts
        self.delay_s = 0.0
        self.error: Exception | None = None
        self.break_after = 0
        self.submit_error: Exception | None = None
        self.script: Callable[[Prompt, SamplingParams], AsyncIterator[Delta]] = self.echo
        self.params: list[SamplingParams] = []
        self.generations: list[FakeGeneration] = []
        self.num_aborted = 0

    def submit(self, prompt: Prompt, params: SamplingParams) -> FakeGeneration:
        if self.submit_error is not None:
            raise self.submit_error
        self.params.append(params)
        generation = FakeGeneration(self, self.script(prompt, params))
        self.generations.append(generation)
        return generation

    async def echo(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Delta]:
        text = self.prompts.last_text[: params.max_tokens]
        for i, char in enumerate(text):
            await asyncio.sleep(self.delay_s)
            if self.error is not None and i == self.break_after:
                raise self.error
            for choice in range(params.n):
                yield Delta(choice, char, [ord(char)], self._logprobs(char, params))
        reason = "stop" if len(text) < params.max_tokens else "length"
        for choice in range(params.n):
            finish = Finish(reason, 7 if reason == "stop" else None, len(prompt), len(text), 3)  # type: ignore[arg-type]
            yield Delta(choice, finish=finish)

    def _logprobs(self, char: str, params: SamplingParams) -> list[TokenLogprob]:
        if params.top_logprobs is None:
            return []
        top = tuple((ord(char) + i, -0.5 - i) for i in range(params.top_logprobs))
        return [TokenLogprob(ord(char), -0.5, top)]


class FakeService:
    def __init__(self, **info: object) -> None:
        self.prompts = FakePrompts()
        self.engine = FakeEngine(self.prompts)
        known = dict(
            served_name="fake/model",
            model_path="/fake",
            family="fake",
            context_len=CONTEXT_LEN,
            created=1,
            aliases=("fake",),
        )
        self.info = ModelInfo(**{**known, **info})  # type: ignore[arg-type]
        self.report = ["pages: 12, because the fake says so"]
        self.healthy = True
        self.events: list[str] = []

    async def start(self) -> None:
        self.events.append("start")

    async def drain(self, timeout_s: float) -> None:
        self.events.append("drain")

    async def close(self) -> None:
        self.events.append("close")


class Broken(Exception):
    """What no client may read: its text stands for an internal detail."""


ERRORS: list[tuple[Exception, int]] = [
    (Broken("secret path /root/x"), 500),
    (Overloaded("The device is in trouble."), 503),
    (LightVLError("told"), 500),
]
