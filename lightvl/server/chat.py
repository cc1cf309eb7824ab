"""`POST /v1/chat/completions`: wire messages to a Prompt, deltas to OpenAI's reply or its stream of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator

import msgspec
from aiohttp import web

from lightvl.core import Delta, Finish, ImagePart, Message, Prompt, Role, SamplingParams, TextPart, TokenLogprob
from lightvl.errors import BadRequest
from lightvl.server import sse
from lightvl.server.body import read_body, refuse_unserved
from lightvl.server.middleware import json_reply
from lightvl.server.params import at_most, fit, positive, sampling_params, top_logprobs, usage_in_stream
from lightvl.server.run import Run, content_logprobs
from lightvl.server.schema import (
    LEAST_LOGPROB,
    UNSERVED_CHAT,
    UNSERVED_MESSAGE,
    ChatChoice,
    ChatCompletion,
    ChatMessage,
    ChatRequest,
    ChoiceLogprobs,
    ImageContent,
    ReplyMessage,
    TextContent,
    TokenLogprobEntry,
    TopLogprob,
    Usage,
)
from lightvl.server.service import Context, PromptBuilder, check_model
from lightvl.server.structured import with_grammar

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_LOW_DETAIL_SIDE = 512
"""In pixels: what OpenAI's `detail: low` makes of a larger image. Any other is seen as large as the model takes it."""

_encode = msgspec.json.Encoder().encode


async def chat_completions(context: Context, request: web.Request) -> web.StreamResponse:
    wire = await read_body(request, ChatRequest)
    started = time.monotonic()
    params = check(context, wire)
    service = context.service
    params = await with_grammar(params, wire, service.prompts)
    prompt = await build_prompt(service.prompts, wire)
    params = fit(params, len(prompt), service.info.context_len, "messages")
    completion_id = "chatcmpl-" + uuid.uuid4().hex
    with Run(context, completion_id, prompt, params, started=started) as run:
        if not wire.stream:
            return await _whole(run, service.info.served_name)
        with_usage = usage_in_stream(wire.stream, wire.stream_options)
        return await sse.stream(request, _chunks(run, service.info.served_name, with_usage))


async def build_prompt(prompts: PromptBuilder, wire: ChatRequest) -> Prompt:
    messages = _messages(wire.messages)
    continues = bool(wire.continue_final_message)
    if continues and messages[-1].role != "assistant":
        raise BadRequest(
            "'continue_final_message' needs a last message of the assistant.", param="continue_final_message"
        )
    return await prompts.build_chat(messages, add_generation_prompt=not continues, continue_final_message=continues)


def check(context: Context, wire: ChatRequest) -> SamplingParams:
    """All that can be wrong with the request but for its messages."""
    info = context.service.info
    check_model(info, wire.model)
    refuse_unserved(wire, UNSERVED_CHAT)
    usage_in_stream(wire.stream, wire.stream_options)
    old, new = positive(wire.max_tokens, "max_tokens"), positive(wire.max_completion_tokens, "max_completion_tokens")
    if old is not None and new is not None and old != new:
        raise BadRequest(
            f"'max_tokens' ({old}) and 'max_completion_tokens' ({new}) differ; set only one of them.",
            param="max_tokens",
        )
    max_tokens = old if new is None else new
    return sampling_params(
        wire,
        max_tokens=max_tokens,
        min_tokens=at_most(max_tokens, wire.min_tokens, "min_tokens"),
        top_logprobs=top_logprobs(wire.logprobs, wire.top_logprobs, "logprobs", "top_logprobs"),
        defaults=info.sampling_defaults,
        prompts=context.service.prompts,
        seeds=context.seeds,
    )


def _messages(wire: list[ChatMessage]) -> list[Message]:
    if not wire:
        raise BadRequest("'messages' must hold at least one message.", param="messages", code="empty_array")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(wire)]


def _message(wire: ChatMessage, path: str) -> Message:
    role = _ROLES.get(wire.role)
    if role is None:
        raise BadRequest(
            f"Invalid value for '{path}.role': '{wire.role}' is not supported; use one of {', '.join(_ROLES)}.",
            param=f"{path}.role",
            code="unsupported_value",
        )
    refuse_unserved(wire, UNSERVED_MESSAGE, f"{path}.")
    if role != "tool":  # there it only labels the answer
        refuse_unserved(wire, {"tool_call_id": ()}, f"{path}.")
    if isinstance(wire.content, str):
        return Message(role, (TextPart(wire.content),))
    if wire.content is None:
        if role != "assistant":
            raise BadRequest(f"'{path}.content' must be a text or a list of parts.", param=f"{path}.content")
        return Message(role, ())
    return Message(role, tuple(_part(part, f"{path}.content[{i}]") for i, part in enumerate(wire.content)))


