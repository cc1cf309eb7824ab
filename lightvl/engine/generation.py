"""What a client waits for: the deltas of one request's choices, merged until they are fetched, so that a slow client
costs memory for text only and never holds the engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from lightvl.core import Delta, Finish, TokenLogprob
from lightvl.errors import LightVLError
from lightvl.prompt.detokenizer import Detokenizer
from lightvl.scheduling.sequence import Sequence


class EngineGeneration:
    """Implements `core.Generation`. One consumer; made and used on the loop."""

    def __init__(self, release: Callable[[Sequence], None]) -> None:
        self._release = release
        self._running: set[Sequence] = set()
        self._pending: dict[int, Delta] = {}
        self._error: LightVLError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def add(self, sequence: Sequence, detokenizer: Detokenizer) -> ActiveChoice:
        self._running.add(sequence)
        return ActiveChoice(sequence, detokenizer, self)

    def pending(self, choice: int) -> Delta:
        """The delta to write to; the consumer is woken."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        delta = self._pending.get(choice)
        if delta is None:
            delta = self._pending[choice] = Delta(choice)
        return delta

    def end(self, sequence: Sequence, finish: Finish) -> None:
        self._running.discard(sequence)
        self.pending(sequence.choice).finish = finish

    def fail(self, error: LightVLError) -> None:
        """The one last event of a request that cannot go on; the deltas before it are still delivered."""
        if self._running and self._error is None:
            self._error = error
            self.abort()

    def abort(self) -> None:
        running, self._running = self._running, set()
        for sequence in running:
            self._release(sequence)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
            if self._error is not None:
                raise self._error
            if not self._running:
                return
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter


@dataclass(slots=True)
class ActiveChoice:
    """An unfinished sequence with its detokenizer and the request that waits for it."""

    sequence: Sequence
    detokenizer: Detokenizer
    generation: EngineGeneration

    def emit(self, text: str, token_id: int, logprob: TokenLogprob | None) -> None:
        delta = self.generation.pending(self.sequence.choice)
        delta.text += text
        delta.token_ids.append(token_id)
        if logprob is not None:
            delta.logprobs.append(logprob)

    def emit_text(self, text: str) -> None:
        self.generation.pending(self.sequence.choice).text += text

    def end(self, finish: Finish) -> None:
        self.generation.end(self.sequence, finish)
