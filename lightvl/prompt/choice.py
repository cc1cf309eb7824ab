"""Which chat template a server uses: a given one, the model's own, or the built-in one of its family. Called once, at
start, by engine/build.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightvl.errors import ConfigError
from lightvl.prompt.builtin_templates import BUILTIN_TEMPLATES
from lightvl.prompt.jinja_template import JinjaTemplate
from lightvl.prompt.template import Template
from lightvl.prompt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """For the start-up report."""

    name: str
    reason: str


def choose_template(
    explicit: str | None, tokenizer: Tokenizer, *, family_template: str | None, takes_images: bool
) -> tuple[Template | None, TemplateChoice]:
    """`explicit` is the value of --chat-template: a built-in template's name, a Jinja file or Jinja source.
    `family_template` names the built-in one that fits the model's family. None comes back for a model without any
    template, which can only complete plain text. Raises ConfigError."""
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
