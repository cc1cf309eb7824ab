"""Values that pass between the parts: messages, prompts, sampling params, generated deltas. Frozen where they cross a
part's border; no torch, no I/O. Numbers are in tokens unless a name says otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

Role = Literal["system", "user", "assistant", "tool"]

OPEN_END = 1 << 62
"""`PromptImage.end_row` of a cross-attention image that every later row sees, generated ones included."""


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """`url`: an http(s) URL, a data URL or raw base64. `param` is the request field that it came from, for errors."""

    url: str
    param: str = "messages"
    max_side: int | None = None  # pixels; what is larger is shrunk before the model's own rules see it


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """One image of a prompt, as the scheduler sees it.

    Rows `first_row <= row < end_row` of the sequence need it: the rows that its features replace, or, for
    cross-attention, the rows that attend to it (`OPEN_END`: until the sequence ends).
    """

    key: int  # 128 bits over decoded content, processor settings and view mode
    first_row: int
    end_row: int
    size: int  # feature rows to hold (num_tokens), or cross pages (tiles) for a cross-attention family
    media: Any  # prompt.build.Media: what the runner needs to make pixels; opaque to scheduling


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a sequence starts from. The model reads `token_ids`; only the radix cache reads `cache_key`."""

    token_ids: np.ndarray[Any, np.dtype[np.int64]]  # (len,); image rows hold the family's image token id
    cache_key: list[int]  # (len,); token ids, and at image rows `(1 << 128) | image.key`
    images: tuple[PromptImage, ...] = ()
    positions: np.ndarray[Any, np.dtype[np.int64]] | None = None  # (3, len) M-RoPE t,h,w; None: 0, 1, 2...
    rope_delta: int = 0  # position of a generated row = its index + rope_delta
    num_image_tokens: int = 0

    def __len__(self) -> int:
        return len(self.cache_key)


class Matcher(Protocol):
    """Where one sequence stands in its grammar. Whoever asks or tells it does so alone: a step asks, and only after the
    token that it chose has been told is the next step planned."""

    def allow(self, mask: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Into (ceil(vocab_size / 32),), 32 token ids each from the lowest bit on: 1 where the token may come next, a
        stop token where the text is whole."""
        ...

    def push(self, token_id: int) -> bool:
        """The token that was chosen, stop tokens too. False: the grammar went beyond its limits, and the text is not
        what was asked for."""
        ...


GrammarKind = Literal["json_schema", "regex", "ebnf"]


class Grammar(Protocol):
    """What a whole answer must match; compiled, and shared between sequences."""

    def start(self) -> Matcher: ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, complete: model defaults, EOS and the template's stops are merged in by the server."""

    max_tokens: int
    min_tokens: int = 0  # of `stop_token_ids` none is chosen before so many tokens; stop strings end an answer any time
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, what is added to its logit), each id once
    grammar: Grammar | None = None
    seed: int = 0  # 0 <= seed < 2**64
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    n: int = 1
    top_logprobs: int | None = None  # None: no logprobs; 0 to 20 alternatives beside the chosen token
    keep_special_tokens: bool = False  # SGLang's skip_special_tokens=false
    # What follows from the others, told once: each step asks it of each row.
    needs_history: bool = field(init=False, repr=False, compare=False)  # choosing a token takes all ids before it
    needs_commits: bool = field(init=False, repr=False, compare=False)  # and waits until the host knows the last one
    changes_logits: bool = field(init=False, repr=False, compare=False)
    needs_best_only: bool = field(init=False, repr=False, compare=False)  # the model's greatest logit is all it takes

    def __post_init__(self) -> None:
        has_penalties = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        needs_commits = has_penalties or self.grammar is not None
        changes_logits = needs_commits or bool(self.logit_bias) or self.min_tokens > 0
        needs_best_only = self.temperature == 0 and not changes_logits and self.top_logprobs is None
        object.__setattr__(self, "needs_history", has_penalties)
        object.__setattr__(self, "needs_commits", needs_commits)
        object.__setattr__(self, "changes_logits", changes_logits)
        object.__setattr__(self, "needs_best_only", needs_best_only)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-softmax of the model's raw logits (before temperature, penalties and bias)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True, slots=True)
class Finish:
    reason: Literal["stop", "length", "abort"]
    matched_stop: int | str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Delta:
    """What one choice produced since the last look. The last delta of a choice has `finish`."""

    choice: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None


class Generation(Protocol):
    """One admitted request. Iterating yields deltas of all choices until each has finished, or raises a LightVLError.
    Leaving early must be followed by `abort()`, which frees everything at once; after the end it does nothing."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    def abort(self) -> None: ...


class EngineClient(Protocol):
    """All that the server sees of the engine."""

    def submit(self, prompt: Prompt, params: SamplingParams) -> Generation:
        """Queue `params.n` choices. Raises BadRequest when the prompt can never fit, Overloaded when draining."""
        ...
