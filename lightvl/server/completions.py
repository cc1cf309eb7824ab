"""`POST /v1/completions`: OpenAI's older endpoint, for one prompt at a time, which the answer goes on from. No template
and no images: those are for chat and for /generate."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence

import msgspec
from aiohttp import web

from lightvl.core import Finish, Prompt, SamplingParams, TokenLogprob
from lightvl.errors import BadRequest
from lightvl.server import sse
from lightvl.server.body import read_body, refuse_unserved
from lightvl.server.middleware import json_reply
from lightvl.server.params import at_most, batch_refused, fit, positive, sampling_params, top_logprobs, usage_in_stream
from lightvl.server.run import Run, content_logprobs
from lightvl.server.schema import (
    LEAST_LOGPROB,
    UNSERVED_COMPLETION,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from lightvl.server.service import Context, PromptBuilder, check_model
from lightvl.server.structured import with_grammar

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

_encode = msgspec.json.Encoder().encode


async def completions(context: Context, request: web.Request) -> web.StreamResponse:
    wire = await read_body(request, CompletionRequest)
    started = time.monotonic()
    params = _check(context, wire)
    service = context.service
    params = await with_grammar(params, wire, service.prompts)
    prompt = await _build(service.prompts, wire)
    params = fit(params, len(prompt), service.info.context_len, "prompt")
    with Run(context, "cmpl-" + uuid.uuid4().hex, prompt, params, started=started) as run:
        reply = _Reply(run)
        if wire.stream:
            with_usage = usage_in_stream(wire.stream, wire.stream_options)
            return await sse.stream(request, _events(run, reply, with_usage))
        answers = await run.whole()
        choices = [
            reply.choice(choice, text, logprobs, run.finishes[choice])
            for choice, (text, logprobs) in enumerate(answers)
        ]
        return json_reply(reply.of(choices, run.usage()))


def _check(context: Context, wire: CompletionRequest) -> SamplingParams:
    info = context.service.info
    check_model(info, wire.model)
    refuse_unserved(wire, UNSERVED_COMPLETION)
    usage_in_stream(wire.stream, wire.stream_options)
    max_tokens = positive(wire.max_tokens, "max_tokens") or DEFAULT_MAX_TOKENS
    return sampling_params(
        wire,
        max_tokens=max_tokens,
        min_tokens=at_most(max_tokens, wire.min_tokens, "min_tokens"),
        top_logprobs=top_logprobs(wire.logprobs is not None, wire.logprobs, "logprobs", "logprobs"),
        defaults=info.sampling_defaults,
        prompts=context.service.prompts,
        seeds=context.seeds,
    )


async def _build(prompts: PromptBuilder, wire: CompletionRequest) -> Prompt:
    given: str | Sequence[str | int | list[int]] = wire.prompt
    if not isinstance(given, str) and len(given) == 1 and not isinstance(given[0], int):
        given = given[0]  # a batch of one
    if isinstance(given, str):
        return await prompts.build_text(given, param="prompt")
    if not given:
        raise BadRequest("'prompt' must be a text or a list of token ids, at least one.", param="prompt")
    token_ids = [item for item in given if isinstance(item, int)]
    if len(token_ids) < len(given):
        raise batch_refused("prompt")
    return await prompts.build_ids(token_ids, param="prompt")


async def _events(run: Run, reply: _Reply, with_usage: bool) -> AsyncGenerator[bytes, None]:
    no_usage = None if with_usage else msgspec.UNSET
    async for delta in run.generation:
        run.note(delta)
        logprobs = content_logprobs(delta)
        if delta.text or logprobs or delta.finish is not None:
            choice = reply.choice(delta.choice, delta.text, logprobs, delta.finish)
            yield sse.frame(_encode(reply.of([choice], no_usage)))
    if with_usage:
        yield sse.frame(_encode(reply.of([], run.usage())))


class _Reply:
    """What the parts of one reply have in common."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._created = int(time.time())
        self._text_lens = [0] * run.params.n  # so far, told by the tokens that have logprobs

    def of(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        model = self._run.context.service.info.served_name
        return Completion(id=self._run.request_id, created=self._created, model=model, choices=choices, usage=usage)

    def choice(self, idx: int, text: str, logprobs: list[TokenLogprob], finish: Finish | None) -> CompletionChoice:
        return CompletionChoice(
            index=idx,
            text=text,
            logprobs=self._logprobs(idx, logprobs) if self._run.params.top_logprobs is not None else None,
            finish_reason=None if finish is None else finish.reason,
            matched_stop=None if finish is None else finish.matched_stop,
        )

    def _logprobs(self, idx: int, entries: list[TokenLogprob]) -> CompletionLogprobs:
        told = CompletionLogprobs([], [], [], [])
        token_text = self._run.context.service.prompts.token_text
        for entry in entries:
            token, logprob = token_text(entry.token_id), max(entry.logprob, LEAST_LOGPROB)
            top = {token_text(token_id): max(other, LEAST_LOGPROB) for token_id, other in entry.top}
            told.tokens.append(token)
            told.token_logprobs.append(logprob)
            told.top_logprobs.append({**top, token: logprob})
            told.text_offset.append(self._text_lens[idx])
            self._text_lens[idx] += len(token)
        return told
