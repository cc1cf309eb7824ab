"""The built-in templates against strings written out by hand (facts/chat_templates.md)."""

from __future__ import annotations

import pytest

from lightvl.core import ImagePart, Message, Role, TextPart
from lightvl.errors import BadRequest
from lightvl.prompt.builtin_templates import BUILTIN_TEMPLATES
from lightvl.prompt.template import ClientText, Control, ImageSlot

IMAGE = ImagePart("x", "messages[0].content[0].image_url")


def message(role: Role, *parts: str | ImagePart) -> Message:
    return Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def shown(name: str, *messages: Message, go_on: bool = False, generation: bool = True, image: str = "<image>") -> str:
    segments = BUILTIN_TEMPLATES[name].render(messages, add_generation_prompt=generation, continue_final_message=go_on)
    return "".join(image if isinstance(segment, ImageSlot) else segment.text for segment in segments)


SYS = message("system", "SYS.")


def test_llama_3_vision() -> None:
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    assert shown("llama_3_vision", SYS, message("user", IMAGE, "What is this?"), image="<|image|>") == (
        f"{header('system')}SYS.<|eot_id|>{header('user')}<|image|>\nWhat is this?<|eot_id|>{header('assistant')}"
    )
    assert f"{header('user')}<|image|><|image|>Compare.<|eot_id|>" in shown(
        "llama_3_vision", message("user", IMAGE, IMAGE, "Compare."), image="<|image|>"
    )
    # Stripped: text, and the newline of an image that ends the message.
    assert shown("llama_3_vision", SYS, message("user", " \n Look: ", IMAGE), image="<|image|>").endswith(
        f"{header('user')}Look: <|image|><|eot_id|>{header('assistant')}"
    )
    assert shown("llama_3_vision", message("system", ""), message("user", "Hi ")) == (
        f"{header('user')}Hi<|eot_id|>{header('assistant')}"
    )
    assert shown("llama_3_vision", message("user", "Hi")).startswith(
        f"{header('system')}You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
    )
    template = BUILTIN_TEMPLATES["llama_3_vision"]
    assert template.stop == ("<|end_of_text|>", "<|eot_id|>") and template.starts_with_bos


def test_llava_llama_3() -> None:
    assert "\n\n<image>\n<image>\nCompare.<|eot_id|>" in shown(
        "llava_llama_3", message("user", IMAGE, IMAGE, "Compare.")
    )


def test_qwen2_vl() -> None:
    slot = "<|image_pad|>"
    image = f"<|vision_start|>{slot}<|vision_end|>"
    assert shown("qwen2-vl", message("user", "First:", IMAGE, "second:", IMAGE, "Compare."), image=slot) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"First:{image}second:{image}Compare.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown("qwen2-vl", message("system", ""), message("user", " a ")) == (
        "<|im_start|>user\n a <|im_end|>\n<|im_start|>assistant\n"
    )
    assert not BUILTIN_TEMPLATES["qwen2-vl"].starts_with_bos


def test_chatml_llava() -> None:
    assert shown("chatml-llava", message("user", IMAGE, IMAGE, "Compare.")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\n<image>\nCompare."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert shown("chatml-llava", message("system", ""), message("user", "a")).startswith(
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n"
    )


def test_vicuna() -> None:
    turns = (message("user", IMAGE, "What is this?"), message("assistant", "A cat."), message("user", "What colour?"))
    assert shown("vicuna_v1.1", SYS, *turns) == (
        "SYS. USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: What colour? ASSISTANT:"
    )
    assert shown("vicuna_v1.1", message("system", ""), message("user", "a")) == " USER: a ASSISTANT:"


def test_mistral_llava() -> None:
    turns = (message("user", IMAGE, "What?"), message("assistant", "A cat."), message("user", "Why?"))
    assert shown("mistral-llava", *turns) == "[INST] <image>\nWhat? [/INST] A cat.</s>[INST] Why? [/INST]"
    assert shown("mistral-llava", SYS, *turns[:1]) == "[INST] SYS.\n\n<image>\nWhat? [/INST]"


def test_several_system_messages_the_last_one_wins_and_stands_first() -> None:
    for name in BUILTIN_TEMPLATES:
        text = shown(name, message("user", "AAA"), SYS, message("user", "b"), message("system", "LAST"))
        assert "SYS." not in text and 0 <= text.index("LAST") < text.index("AAA")


def test_many_images_put_text_on_lines_of_its_own() -> None:
    text = shown("qwen2-vl", message("user", *[IMAGE] * 16, "a", "b"))
    assert text.endswith("<|vision_end|>ab<|im_end|>\n<|im_start|>assistant\n")
    text = shown("qwen2-vl", message("user", *[IMAGE] * 17, "a", "b"))
    assert text.endswith("<|vision_end|>\na\nb<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_ends(name: str) -> None:
    template = BUILTIN_TEMPLATES[name]
    turns = (message("user", "Q"), message("assistant", "Once upon"))
    opened = shown(name, *turns, go_on=True)
    assert opened.endswith("Once upon")
    assert shown(name, turns[0], message("assistant", "Once upon "), go_on=True) == opened + " "
    closed = shown(name, *turns)
    assert closed.startswith(opened + template.assistant[1]) and closed.endswith(template.open_assistant)
    assert shown(name, *turns, generation=False) == opened + template.assistant[1]
    empty = shown(name, message("user", "Q"), message("assistant", ""), message("user", "R"))
    assert template.open_assistant + template.user[0] + "R" in empty
    assert shown(name, message("user", "Q"), message("assistant", "")) == shown(name, message("user", "Q"))
    with pytest.raises(BadRequest, match="continue_final_message"):
        shown(name, message("user", "Q"), go_on=True)
    with pytest.raises(BadRequest) as caught:
        shown(name, message("system", "a", IMAGE), message("user", "Q"))
    assert caught.value.param == IMAGE.param


@pytest.mark.parametrize("name", BUILTIN_TEMPLATES)
def test_client_text_stays_client_text(name: str) -> None:
    bad = "<|im_end|></s><image><|eot_id|>"
    chat = (message("system", bad), message("user", bad, IMAGE, bad), message("assistant", bad))
    segments = BUILTIN_TEMPLATES[name].render(chat, add_generation_prompt=True, continue_final_message=False)
    assert [s for s in segments if isinstance(s, ClientText)] == [ClientText(bad)] * 4
    assert segments.count(ImageSlot()) == 1
    assert not any(bad in s.text for s in segments if isinstance(s, Control))
