"""A Jinja chat template (the model's own, or the operator's) rendered so that client text never becomes control.

Used through template.py. The template is trusted as far as a sandbox goes; the client is not. A template writes one
string, in which its own control tokens and the client's text can no longer be told apart. So where client text could
spell a control token, even after the template has cut pieces out of it or joined them, the first characters of such
tokens are swapped for private-use ones before rendering and swapped back in what becomes plain text. A template that
writes client text between the brackets of a control token, as in `<|{{ text }}|>`, is its author's own doing."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from lightvl.core import ImagePart, Message, TextPart
from lightvl.errors import BadRequest, ConfigError
from lightvl.prompt.template import ClientText, Control, ImageSlot, Segment, has_images

if TYPE_CHECKING:
    from lightvl.prompt.tokenizer import Tokenizer

_PROBE = "Probe4217"
_NAMES_TOOL = re.compile(r"""['"]tool['"]""")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class JinjaTemplate:
    """See `template.Template`. Raises ConfigError for a template that does not compile or shows no user text."""

    def __init__(self, source: str, *, name: str, tokenizer: Tokenizer) -> None:
        self.name = name
        self.stop: tuple[str, ...] = ()  # the model's EOS ids are all that its own template needs
        self.starts_with_bos = False  # such a template writes it, where the tokenizer does not
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"chat template {name}: {error}") from None
        roles = ("system", "user", "assistant", "tool")
        self._takes_strings = {role: self._shows_text(role, as_parts=False) for role in roles}
        # Many templates write any role as it comes; a model knows the tool role where its template names it.
        self._knows_tools = _NAMES_TOOL.search(source) is not None
        if not self._takes_strings["user"] and not self._shows_text("user", as_parts=True):
            raise ConfigError(f"chat template {name}: it does not show the text of a user message")
        self.renders_images = self._shows_image()

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> list[Segment]:
        """See `Template.render`."""
        if not self._knows_tools and any(message.role == "tool" for message in messages):
            raise BadRequest(f"the chat template {self.name} has no place for the tool role", param="messages")
        texts = "".join(part.text for message in messages for part in message.parts if isinstance(part, TextPart))
        unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in texts)
        swaps = {char: next(unused) for char in sorted(self._risky_characters(texts))}
        chat = [self._as_dict(message, str.maketrans(swaps)) for message in messages]
        if continue_final_message:
            end_mark = next(unused)
            _append_mark(messages, chat, end_mark)
            # White space before the mark is no longer at the end of the text, so a trimming template keeps it.
            rendered, found, _ = self._render(chat, add_generation_prompt=False).rpartition(end_mark)
            if not found:
                raise BadRequest("the chat template drops the message to continue", param="continue_final_message")
        else:
            rendered = self._render(chat, add_generation_prompt=add_generation_prompt)
        segments = self._split(rendered, str.maketrans({private: char for char, private in swaps.items()}))
        self._check_slots(segments, messages)
        return segments

    def _risky_characters(self, texts: str) -> set[str]:
        """First characters of the control tokens that the texts, taken together, could be cut down to."""
        return {token[0] for token in self._tokenizer.control_tokens if _is_subsequence(token, texts)}

    def _as_dict(self, message: Message, swap: dict[int, str]) -> dict[str, Any]:
        if self._takes_strings[message.role] and not has_images(message):
            text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
            return {"role": message.role, "content": text.translate(swap) if swap else text}
        parts = [
            {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text.translate(swap)}
            for part in message.parts
        ]
        return {"role": message.role, "content": parts}

    def _render(self, chat: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=chat,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", param="messages") from None
        except Exception:  # templates are programs: anything may go wrong inside
            raise BadRequest("the chat template cannot show these messages", param="messages") from None

    def _split(self, rendered: str, restore: dict[int, str]) -> list[Segment]:
        segments: list[Segment] = []
        end = 0
        for match in self._tokenizer.control_pattern.finditer(rendered):
            if match.start() > end:
                segments.append(ClientText(rendered[end : match.start()].translate(restore)))
            is_image = match[0] == self._tokenizer.image_token
            segments.append(ImageSlot() if is_image else Control(match[0]))
            end = match.end()
        if end < len(rendered):
            segments.append(ClientText(rendered[end:].translate(restore)))
        return segments

    def _check_slots(self, segments: Iterable[Segment], messages: Sequence[Message]) -> None:
        images = [part for message in messages for part in message.parts if isinstance(part, ImagePart)]
        num_slots = sum(isinstance(segment, ImageSlot) for segment in segments)
        if num_slots != len(images):
            param = images[0].param if images else "messages"
            raise BadRequest(
                f"{param}: the chat template shows {num_slots} of the {len(images)} images here", param=param
            )

    def _shows_text(self, role: str, *, as_parts: bool) -> bool:
        content: Any = [{"type": "text", "text": _PROBE}] if as_parts else _PROBE
        user = {"role": "user", "content": [{"type": "text", "text": "A"}] if as_parts else "A"}
        message = {"role": role, "content": content}
        chat = [message] if role == "user" else [message, user] if role == "system" else [user, message]
        try:
            rendered = self._render(chat, add_generation_prompt=False)
        except BadRequest:
            return False
        return _PROBE in rendered and f"'{_PROBE}'" not in rendered  # quoted: the list was written as Python does

    def _shows_image(self) -> bool:
        image_token = self._tokenizer.image_token
        content = [{"type": "image"}, {"type": "text", "text": _PROBE}]
        if image_token is None:
            return False
        try:
            rendered = self._render([{"role": "user", "content": content}], add_generation_prompt=True)
        except BadRequest:
            return False
        return rendered.count(image_token) == 1 and _PROBE in rendered and f"'{_PROBE}'" not in rendered


def _append_mark(messages: Sequence[Message], chat: list[dict[str, Any]], mark: str) -> None:
    if not messages or messages[-1].role != "assistant":
        raise BadRequest(
            "continue_final_message needs a last message from the assistant", param="continue_final_message"
        )
    content = chat[-1]["content"]
    if isinstance(content, str):
        chat[-1]["content"] = content + mark
    elif content and content[-1]["type"] == "text":
        content[-1]["text"] += mark
    else:
        content.append({"type": "text", "text": mark})


def _is_subsequence(token: str, text: str) -> bool:
    at = 0
    for char in token:
        at = text.find(char, at) + 1
        if at == 0:
            return False
    return True


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it is shown as if it were not marked."""

    tags = {"generation"}  # noqa: RUF012  (declared as an instance variable by jinja2)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """As transformers sets it up for chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
