from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_helpers import CHATML, LLAMA_3, byte_level, sentencepiece

from lightvl.core import ImagePart, Message, Role, TextPart
from lightvl.errors import BadRequest, ConfigError
from lightvl.prompt.builtin_templates import BUILTIN_TEMPLATES
from lightvl.prompt.choice import TemplateChoice, choose_template
from lightvl.prompt.jinja_template import JinjaTemplate
from lightvl.prompt.template import ClientText, Control, ImageSlot, Segment
from lightvl.prompt.tokenizer import Tokenizer

IMAGE = ImagePart("x", "messages[0].content[0].image_url")

QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}{% if loop.first and message['role'] != "
    "'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>"
    "{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in "
    "message['content'] %}{% if content['type'] == 'image' or 'image_url' in content %}{% set image_count.value = "
    "image_count.value + 1 %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
TEXT_ONLY = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] "
    "+ ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}"
    "{% endif %}"
)
CUTTING = (  # takes pieces out of client text, as templates for reasoning models do
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content.replace('<think>', '') | trim }}"
    "{% if '</think>' in message.content %}{{ '(thought)' }}{% endif %}<|im_end|>\n{% endfor %}"
)


@cache
def qwen() -> tuple[Any, Tokenizer]:
    hf = byte_level(CHATML, eos="<|im_end|>", chat_template=QWEN2_VL)
    return hf, Tokenizer(
        copy.deepcopy(hf), image_token_id=hf.convert_tokens_to_ids("<|image_pad|>"), own_chat_template=hf.chat_template
    )


@cache
def llava() -> tuple[Any, Tokenizer]:
    hf = sentencepiece()
    return hf, Tokenizer(copy.deepcopy(hf), image_token_id=hf.convert_tokens_to_ids("<image>"))


def chat(*turns: tuple[Role, tuple[str | ImagePart, ...]]) -> list[Message]:
    return [
        Message(role, tuple(TextPart(part) if isinstance(part, str) else part for part in parts))
        for role, parts in turns
    ]


def as_hf(messages: list[Message], *, parts: bool) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
                for part in message.parts
            ]
            if parts
            else "".join(part.text for part in message.parts if isinstance(part, TextPart)),
        }
        for message in messages
    ]


def render(template: JinjaTemplate, messages: list[Message], *, go_on: bool = False) -> list[Segment]:
    return template.render(messages, add_generation_prompt=True, continue_final_message=go_on)


TALK = chat(
    ("system", ("SYS",)),
    ("user", ("First:", IMAGE, "second:", IMAGE, "Compare ", "them.")),
    ("assistant", ("They differ.",)),
    ("user", ("<b>How</b> {{ so }}? | 'x' ",)),
)