def _part(wire: TextContent | ImageContent, path: str) -> TextPart | ImagePart:
    if isinstance(wire, TextContent):
        return TextPart(wire.text)
    max_side = _LOW_DETAIL_SIDE if wire.image_url.detail == "low" else None
    return ImagePart(wire.image_url.url, f"{path}.image_url.url", max_side)


async def _whole(run: Run, model: str) -> web.Response:
    prompts = run.context.service.prompts
    choices = [
        ChatChoice(
            index=choice,
            message=ReplyMessage(content=text),
            logprobs=_choice_logprobs(prompts, logprobs) if run.params.top_logprobs is not None else None,
            finish_reason=run.finishes[choice].reason,
            matched_stop=run.finishes[choice].matched_stop,
        )
        for choice, (text, logprobs) in enumerate(await run.whole())
    ]
    reply = ChatCompletion(id=run.request_id, created=int(time.time()), model=model, choices=choices, usage=run.usage())
    return json_reply(reply)


async def _chunks(run: Run, model: str, with_usage: bool) -> AsyncGenerator[bytes, None]:
    template = ChunkTemplate(run.request_id, model, with_usage)
    prompts = run.context.service.prompts
    yield b"".join(template.role(choice) for choice in range(run.params.n))
    async for delta in run.generation:
        run.note(delta)
        if data := _delta_chunks(template, prompts, delta):
            yield data
    if with_usage:
        yield template.usage(run.usage())


def _delta_chunks(template: ChunkTemplate, prompts: PromptBuilder, delta: Delta) -> bytes:
    """One write for all that a delta tells; nothing for tokens whose text is still held back."""
    entries = content_logprobs(delta)
    logprobs = _encode(_choice_logprobs(prompts, entries)) if entries else b"null"
    data = template.text(delta.choice, delta.text, logprobs) if delta.text or entries else b""
    return data if delta.finish is None else data + template.finish(delta.choice, delta.finish)


class ChunkTemplate:
    """The chunks of one stream, put together from bytes: only text, logprobs and the end are encoded each time."""

    def __init__(self, completion_id: str, model: str, with_usage: bool) -> None:
        head = {"id": completion_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._head = _encode(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' if with_usage else b"]}"

    def role(self, choice: int) -> bytes:
        return self._chunk(choice, b'{"role":"assistant","content":""}')

    def text(self, choice: int, text: str, logprobs: bytes = b"null") -> bytes:
        return self._chunk(choice, b'{"content":' + _encode(text) + b"}", logprobs)

    def finish(self, choice: int, finish: Finish) -> bytes:
        return self._chunk(choice, b"{}", reason=_encode(finish.reason), matched_stop=_encode(finish.matched_stop))

    def usage(self, usage: Usage) -> bytes:
        return sse.frame(self._head + b'],"usage":' + _encode(usage) + b"}")

    def _chunk(
        self,
        choice: int,
        delta: bytes,
        logprobs: bytes = b"null",
        reason: bytes = b"null",
        matched_stop: bytes = b"null",
    ) -> bytes:
        return sse.frame(
            b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b,"matched_stop":%b}%b'
            % (self._head, choice, delta, logprobs, reason, matched_stop, self._tail)
        )


def _choice_logprobs(prompts: PromptBuilder, logprobs: list[TokenLogprob]) -> ChoiceLogprobs:
    return ChoiceLogprobs([_logprob_entry(prompts, entry) for entry in logprobs])


def _logprob_entry(prompts: PromptBuilder, entry: TokenLogprob) -> TokenLogprobEntry:
    return TokenLogprobEntry(
        token=prompts.token_text(entry.token_id),
        logprob=max(entry.logprob, LEAST_LOGPROB),
        bytes=list(prompts.token_bytes(entry.token_id)),
        top_logprobs=[
            TopLogprob(prompts.token_text(token_id), max(logprob, LEAST_LOGPROB), list(prompts.token_bytes(token_id)))
            for token_id, logprob in entry.top
        ],
    )
