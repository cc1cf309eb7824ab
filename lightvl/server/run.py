"""One admitted request from submit to its end: aborted if left early, counted and logged in any case.

Used as a context manager by the endpoints, which feed it every delta; knows no wire format."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from lightvl.core import Delta, Finish, Prompt, SamplingParams, TokenLogprob
from lightvl.log import RequestLine
from lightvl.server.schema import PromptTokensDetails, Usage
from lightvl.server.service import Context

log = logging.getLogger(__name__)


def content_logprobs(delta: Delta) -> list[TokenLogprob]:
    """Without the stop token, which is no part of the content; it comes in the delta that ends the choice."""
    is_stopped = delta.finish is not None and isinstance(delta.finish.matched_stop, int)
    return delta.logprobs[:-1] if is_stopped else delta.logprobs


class Run:
    """Submits at once, so that a request that can never be served raises here, before any reply has begun.

    `started`: `time.monotonic()` when the request's body had been read; TTFT counts from there, images included.
    """

    def __init__(
        self, context: Context, request_id: str, prompt: Prompt, params: SamplingParams, *, started: float
    ) -> None:
        self.context = context
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.finishes: dict[int, Finish] = {}  # by choice
        self._started = started
        self._ttft_s: float | None = None
        self._num_generated = 0
        self.generation = context.service.engine.submit(prompt, params)

    def __enter__(self) -> Run:
        return self

    def note(self, delta: Delta) -> None:
        if delta.token_ids:
            self._num_generated += len(delta.token_ids)
            if self._ttft_s is None:
                self._ttft_s = time.monotonic() - self._started
        if delta.finish is not None:
            self.finishes[delta.choice] = delta.finish

    async def whole(self) -> list[tuple[str, list[TokenLogprob]]]:
        """Waits for the end of all choices; the text of each and its tokens' logprobs."""
        texts: list[list[str]] = [[] for _ in range(self.params.n)]
        logprobs: list[list[TokenLogprob]] = [[] for _ in range(self.params.n)]
        async for delta in self.generation:
            self.note(delta)
            texts[delta.choice].append(delta.text)
            logprobs[delta.choice] += content_logprobs(delta)
        return [("".join(parts), entries) for parts, entries in zip(texts, logprobs, strict=True)]

    @property
    def cached_tokens(self) -> int:
        """Of the first choice: the others share its prefill, which is no hit of the cache."""
        return self.finishes[0].cached_tokens if 0 in self.finishes else 0

    @property
    def duration_s(self) -> float:
        return time.monotonic() - self._started

    def usage(self) -> Usage:
        num_completion = sum(finish.completion_tokens for finish in self.finishes.values())
        return Usage(
            prompt_tokens=len(self.prompt),
            completion_tokens=num_completion,
            total_tokens=len(self.prompt) + num_completion,
            prompt_tokens_details=PromptTokensDetails(self.cached_tokens, self.prompt.num_image_tokens),
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.generation.abort()
        complete = len(self.finishes) == self.params.n
        metrics = self.context.metrics
        metrics.add("requests_total")
        metrics.add("requests_broken_off_total", int(not complete))
        metrics.add("prompt_tokens_total", len(self.prompt))
        metrics.add("cached_tokens_total", self.cached_tokens)
        metrics.add("generation_tokens_total", self._num_generated)
        metrics.observe("e2e_request_latency_seconds", self.duration_s)
        if self._ttft_s is not None:
            metrics.observe("time_to_first_token_seconds", self._ttft_s)
        if self.context.config.log_requests:
            reasons = ",".join(self.finishes[choice].reason for choice in sorted(self.finishes))
            line = RequestLine(
                request_id=self.request_id,
                prompt_tokens=len(self.prompt),
                num_images=len(self.prompt.images),
                cached_tokens=self.cached_tokens,
                completion_tokens=self._num_generated,
                ttft_s=self._ttft_s,
                duration_s=self.duration_s,
                finish=reasons if complete else "broken off" if error is None else type(error).__name__,
            )
            log.info("%s", line)