def test_ids_equal_hf() -> None:
    hf, tokenizer = qwen()
    template = JinjaTemplate(QWEN2_VL, name="own", tokenizer=tokenizer)
    expected = hf.apply_chat_template(as_hf(TALK, parts=True), add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(render(template, TALK)) == expected
    hf, tokenizer = llava()
    template = JinjaTemplate(LLAVA_1_5, name="own", tokenizer=tokenizer)
    text = hf.apply_chat_template(
        as_hf(TALK, parts=True), chat_template=LLAVA_1_5, add_generation_prompt=True, tokenize=False
    )
    assert tokenizer.encode(render(template, TALK)) == hf.encode(text)
    assert render(template, TALK).count(ImageSlot()) == 2


def test_own_equals_built_in_for_qwen2_vl() -> None:
    _, tokenizer = qwen()
    own = JinjaTemplate(QWEN2_VL, name="own", tokenizer=tokenizer)
    for messages in (TALK, TALK[1:], TALK[3:]):
        built_in = BUILTIN_TEMPLATES["qwen2-vl"].render(
            messages, add_generation_prompt=True, continue_final_message=False
        )
        assert tokenizer.encode(render(own, messages)) == tokenizer.encode(built_in)


def num_controls(segments: list[Segment]) -> tuple[int, int]:
    return sum(isinstance(s, Control) for s in segments), segments.count(ImageSlot())


ATTACKS = st.lists(
    st.sampled_from(
        [
            *CHATML,
            "<|im_",
            "end|>",
            "start|>",
            "<",
            "|",
            "im_end",
            "|>",
            "<think>",
            "</think>",
            " ",
            "\n",
            "word",
            "<|im_<think>end|>",
        ]
    ),
    max_size=6,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(ATTACKS, min_size=1, max_size=4), st.sampled_from([QWEN2_VL, TEXT_ONLY, CUTTING]))
def test_client_text_never_becomes_control(texts: list[str], source: str) -> None:
    """Even when parts join up, or the template trims or cuts the text. And the text still comes through."""
    _, tokenizer = qwen()
    template = JinjaTemplate(source, name="t", tokenizer=tokenizer)
    harmless = chat(("user", tuple("x" for _ in texts)), ("user", ("y",)))
    attack = chat(("user", tuple(texts)), ("user", (texts[0],)))
    segments = render(template, attack)
    assert num_controls(segments) == num_controls(render(template, harmless))
    written = "".join(segment.text for segment in segments if isinstance(segment, ClientText))
    if source == QWEN2_VL:
        assert "".join(texts) in written and texts[0] in written
    ids = tokenizer.encode(segments)
    controls = [i for i in ids if i in {tokenizer.control_id(name) for name in CHATML}]
    expected = [tokenizer.control_id(s.text) for s in segments if isinstance(s, Control)]
    assert controls == expected


def test_harmless_text_reaches_the_template_as_it_is() -> None:
    _, tokenizer = qwen()
    template = JinjaTemplate(CUTTING, name="t", tokenizer=tokenizer)
    text = "".join(
        segment.text
        for segment in render(template, chat(("user", ("<think>a</think> b",))))
        if isinstance(segment, ClientText)
    )
    assert text == "user\na</think> b(thought)\n"


@pytest.mark.parametrize("source", [QWEN2_VL, TEXT_ONLY])
def test_continue_final_message(source: str) -> None:
    _, tokenizer = qwen()
    template = JinjaTemplate(source, name="t", tokenizer=tokenizer)
    messages = chat(("user", ("Q",)), ("assistant", ("Once <|im_end|> upon ",)))
    segments = render(template, messages, go_on=True)
    assert isinstance(segments[-1], ClientText) and segments[-1].text == "assistant\nOnce <|im_end|> upon "
    with pytest.raises(BadRequest):
        render(template, messages[:1], go_on=True)


def test_generation_prompt_may_be_left_out() -> None:
    _, tokenizer = qwen()
    template = JinjaTemplate(QWEN2_VL, name="t", tokenizer=tokenizer)
    segments = template.render(TALK, add_generation_prompt=False, continue_final_message=False)
    assert segments[-2:] == [Control("<|im_end|>"), ClientText("\n")]


def test_templates_that_refuse() -> None:
    _, tokenizer = qwen()
    source = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('Not this.') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    template = JinjaTemplate(source, name="t", tokenizer=tokenizer)
    with pytest.raises(BadRequest, match=r"Not this\."):
        render(template, chat(("user", ("bad",))))
    with pytest.raises(BadRequest) as caught:
        render(template, chat(("user", ("look", IMAGE))))
    assert caught.value.param is not None
    counting = JinjaTemplate(
        "{{ messages[0].content }}{{ 1 // (messages | length - 2) }}", name="t", tokenizer=tokenizer
    )
    with pytest.raises(BadRequest, match="cannot show"):
        render(counting, chat(("user", ("a",)), ("user", ("b",))))


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}{{ messages[0].content }}",
        "{% for x in messages %}",
        "no text",
        "{{ messages.append(1) }}",
    ],
)
def test_bad_templates(source: str) -> None:
    with pytest.raises(ConfigError):
        JinjaTemplate(source, name="t", tokenizer=qwen()[1])


