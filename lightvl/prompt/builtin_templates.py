"""The built-in chat templates, as data, and the one way to render them.

They write what SGLang's templates of the same names write, with one BOS, and without a newline between consecutive
images for llama_3_vision (it would end the first one's span of cross attention)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightvl.core import ImagePart, Message
from lightvl.errors import BadRequest
from lightvl.prompt.template import ClientText, Control, ImageSlot, Segment, has_images

_MANY_IMAGES = 16  # with more than this many in a message, a newline goes before each of its text parts


@dataclass(frozen=True, slots=True)
class BuiltinTemplate:
    """Pairs are what goes before and after."""

    name: str
    default_system: str
    system: tuple[str, str]
    keeps_empty_system: bool  # an empty system message still writes its block
    user: tuple[str, str]
    assistant: tuple[str, str]
    open_assistant: str  # header of an answer to come, and of an empty assistant message
    image: tuple[str, str]
    newline_after_image: Literal["always", "single", "never"]  # single: when it is the only one of its message
    strips: bool  # white space around each message
    stop: tuple[str, ...]
    starts_with_bos: bool
    system_inside_first_user: bool = False

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool
    ) -> list[Segment]:
        """See `Template.render`."""
        if continue_final_message and (not messages or messages[-1].role != "assistant"):
            raise BadRequest(
                "continue_final_message needs a last message from the assistant", param="continue_final_message"
            )
        if any(message.role == "tool" for message in messages):
            raise BadRequest(f"the chat template {self.name} has no place for the tool role", param="messages")
        segments = self._render_system(messages)
        pending_system: list[Segment] = []
        if self.system_inside_first_user:
            segments, pending_system = [], segments
        turns = [message for message in messages if message.role != "system"]
        is_open = False
        for turn_idx, message in enumerate(turns):
            if message.role == "assistant" and _is_empty(message):
                segments.append(Control(self.open_assistant))
                is_open = True
                continue
            is_open = continue_final_message and turn_idx == len(turns) - 1
            before, after = self.user if message.role == "user" else self.assistant
            segments.append(Control(before))
            if message.role == "user":
                segments += pending_system
                pending_system = []
            segments += self._render_parts(message, keep_end=is_open)
            if not is_open:
                segments.append(Control(after))
        if add_generation_prompt and not is_open:
            segments.append(Control(self.open_assistant))
        return segments

    def render_image(self, *, is_only_one: bool) -> list[Segment]:
        """One image with what the template writes around it."""
        newline = self.newline_after_image == "always" or (self.newline_after_image == "single" and is_only_one)
        return [Control(self.image[0]), ImageSlot(), Control(self.image[1] + ("\n" if newline else ""))]

    def _render_system(self, messages: Sequence[Message]) -> list[Segment]:
        system: Control | ClientText = Control(self.default_system)
        for message in messages:
            if message.role == "system":
                image = next((part for part in message.parts if isinstance(part, ImagePart)), None)
                if image is not None:
                    raise BadRequest(f"{image.param}: a system message cannot hold images", param=image.param)
                system = ClientText(_text_of(message))  # the last one wins
        if not system.text and not self.keeps_empty_system:
            return []
        return [Control(self.system[0]), system, Control(self.system[1])]

    def _render_parts(self, message: Message, *, keep_end: bool) -> list[Segment]:
        num_images = sum(isinstance(part, ImagePart) for part in message.parts)
        segments: list[Segment] = []
        for part in message.parts:
            if isinstance(part, ImagePart):
                segments += self.render_image(is_only_one=num_images == 1)
                continue
            if num_images > _MANY_IMAGES:
                segments.append(Control("\n"))
            segments.append(ClientText(part.text))
        if self.strips:
            _strip(segments, at=0)
            if not keep_end:
                _strip(segments, at=-1)
        return segments


def _strip(segments: list[Segment], at: Literal[0, -1]) -> None:
    """Removes white space from one end of a message; an image there stops it."""
    while segments:
        segment = segments[at]
        if isinstance(segment, ImageSlot):
            return
        text = segment.text.lstrip() if at == 0 else segment.text.rstrip()
        if text:
            segments[at] = type(segment)(text)
            return
        del segments[at]


def _text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if not isinstance(part, ImagePart))


def _is_empty(message: Message) -> bool:
    return not has_images(message) and not _text_of(message)


def _llama_3(name: str, newline_after_image: Literal["always", "single"]) -> BuiltinTemplate:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return BuiltinTemplate(
        name=name,
        default_system=(
            "You are a helpful language and vision assistant. You are able to understand the visual content that the "
            "user provides, and assist the user with a variety of tasks using natural language."
        ),
        system=(header("system"), "<|eot_id|>"),
        keeps_empty_system=False,
        user=(header("user"), "<|eot_id|>"),
        assistant=(header("assistant"), "<|eot_id|>"),
        open_assistant=header("assistant"),
        image=("", ""),
        newline_after_image=newline_after_image,
        strips=True,
        stop=("<|end_of_text|>", "<|eot_id|>"),
        starts_with_bos=True,
    )


def _chatml(
    name: str,
    image: tuple[str, str],
    newline_after_image: Literal["always", "never"],
    stop: tuple[str, ...],
    *,
    keeps_empty_system: bool,
) -> BuiltinTemplate:
    return BuiltinTemplate(
        name=name,
        default_system="You are a helpful assistant.",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        keeps_empty_system=keeps_empty_system,
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        open_assistant="<|im_start|>assistant\n",
        image=image,
        newline_after_image=newline_after_image,
        strips=False,
        stop=stop,
        starts_with_bos=False,
    )


_VICUNA = BuiltinTemplate(
    name="vicuna_v1.1",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    ),
    system=("", " "),
    keeps_empty_system=True,
    user=("USER: ", " "),
    assistant=("ASSISTANT: ", "</s>"),
    open_assistant="ASSISTANT:",
    image=("", ""),
    newline_after_image="always",
    strips=False,
    stop=("</s>",),
    starts_with_bos=True,
)

_MISTRAL = BuiltinTemplate(
    name="mistral-llava",
    default_system="",
    system=("", "\n\n"),
    keeps_empty_system=False,
    user=("[INST] ", " [/INST]"),
    assistant=(" ", "</s>"),
    open_assistant="",
    image=("", ""),
    newline_after_image="always",
    strips=False,
    stop=("</s>",),
    starts_with_bos=True,
    system_inside_first_user=True,
)

BUILTIN_TEMPLATES = {
    template.name: template
    for template in (
        _llama_3("llama_3_vision", "single"),
        _llama_3("llava_llama_3", "always"),
        _chatml("qwen2-vl", ("<|vision_start|>", "<|vision_end|>"), "never", ("<|im_end|>",), keeps_empty_system=False),
        _chatml("chatml-llava", ("", ""), "always", ("<|endoftext|>", "<|im_end|>"), keeps_empty_system=True),
        _VICUNA,
        _MISTRAL,
    )
}
