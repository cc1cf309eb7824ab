"""What a chat template makes of messages, and which template a server uses.

Owns the segments that tokenizer.py encodes, and the choice between built-in, given and the model's own templates.
Knows no token ids and no images: an image is a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightvl.core import ImagePart, Message
from lightvl.errors import ConfigError

if TYPE_CHECKING:
    from lightvl.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Control:
    """Written by the template (or by a client of /generate): its special tokens become control tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class ClientText:
    """Never becomes a control token, whatever it spells."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of the next image: one image token."""


Segment = Control | ClientText | ImageSlot


class Template(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end the assistant's turn."""
        ...

    @property
    def starts_with_bos(self) -> bool:
        """The prompt starts with BOS even if the tokenizer would add none. The rendered segments may hold it too: the
        tokenizer sees to it that there is one."""
        ...

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> list[Segment]:
        """One slot per ImagePart, in order. `continue_final_message` leaves the last assistant message open and wins
        over `add_generation_prompt`. Raises BadRequest for messages that the template cannot show."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """For the start-up report."""

    name: str
    reason: str


def has_images(message: Message) -> bool:
    return any(isinstance(part, ImagePart) for part in message.parts)


def choose_template(
    explicit: str | None, tokenizer: Tokenizer, *, family_template: str | None, takes_images: bool
) -> tuple[Template | None, TemplateChoice]:
    """`explicit` is the value of --chat-template: a built-in template's name, a Jinja file or Jinja source.
    `family_template` names the built-in one that fits the model's family. None comes back for a model without any
    template, which can only complete plain text. Raises ConfigError."""
    from lightvl.prompt.builtin_templates import BUILTIN_TEMPLATES
    from lightvl.prompt.jinja_template import JinjaTemplate

    if explicit is not None:
        if explicit in BUILTIN_TEMPLATES:
            return BUILTIN_TEMPLATES[explicit], TemplateChoice(explicit, "chosen with --chat-template")
        source, name = _read_explicit(explicit, tuple(BUILTIN_TEMPLATES))
        given = JinjaTemplate(source, name=name, tokenizer=tokenizer)
        refused = takes_images and not given.renders_images
        warning = "; it has no place for images, so requests with images are refused" if refused else ""
        return given, TemplateChoice(name, f"given with --chat-template{warning}")

    why_not = "the model has no chat template of its own"
    if tokenizer.own_chat_template is not None:
        try:
            own = JinjaTemplate(tokenizer.own_chat_template, name="the model's own", tokenizer=tokenizer)
        except ConfigError as error:
            why_not = f"the model's own chat template does not work ({error})"
        else:
            if not takes_images or own.renders_images:
                return own, TemplateChoice(own.name, "it is the model's own and fits")
            why_not = "the model's own chat template has no place for images"
    if family_template is not None:
        return BUILTIN_TEMPLATES[family_template], TemplateChoice(family_template, f"built-in of the family; {why_not}")
    return None, TemplateChoice("none", f"{why_not}, so chat is not served: give one with --chat-template")


def _read_explicit(explicit: str, names: tuple[str, ...]) -> tuple[str, str]:
    if "{{" in explicit or "{%" in explicit:
        return explicit, "inline Jinja"
    path = Path(explicit)
    if not path.is_file():
        raise ConfigError(
            f"--chat-template {explicit}: not a built-in template ({', '.join(names)}), a file or Jinja source"
        )
    try:
        return path.read_text(encoding="utf-8"), path.name
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {explicit}: cannot be read: {error}") from None
