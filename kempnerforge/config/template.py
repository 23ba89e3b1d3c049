"""``data.template``: how a text of a sample becomes what the model reads and what it learns to write."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Any

from kempnerforge.config import registry
from kempnerforge.config.checks import one_of, only_if
from kempnerforge.util.errors import InputError, UnreadError

TEMPLATES = ("prompt", "chat", "plain", "paligemma", "turns", "caption", "padded_caption")
WITH_SYSTEM = ("chat", "turns")
"""Templates that have a place for a system prompt."""


@dataclass
class TurnsConfig:
    """``[data.turns]``: the user's template, for ``data.template = "turns"``. A conversation is ``system
    (user assistant answer end separator) (user assistant answer end separator) ...``; ``answer`` and ``end``
    are trained.

    Names of special tokens written here are these tokens; inside prompts and answers they are text.

    Attributes:
        system: what a conversation begins with; "{system}" is replaced by the system prompt. Left out where
            there is none.
        user: what the model reads of the user; "{prompt}" is replaced by the sample's.
        assistant: what the model reads right before it answers.
        answer: what it writes; "{answer}" is replaced by the sample's.
        end: the token that ends an answer, by name; empty means EOS.
        separator: what follows an answer and is not trained.
        bos: whether BOS is in front, for tokenizers that have one.
    """

    system: str = "{system}\n"
    user: str = "{prompt}\n"
    assistant: str = ""
    answer: str = "{answer}"
    end: str = ""
    separator: str = ""
    bos: bool = True

    def __post_init__(self) -> None:
        for key, name in (("system", "system"), ("user", "prompt"), ("answer", "answer")):
            one_field(self, key, name)


def one_field(section: Any, key: str, name: str) -> None:
    """``section.key`` holds ``{name}`` once, bare, and no other field."""
    value = getattr(section, key)
    try:
        fields = [(part, spec, conversion) for _, part, spec, conversion in Formatter().parse(value) if part is not None]
    except ValueError as error:
        raise InputError(f"{key} = {value!r}: {error}") from None
    if fields != [(name, "", None)]:
        raise InputError(f"{key} = {value!r}: must contain {{{name}}} once and no other field")


def check_template(section: Any) -> None:
    """The keys of ``[data]`` that say how texts are written: each is one that ``section.template`` reads."""
    if section.template not in TEMPLATES and section.template not in registry.templates:  # of a plugin
        one_of(section, "template", dict.fromkeys((*TEMPLATES, *registry.templates)))
    for key, name in (("prompt_template", "prompt"), ("answer_template", "answer")):
        one_field(section, key, name)
        only_if(section, section.template == "prompt", "template = 'prompt'", key)
    only_if(section, section.template == "turns", "template = 'turns'", "turns")
    if section.system and section.template in TEMPLATES and section.template not in WITH_SYSTEM:
        raise UnreadError(
            "system", f"system = {section.system!r}: template = {section.template!r} has no place for it; {' and '.join(WITH_SYSTEM)} have"
        )


def around_field(template: str) -> tuple[str, str]:
    """What ``template`` has before its only field, and after it."""
    around, place = ["", ""], 0
    for literal, name, _, _ in Formatter().parse(template):
        around[place] += literal
        place += name is not None
    return around[0], around[1]
