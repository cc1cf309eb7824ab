"""What a prompt is made of, without generating: `POST /v1/chat/completions/render`, `/v1/tokenize`, `/v1/detokenize`
(the last two as SGLang has them)."""

from __future__ import annotations

from aiohttp import web

from lightvl.errors import BadRequest
from lightvl.server.body import read_body
from lightvl.server.chat import build_prompt, check
from lightvl.server.middleware import json_reply
from lightvl.server.schema import ChatRequest, DetokenizeRequest, TokenizeRequest
from lightvl.server.service import Context, check_model


async def render(context: Context, request: web.Request) -> web.Response:
    """A chat request's prompt as the model would read it. Images are fetched and measured, nothing is computed."""
    wire = await read_body(request, ChatRequest)
    check(context, wire)
    prompts = context.service.prompts
    prompt = await build_prompt(prompts, wire)
    return json_reply(
        {
            "prompt": prompts.text_of(prompt),
            "prompt_tokens": len(prompt),
            "num_images": len(prompt.images),
            "image_tokens": prompt.num_image_tokens,
            "max_model_len": context.service.info.context_len,
        }
    )


async def tokenize(context: Context, request: web.Request) -> web.Response:
    wire = await read_body(request, TokenizeRequest)
    info = context.service.info
    check_model(info, wire.model)
    add_special_tokens = wire.add_special_tokens is not False
    tokens = await context.service.prompts.tokenize(wire.prompt, add_special_tokens=add_special_tokens)
    return json_reply({"tokens": tokens, "count": len(tokens), "max_model_len": info.context_len})


async def detokenize(context: Context, request: web.Request) -> web.Response:
    wire = await read_body(request, DetokenizeRequest)
    check_model(context.service.info, wire.model)
    if any(not 0 <= token < 1 << 31 for token in wire.tokens):
        raise BadRequest("'tokens' must be token ids.", param="tokens", code="invalid_value")
    skip = wire.skip_special_tokens is not False
    return json_reply({"text": context.service.prompts.detokenize(wire.tokens, skip_special_tokens=skip)})