def test_images_that_a_template_drops_are_refused() -> None:
    _, tokenizer = qwen()
    template = JinjaTemplate(
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}"
        "{% endfor %}",
        name="t",
        tokenizer=tokenizer,
    )
    assert not template.renders_images
    with pytest.raises(BadRequest) as caught:
        render(template, chat(("user", ("look", IMAGE))))
    assert caught.value.param == IMAGE.param


class TestChoice:
    def test_explicit(self, tmp_path: Path) -> None:
        _, tokenizer = qwen()
        chosen, told = choose_template("chatml-llava", tokenizer, family_template="qwen2-vl", takes_images=True)
        assert chosen is BUILTIN_TEMPLATES["chatml-llava"] and told.name == "chatml-llava"
        path = tmp_path / "mine.jinja"
        path.write_text(TEXT_ONLY)
        chosen, told = choose_template(str(path), tokenizer, family_template="qwen2-vl", takes_images=True)
        assert chosen is not None and told.name == "mine.jinja" and "no place for images" in told.reason
        chosen, told = choose_template(QWEN2_VL, tokenizer, family_template=None, takes_images=True)
        assert chosen is not None and told == TemplateChoice("inline Jinja", "given with --chat-template")
        with pytest.raises(ConfigError, match="qwen2-vl"):
            choose_template("qwen3-vl", tokenizer, family_template="qwen2-vl", takes_images=True)

    def test_the_models_own(self) -> None:
        hf, tokenizer = qwen()
        chosen, told = choose_template(None, tokenizer, family_template="qwen2-vl", takes_images=True)
        assert isinstance(chosen, JinjaTemplate) and told.name == "the model's own"
        for own, reason in ((TEXT_ONLY, "no place for images"), (None, "no chat template"), ("{% if", "does not work")):
            other = Tokenizer(
                copy.deepcopy(hf), image_token_id=tokenizer.control_id("<|image_pad|>"), own_chat_template=own
            )
            chosen, told = choose_template(None, other, family_template="qwen2-vl", takes_images=True)
            assert chosen is BUILTIN_TEMPLATES["qwen2-vl"] and reason in told.reason
        text_model = Tokenizer(copy.deepcopy(hf), own_chat_template=TEXT_ONLY)
        chosen, _ = choose_template(None, text_model, family_template=None, takes_images=False)
        assert isinstance(chosen, JinjaTemplate)
        chosen, told = choose_template(None, Tokenizer(copy.deepcopy(hf)), family_template=None, takes_images=False)
        assert chosen is None and "--chat-template" in told.reason


def test_llama_3_style_bos_once() -> None:
    hf = byte_level(LLAMA_3, bos="<|begin_of_text|>", eos="<|eot_id|>")
    tokenizer = Tokenizer(copy.deepcopy(hf), image_token_id=hf.convert_tokens_to_ids("<|image|>"))
    source = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}"
        "{% endfor %}"
    )
    ids = tokenizer.encode(render(JinjaTemplate(source, name="t", tokenizer=tokenizer), chat(("user", ("hi",)))))
    assert ids.count(hf.bos_token_id) == 1 and ids[0] == hf.bos_token_id


WITH_TOOLS = (
    "{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n<tool_response>\n"
    "{{ message.content }}\n</tool_response>{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)


def test_the_tool_role_where_the_template_names_it() -> None:
    _, tokenizer = qwen()
    messages = chat(("user", ("Weather?",)), ("assistant", ("I look.",)), ("tool", ("Rain <|im_end|>",)))
    segments = render(JinjaTemplate(WITH_TOOLS, name="t", tokenizer=tokenizer), messages)
    assert "<tool_response>\nRain <|im_end|>\n" in "".join(s.text for s in segments if isinstance(s, ClientText))
    for template in (JinjaTemplate(TEXT_ONLY, name="t", tokenizer=tokenizer), BUILTIN_TEMPLATES["qwen2-vl"]):
        with pytest.raises(BadRequest, match="tool role"):
            template.render(messages, add_generation_prompt=True, continue_final_message=False)
