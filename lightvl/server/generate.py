"""`POST /generate`: SGLang's native endpoint, for one prompt at a time. In a stream every event repeats the whole text
so far, as SGLang's does."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from lightvl.core import Delta, Finish, ImagePart, Prompt, SamplingParams, TokenLogprob
from lightvl.errors import BadRequest
from lightvl.server import sse
from lightvl.server.body import read_body, refuse_unserved
from lightvl.server.middleware import json_reply
from lightvl.server.params import at_most, batch_refused, fit, positive, sampling_params, top_logprobs
from lightvl.server.run import Run
from lightvl.server.schema import (
    UNSERVED_GENERATE,
    UNSERVED_GENERATE_SAMPLING,
    GenerateReply,
    GenerateRequest,
    GenerateSampling,
)
from lightvl.server.service import Context, PromptBuilder
from lightvl.server.structured import with_grammar

DEFAULT_MAX_NEW_TOKENS = 128

_encode = msgspec.json.Encoder().encode


async def generate(context: Context, request: web.Request) -> web.StreamResponse:
    wire = await read_body(request, GenerateRequest)
    started = time.monotonic()
    params = _check(context, wire)
    if wire.sampling_params is not None:
        params = await with_grammar(params, wire.sampling_params, context.service.prompts, "sampling_params.")
    prompt = await _build(context.service.prompts, wire)
    field_name = "text" if wire.text is not None else "input_ids"
    params = fit(params, len(prompt), context.service.info.context_len, field_name)
    with_text = bool(wire.return_text_in_logprobs)
    with Run(context, wire.rid or uuid.uuid4().hex, prompt, params, started=started) as run:
        answers = [_Answer(run, choice, with_text) for choice in range(params.n)]
        if wire.stream:
            return await sse.stream(request, _events(run, answers))
        async for delta in run.generation:
            run.note(delta)
            answers[delta.choice].add(delta)
        replies = [answer.reply() for answer in answers]
        return json_reply(replies if params.n > 1 else replies[0])


def _check(context: Context, wire: GenerateRequest) -> SamplingParams:
    refuse_unserved(wire, UNSERVED_GENERATE)
    if (wire.text is None) == (wire.input_ids is None):
        raise BadRequest("Exactly one of 'text' and 'input_ids' is needed.", param="text")
    if isinstance(wire.text, list):
        raise batch_refused("text")
    if wire.input_ids is not None and any(isinstance(item, list) for item in wire.input_ids):
        raise batch_refused("input_ids")
    if wire.input_ids is not None and not (wire.input_ids and all(type(i) is int and i >= 0 for i in wire.input_ids)):
        raise BadRequest("'input_ids' must be a list of token ids, at least one.", param="input_ids")
    fields = wire.sampling_params or GenerateSampling()
    refuse_unserved(fields, UNSERVED_GENERATE_SAMPLING, "sampling_params.")
    max_new_tokens = positive(fields.max_new_tokens, "sampling_params.max_new_tokens") or DEFAULT_MAX_NEW_TOKENS
    return sampling_params(
        fields,
        max_tokens=max_new_tokens,
        min_tokens=at_most(max_new_tokens, fields.min_new_tokens, "sampling_params.min_new_tokens"),
        top_logprobs=top_logprobs(wire.return_logprob, wire.top_logprobs_num, "return_logprob", "top_logprobs_num"),
        defaults=context.service.info.sampling_defaults,
        prompts=context.service.prompts,
        seeds=context.seeds,
        prefix="sampling_params.",
    )


async def _build(prompts: PromptBuilder, wire: GenerateRequest) -> Prompt:
    if isinstance(wire.image_data, str):
        images = [ImagePart(wire.image_data, "image_data")]
    else:
        images = [ImagePart(url, f"image_data[{i}]") for i, url in enumerate(wire.image_data or ())]
    if wire.input_ids is not None:
        return await prompts.build_ids(wire.input_ids, images, param="input_ids")
    assert isinstance(wire.text, str)
    return await prompts.build_text(wire.text, images, param="text")


async def _events(run: Run, answers: list[_Answer]) -> AsyncGenerator[bytes, None]:
    async for delta in run.generation:
        run.note(delta)
        answer = answers[delta.choice]
        answer.add(delta)
        reply = answer.reply()
        if run.params.n > 1:
            reply.index = delta.choice
        yield sse.frame(_encode(reply))


@dataclass(slots=True)
class _Answer:
    """What one choice has produced so far."""

    run: Run
    choice: int
    with_text: bool  # token texts beside the logprobs
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs

    def reply(self) -> GenerateReply:
        return GenerateReply(self.text, self.token_ids, self._meta(self.run.finishes.get(self.choice)))

    def _meta(self, finish: Finish | None) -> dict[str, Any]:
        run = self.run
        meta: dict[str, Any] = {
            "id": run.request_id,
            "finish_reason": None if finish is None else _finish_reason(finish),
            "prompt_tokens": len(run.prompt),
            "completion_tokens": len(self.token_ids) if finish is None else finish.completion_tokens,
        }
        if finish is not None:
            meta |= {"cached_tokens": finish.cached_tokens, "e2e_latency": run.duration_s}
        if run.params.top_logprobs is not None:
            meta["output_token_logprobs"] = [self._triple(it.token_id, it.logprob) for it in self.logprobs]
        if run.params.top_logprobs:
            meta["output_top_logprobs"] = [[self._triple(*pair) for pair in it.top] for it in self.logprobs]
        return meta

    def _triple(self, token_id: int, logprob: float) -> tuple[float, int, str | None]:
        prompts = self.run.context.service.prompts
        return logprob, token_id, prompts.token_text(token_id) if self.with_text else None


def _finish_reason(finish: Finish) -> dict[str, Any]:
    if finish.reason == "length":
        return {"type": "length", "length": finish.completion_tokens}
    if finish.reason == "stop":
        return {"type": "stop", "matched": finish.matched_stop}
    return {"type": finish.reason}
