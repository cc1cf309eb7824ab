"""Wire fields to SamplingParams: every range is checked here, and the model's defaults and stops are merged in.

`sampling_params` needs no prompt, so that a bad number is told before any image is fetched; `fit` adds the length."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightvl.core import SamplingParams
from lightvl.errors import BadRequest, ContextLengthExceeded
from lightvl.server.schema import SamplingFields, StreamOptions
from lightvl.server.service import PromptBuilder

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_TOP_LOGPROBS = 20
MAX_BIASES = 1024
TO_CONTEXT_END = 1 << 62
"""`max_tokens` before `fit`, when the request sets none."""


def sampling_params(
    fields: SamplingFields,
    *,
    max_tokens: int | None,
    min_tokens: int,
    top_logprobs: int | None,
    defaults: Mapping[str, float | int],
    prompts: PromptBuilder,
    seeds: random.Random,
    prefix: str = "",
) -> SamplingParams:
    """`prefix` stands before field names in errors. `max_tokens`, `min_tokens` and `top_logprobs` are checked by
    the caller, which knows the names that they have on its wire. Raises BadRequest."""

    def number(name: str, fallback: float) -> float:
        value = getattr(fields, name)
        return float(defaults.get(name, fallback) if value is None else value)

    def check(name: str, ok: bool, expected: str) -> None:
        if not ok:
            given = getattr(fields, name)
            message = f"Invalid value for '{prefix}{name}': {expected}"
            raise BadRequest(
                f"{message}, got {given}." if isinstance(given, int | float) else f"{message}.",
                param=prefix + name,
                code="invalid_value",
            )

    temperature, top_p, min_p = number("temperature", 1.0), number("top_p", 1.0), number("min_p", 0.0)
    repetition, top_k = number("repetition_penalty", 1.0), int(number("top_k", 0))
    frequency, presence = number("frequency_penalty", 0.0), number("presence_penalty", 0.0)
    biases = fields.logit_bias or {}
    n = 1 if fields.n is None else fields.n
    # Written so that infinities and NaN fail too.
    check("temperature", 0 <= temperature <= 2, "expected a number from 0 to 2")
    check("top_p", 0 < top_p <= 1, "expected a number above 0 and at most 1")
    check("top_k", top_k >= -1, "expected -1 or 0 (off) or a positive integer")
    check("min_p", 0 <= min_p <= 1, "expected a number from 0 to 1")
    check("repetition_penalty", 0 < repetition <= 2, "expected a number above 0 and at most 2")
    check("frequency_penalty", -2 <= frequency <= 2, "expected a number from -2 to 2")
    check("presence_penalty", -2 <= presence <= 2, "expected a number from -2 to 2")
    check("logit_bias", len(biases) <= MAX_BIASES, f"at most {MAX_BIASES} tokens are taken")
    num_ids = prompts.vocab_size
    check("logit_bias", all(0 <= token_id < num_ids for token_id in biases), f"expected ids from 0 to {num_ids - 1}")
    check("logit_bias", all(-100 <= bias <= 100 for bias in biases.values()), "expected numbers from -100 to 100")
    check("n", 1 <= n <= MAX_CHOICES, f"expected an integer from 1 to {MAX_CHOICES}")
    seed = seeds.getrandbits(63) if fields.seed is None else fields.seed
    check("seed", -(1 << 63) <= seed < 1 << 63, "expected a 64-bit integer")
    stop = _unique([fields.stop] if isinstance(fields.stop, str) else fields.stop or ())
    check("stop", len(stop) <= MAX_STOPS, f"at most {MAX_STOPS} stop sequences are taken")
    check("stop", all(0 < len(text) <= MAX_STOP_CHARS for text in stop), f"expected 1 to {MAX_STOP_CHARS} characters")
    stop_ids = frozenset(fields.stop_token_ids or ())
    check("stop_token_ids", len(stop_ids) <= MAX_STOP_TOKEN_IDS, f"at most {MAX_STOP_TOKEN_IDS} ids are taken")
    check("stop_token_ids", all(0 <= token_id < 1 << 31 for token_id in stop_ids), "expected token ids")
    if not fields.ignore_eos:
        stop = _unique((*stop, *prompts.stop_strings))
        stop_ids |= prompts.stop_token_ids
    return SamplingParams(
        max_tokens=TO_CONTEXT_END if max_tokens is None else max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        logit_bias=tuple(biases.items()),
        seed=seed & (1 << 64) - 1,
        stop=stop,
        stop_token_ids=stop_ids,
        n=n,
        top_logprobs=top_logprobs,
        keep_special_tokens=fields.skip_special_tokens is False,
    )


def positive(value: int | None, name: str) -> int | None:
    if value is not None and value < 1:
        raise BadRequest(
            f"Invalid value for '{name}': expected a positive integer, got {value}.", param=name, code="invalid_value"
        )
    return value


def at_most(max_tokens: int | None, value: int | None, name: str) -> int:
    """The `SamplingParams.min_tokens` of a field, in a request for `max_tokens`."""
    if value is not None and (value < 0 or (max_tokens is not None and value > max_tokens)):
        expected = "0 or more" if max_tokens is None else f"from 0 to the largest number of tokens, {max_tokens}"
        raise BadRequest(
            f"Invalid value for '{name}': expected {expected}, got {value}.", param=name, code="invalid_value"
        )
    return value or 0


def usage_in_stream(stream: bool | None, options: StreamOptions | None) -> bool:
    """Whether the last event of a stream is to tell the usage. Raises BadRequest for options without a stream."""
    if options is not None and not stream:
        raise BadRequest("'stream_options' is only allowed when 'stream' is true.", param="stream_options")
    return options is not None and bool(options.include_usage)


def batch_refused(name: str) -> BadRequest:
    return BadRequest(
        f"'{name}' holds a batch, which is not supported; send one request per prompt: "
        "simultaneous requests are batched by the server.",
        param=name,
        code="unsupported_parameter",
    )


def top_logprobs(wanted: bool | None, num: int | None, wanted_name: str, num_name: str) -> int | None:
    """The `SamplingParams.top_logprobs` of a yes-or-no field and a number field."""
    if num is not None and not 0 <= num <= MAX_TOP_LOGPROBS:
        raise BadRequest(
            f"Invalid value for '{num_name}': expected an integer from 0 to {MAX_TOP_LOGPROBS}, got {num}.",
            param=num_name,
            code="invalid_value",
        )
    if num and not wanted:
        raise BadRequest(f"'{num_name}' is only allowed when '{wanted_name}' is true.", param=num_name)
    return (num or 0) if wanted else None


def fit(params: SamplingParams, prompt_len: int, context_len: int, param: str) -> SamplingParams:
    """Bound `max_tokens` by the room that is left. Raises ContextLengthExceeded, naming `param`, when there is none."""
    room = context_len - prompt_len
    if room < 1:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {context_len} tokens, and at least one is needed for the answer; "
            f"your prompt takes {prompt_len} tokens.",
            param=param,
        )
    return replace(params, max_tokens=min(params.max_tokens, room))


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))
