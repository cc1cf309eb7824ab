"""What an answer must match: `response_format` and its kin on the wire, to `SamplingParams.grammar`."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from lightvl.core import GrammarKind, SamplingParams
from lightvl.errors import BadRequest
from lightvl.server.schema import ChatRequest, CompletionRequest, GenerateSampling, JSONObjectFormat, JSONSchemaFormat
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
    wanted = {name: value for name, value in _sources(fields).items() if value is not None}
    if not wanted:
        return params
    first, *others = wanted
    if others:
        raise BadRequest(
            f"'{prefix}{first}' and '{prefix}{others[0]}' are set; an answer can follow one of them only.",
            param=prefix + others[0],
        )
    if fields.ignore_eos or params.min_tokens:
        name = "ignore_eos" if fields.ignore_eos else "min_new_tokens" if prefix else "min_tokens"
        raise BadRequest(
            f"'{prefix}{name}' is not possible with '{prefix}{first}', which says where the answer ends.",
            param=prefix + name,
        )
    kind, source = wanted[first]
    where = f"{prefix}{first}.json_schema.schema" if first == "response_format" else prefix + first
    return replace(params, grammar=await prompts.grammar(kind, source, param=where))


def _sources(fields: ChatRequest | CompletionRequest | GenerateSampling) -> dict[str, tuple[GrammarKind, str] | None]:
    """By the fields' names."""
    sources: dict[str, tuple[GrammarKind, str] | None] = {
        "regex": None if fields.regex is None else ("regex", fields.regex),
        "ebnf": None if fields.ebnf is None else ("ebnf", fields.ebnf),
    }
    if isinstance(fields, GenerateSampling):
        sources["json_schema"] = None if fields.json_schema is None else ("json_schema", fields.json_schema)
        return sources
    match fields.response_format:
        case JSONObjectFormat():
            sources["response_format"] = ("json_schema", ANY_OBJECT)
        case JSONSchemaFormat(json_schema):
            schema = json_schema.schema
            text = ANY_OBJECT if schema is None else msgspec.json.encode(schema).decode()
            sources["response_format"] = ("json_schema", text)
    return sources
