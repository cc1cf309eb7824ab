"""What an answer must match: `response_format` and its kin on the wire, to `SamplingParams.grammar`."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from lightvl.core import GrammarKind, SamplingParams
from lightvl.errors import BadRequest
from lightvl.server.schema import (
    ChatRequest,
    CompletionRequest,
    GenerateSampling,
    JSONObjectFormat,
    JSONSchema,
    JSONSchemaFormat,
)
from lightvl.server.service import PromptBuilder

ANY_OBJECT = '{"type":"object"}'


async def with_grammar(
    params: SamplingParams,
    fields: ChatRequest | CompletionRequest | GenerateSampling,
    prompts: PromptBuilder,
    prefix: str = "",
) -> SamplingParams:
    """`params` with the grammar that the request asks for, if any. `prefix` stands before field names in errors. Raises
    BadRequest for one that does not compile, for two at once, and for what cannot be kept together with one."""
    wanted = _sources(fields)
    if not wanted:
        return params
    first, *others = wanted
    if others:
        raise BadRequest(
            f"'{prefix}{first}' and '{prefix}{others[0]}' are set; an answer can follow one of them only.",
            param=prefix + others[0],
        )
    if fields.ignore_eos or params.min_tokens:
        least = "min_new_tokens" if isinstance(fields, GenerateSampling) else "min_tokens"
        name = "ignore_eos" if fields.ignore_eos else least
        raise BadRequest(
            f"'{prefix}{name}' is not possible with '{prefix}{first}', which says where the answer ends.",
            param=prefix + name,
        )
    kind, source = wanted[first]
    where = f"{prefix}{first}.json_schema.schema" if first == "response_format" else prefix + first
    return replace(params, grammar=await prompts.grammar(kind, source, param=where))


def _sources(fields: ChatRequest | CompletionRequest | GenerateSampling) -> dict[str, tuple[GrammarKind, str]]:
    """Of the grammars that are asked for, by the fields' names."""
    sources: dict[str, tuple[GrammarKind, str]] = {}
    if fields.regex is not None:
        sources["regex"] = ("regex", fields.regex)
    if fields.ebnf is not None:
        sources["ebnf"] = ("ebnf", fields.ebnf)
    if isinstance(fields, GenerateSampling):
        if fields.json_schema is not None:
            sources["json_schema"] = ("json_schema", fields.json_schema)
        return sources
    match fields.response_format:
        case JSONObjectFormat() | JSONSchemaFormat(JSONSchema(schema=None)):
            sources["response_format"] = ("json_schema", ANY_OBJECT)
        case JSONSchemaFormat(JSONSchema(schema=schema)):
            sources["response_format"] = ("json_schema", msgspec.json.encode(schema).decode())
    return sources
