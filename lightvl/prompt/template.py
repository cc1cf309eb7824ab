"""What a chat template makes of messages: the segments that tokenizer.py encodes. Knows no token ids and no images: an
image is a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lightvl.core import ImagePart, Message


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


def has_images(message: Message) -> bool:
    return any(isinstance(part, ImagePart) for part in message.parts)
