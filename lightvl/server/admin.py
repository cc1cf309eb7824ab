"""Answers about the server itself; none of them touches the model or waits for anything."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from lightvl.config import ModelInfo
from lightvl.errors import Overloaded
from lightvl.server.middleware import json_reply
from lightvl.server.service import Context, check_model


async def health(context: Context, request: web.Request) -> web.Response:
    if context.lifecycle.draining:
        raise Overloaded("The server is shutting down.", code="shutting_down")
    if not context.service.healthy:
        raise Overloaded("The engine has failed; see the server's log.", code="unhealthy")
    return json_reply({"status": "ok"})


async def models(context: Context, request: web.Request) -> web.Response:
    return json_reply({"object": "list", "data": [_model(context.service.info)]})


async def model(context: Context, request: web.Request) -> web.Response:
    name = request.match_info["model"]
    check_model(context.service.info, name)
    return json_reply(_model(context.service.info))


async def get_model_info(context: Context, request: web.Request) -> web.Response:
    info = context.service.info
    return json_reply(
        {
            "model_path": info.model_path,
            "tokenizer_path": info.tokenizer_path or info.model_path,
            "is_generation": True,
            "served_model_name": info.served_name,
            "family": info.family,
            "context_length": info.context_len,
            "chat_template": info.chat_template,
            "takes_images": info.takes_images,
            "sampling_defaults": dict(info.sampling_defaults),
        }
    )


async def metrics(context: Context, request: web.Request) -> web.Response:
    text = context.metrics.render()
    return web.Response(body=text.encode(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.served_name,
        "object": "model",
        "created": info.created,
        "owned_by": "lightvl",
        "root": info.model_path,
        "max_model_len": info.context_len,
    }
