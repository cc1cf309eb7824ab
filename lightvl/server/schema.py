"""The wire: what clients may send and what they get, as msgspec structs. One place names every field that is known.

Fields typed `Any` are known but not served: `UNSERVED_*` holds the values with which they change nothing; any other
value is refused by name (body.refuse_unserved). Ranges are checked in params.py."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

# --- requests ---------------------------------------------------------------------------------------------------------


class SamplingFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """What chat and generate requests share, under the same names."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    # known, not served
    no_stop_trim: Any = None


UNSERVED_SAMPLING: dict[str, tuple[Any, ...]] = {"no_stop_trim": (False,)}


class TextFormat(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    """Any text."""


class JSONObjectFormat(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """Any JSON object."""


class JSONSchema(Struct, kw_only=True, forbid_unknown_fields=True):
    schema: dict[str, Any] | None = None  # None: any JSON object
    # accepted: they only label it, and the schema is followed strictly in any case
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class JSONSchemaFormat(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: JSONSchema


ResponseFormat = TextFormat | JSONObjectFormat | JSONSchemaFormat


class ImageURL(Struct, forbid_unknown_fields=True):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextContent(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str


class ImageContent(Struct, tag_field="type", tag="image_url", forbid_unknown_fields=True):
    image_url: ImageURL
    modalities: Literal["image", "multi-images"] | None = None  # SGLang's; both mean what we do


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    role: str
    content: str | list[TextContent | ImageContent] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    # known, not served
    tool_calls: Any = None
    function_call: Any = None
    refusal: Any = None
    audio: Any = None
    annotations: Any = None


UNSERVED_MESSAGE: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
}


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[ChatMessage]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    continue_final_message: bool | None = None
    response_format: ResponseFormat | None = None
    # accepted: they only label the request
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # known, not served
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    store: Any = None
    service_tier: Any = None
    chat_template_kwargs: Any = None
    lora_path: Any = None


class CompletionRequest(SamplingFields, kw_only=True):
    """OpenAI's older endpoint, one prompt per request: a text or token ids, or a list of one of these."""

    prompt: str | list[str | int | list[int]]
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None  # accepted: it only labels the request
    # known, not served
    suffix: Any = None
    echo: Any = None
    best_of: Any = None
    lora_path: Any = None


class TokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None


UNSERVED_CHAT: dict[str, tuple[Any, ...]] = {
    **UNSERVED_SAMPLING,
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools both choose none
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "chat_template_kwargs": ({},),
    "lora_path": (),
}


UNSERVED_COMPLETION: dict[str, tuple[Any, ...]] = {
    **UNSERVED_SAMPLING,
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "lora_path": (),
}


class GenerateSampling(SamplingFields, kw_only=True):
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    json_schema: str | None = None
    # known, not served
    structural_tag: Any = None
    spaces_between_special_tokens: Any = None
    custom_params: Any = None


UNSERVED_GENERATE_SAMPLING: dict[str, tuple[Any, ...]] = {
    **UNSERVED_SAMPLING,
    "structural_tag": (),
    "spaces_between_special_tokens": (True,),
    "custom_params": ({},),
}


class GenerateRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """SGLang's `/generate`, one prompt per request."""

    text: str | list[Any] | None = None
    input_ids: list[Any] | None = None
    image_data: str | list[str] | None = None
    sampling_params: GenerateSampling | None = None
    return_logprob: bool | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | None = None
    log_metrics: bool | None = None  # accepted: metrics are always on
    # known, not served
    logprob_start_len: Any = None
    token_ids_logprob: Any = None
    input_embeds: Any = None
    video_data: Any = None
    audio_data: Any = None
    modalities: Any = None
    lora_path: Any = None
    session_params: Any = None
    return_hidden_states: Any = None
    custom_logit_processor: Any = None


UNSERVED_GENERATE: dict[str, tuple[Any, ...]] = {
    "logprob_start_len": (-1,),
    "token_ids_logprob": ([],),
    "input_embeds": (),
    "video_data": ([],),
    "audio_data": ([],),
    "modalities": (["image"], ["multi-images"]),
    "lora_path": (),
    "session_params": (),
    "return_hidden_states": (False,),
    "custom_logit_processor": (),
}

# --- replies ----------------------------------------------------------------------------------------------------------


LEAST_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON has no word for."""


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobEntry(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(Struct):
    content: list[TokenLogprobEntry]
    refusal: None = None


class ReplyMessage(Struct, kw_only=True):
    role: str = "assistant"
    content: str
    refusal: None = None
    tool_calls: None = None


class ChatChoice(Struct):
    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: str
    matched_stop: int | str | None


class PromptTokensDetails(Struct):
    cached_tokens: int
    image_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(Struct):
    """One item for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]  # the token that was drawn among them
    text_offset: list[int]  # where the token begins in the choice's text, in characters


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    matched_stop: int | str | None


class Completion(Struct, kw_only=True):
    """A whole reply, or one event of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class GenerateReply(Struct):
    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]
    index: int | UnsetType = UNSET  # the choice; only in streams
