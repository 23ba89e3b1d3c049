"""Texts -> pieces, each trained or not: what ``data.template`` says. Which tokens are trained follows from
here and nothing else.

A piece knows whether it is the template's own writing or the sample's. Neighbours are tokenised together, up
to where training begins or ends, so that a template's structure, and never a second tokenisation of a prefix,
draws the line between prompt and answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from kempnerforge.config import registry
from kempnerforge.config.template import around_field
from kempnerforge.util.errors import InputError
from kempnerforge.util.plugin_returns import check_returns, gives

if TYPE_CHECKING:
    from kempnerforge.config.data import DataConfig
    from kempnerforge.data.sample import Text
    from kempnerforge.data.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A stretch of a conversation.

    Attributes:
        field: "system", "prompt" or "answer" for text of the sample; empty for the template's own.
        eos: the piece is the EOS token, and ``text`` is empty.
    """

    text: str
    trained: bool
    field: str = ""
    eos: bool = False


EOS_PIECE = Piece("", True, eos=True)
FIELDS = ("system", "prompt", "answer", "")


class Template(ABC):
    """Makes pieces of texts. Subclasses register with ``@registry.register_template("name")``.

    Args:
        cfg: the ``[data]`` section.
        tokenizer: None where only the written text is needed.

    Attributes:
        bos: whether BOS is before the pieces, with a tokenizer that puts it there.
        own_bos: BOS is there with any tokenizer that has one.
        specials: whether names of special tokens in the template's own writing are these tokens.
        end: name of the token that ends an answer; empty means EOS.
        own: the template's own writing, to tell which names occur in it.
        turns: whether it can write more than one.
        by_turn: it writes earlier answers in another way than the last one, so a conversation is a text for
            each turn, up to its answer, which is the only one that is trained there.
        bare: a text may begin with its answer, whose first token is not trained then.
        fills: a text is filled up to ``vlm.max_text_len`` with padding, which is part of it and not trained.
    """

    bos = True
    own_bos = False
    specials = False
    end = ""
    own = ""
    turns = True
    by_turn = False
    bare = False
    fills = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_returns(cls, pieces=_no_pieces, answer_template=_no_answer)

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer | None) -> None:
        self.cfg = cfg

    @classmethod
    def answer_template(cls, cfg: DataConfig) -> str:
        """How an answer is written; "{answer}" is replaced by it."""
        return "{answer}"

    @classmethod
    def stretches(cls, cfg: DataConfig, text: Text) -> Iterator[str]:
        """As the function of this name."""
        try:
            pieces = cls(cfg, None).pieces(text, text.system or cfg.system)
        except ValueError:
            return  # nothing that this template cannot write is ever trained
        for _, group in groupby(pieces, key=lambda piece: piece.trained):
            yield "".join(piece.text for piece in group)

    @abstractmethod
    def pieces(self, text: Text, system: str) -> list[Piece]:
        """What is written of ``text``, which is of strings; raises ValueError where the template cannot. Each
        answer of its turns is a piece with the field "answer", and the last of them is trained.
        """


def _no_answer(value: Any, *_: Any, **__: Any) -> str:
    return "" if isinstance(value, str) and value.count("{answer}") == 1 else gives(value, 'a string with "{answer}" once')


def _no_pieces(value: Any, template: Template, text: Text, *_: Any, **__: Any) -> str:
    if not isinstance(value, list):
        return gives(value, "a list of Piece")
    for number, piece in enumerate(value):
        if not isinstance(piece, Piece):
            return gives(piece, "a Piece", f"[{number}]")
        if not isinstance(piece.text, str):
            return gives(piece.text, "a string", f"[{number}].text")
        if piece.field not in FIELDS:
            return gives(piece.field, f"one of {', '.join(map(repr, FIELDS))}", f"[{number}].field")
    answers = [piece for piece in value if piece.field == "answer"]
    written = any(piece.trained and (piece.text or piece.eos) for piece in value) or not text.turns[-1][1]
    if len(answers) < len(text.turns) or not (answers[-1].trained and written):
        return gives(value, 'Piece(answer, True, "answer") for the answer of each turn, and the last of them is trained')
    if text.leading and all(piece.field != "prompt" for piece in value):
        return gives(value, 'Piece(prompt, False, "prompt") for the images, which are at the head of the prompt')
    return ""


@registry.register_template("prompt")
class PromptTemplate(Template):
    """``data.prompt_template`` and ``data.answer_template`` in turn, EOS after each answer."""

    @classmethod
    def answer_template(cls, cfg: DataConfig) -> str:
        return cfg.answer_template

    def pieces(self, text: Text, system: str) -> list[Piece]:
        _no_system(system, "prompt")
        found = []
        for prompt, answer in text.turns:
            found += _around(self.cfg.prompt_template, prompt, "prompt", trained=False)
            found += [*_around(self.cfg.answer_template, answer, "answer", trained=True), EOS_PIECE]
        return found


@registry.register_template("plain")
class PlainTemplate(Template):
    """Images, answer, line break, EOS (LLaVA's "plain": Liu et al. 2023, section 4.2). Of a prompt only the
    images are left.
    """

    turns = False

    @classmethod
    def answer_template(cls, cfg: DataConfig) -> str:
        return "{answer}\n"

    def pieces(self, text: Text, system: str) -> list[Piece]:
        _no_system(system, "plain")
        prompt, answer = _only_turn(text, "plain")
        name = self.cfg.image_placeholder
        images = name * prompt.count(name) if text.leading is None else ""
        return [Piece(images, False, "prompt"), Piece(answer, True, "answer"), Piece("\n", True), EOS_PIECE]


@registry.register_template("caption")
class CaptionTemplate(PlainTemplate):
    """Images, answer, EOS, for embeddings: as CLIP's tokenizer writes a text (Radford et al. 2021, section
    2.4). BOS is in front only if the tokenizer puts it there.
    """

    bare = True

    @classmethod
    def answer_template(cls, cfg: DataConfig) -> str:
        return "{answer}"

    def pieces(self, text: Text, system: str) -> list[Piece]:
        images, answer, _, end = super().pieces(text, system)
        return [images, answer, end]


@registry.register_template("padded_caption")
class PaddedCaptionTemplate(CaptionTemplate):
    """As "caption", filled up with padding, which SigLIP reads (Zhai et al. 2023: texts of 64 tokens)."""

    fills = True


@registry.register_template("paligemma")
class PaliGemmaTemplate(Template):
    """Images, BOS, prompt, line break; answer, EOS (Beyer et al. 2024, "PaliGemma", section 3.1)."""

    own_bos = True
    turns = False

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(cfg, tokenizer)
        if tokenizer is not None and tokenizer.bos_id is None:
            raise InputError("data.template = 'paligemma': the tokenizer has no BOS, which is between images and prompt")

    def pieces(self, text: Text, system: str) -> list[Piece]:
        _no_system(system, "paligemma")
        prompt, answer = _only_turn(text, "paligemma")
        return [Piece(prompt, False, "prompt"), Piece("\n", False), Piece(answer, True, "answer"), EOS_PIECE]


@registry.register_template("turns")
class TurnsTemplate(Template):
    """``[data.turns]``."""

    specials = True

    def __init__(self, cfg: DataConfig, tokenizer: Tokenizer | None) -> None:
        super().__init__(cfg, tokenizer)
        turns = cfg.turns
        self.bos, self.end = turns.bos, turns.end
        if self.end and tokenizer is not None and self.end not in tokenizer.special_names.values():
            raise InputError(
                f"data.turns.end = {self.end!r}: the tokenizer has no such token; add it to model.new_tokens, or leave it empty"
            )
        self.own = "\0".join((turns.system, turns.user, turns.assistant, turns.answer, turns.end, turns.separator))

    @classmethod
    def answer_template(cls, cfg: DataConfig) -> str:
        return cfg.turns.answer

    def pieces(self, text: Text, system: str) -> list[Piece]:
        turns = self.cfg.turns
        found = _around(turns.system, system, "system", trained=False) if system else []
        for prompt, answer in text.turns:
            found += [*_around(turns.user, prompt, "prompt", trained=False), Piece(turns.assistant, False)]
            found += [*_around(turns.answer, answer, "answer", trained=True), Piece(turns.end, True) if turns.end else EOS_PIECE]
            found.append(Piece(turns.separator, False))
        return found


def _around(template: str, value: str, field: str, trained: bool) -> list[Piece]:
    before, after = around_field(template)
    return [Piece(before, trained), Piece(value, trained, field), Piece(after, trained)]


def _only_turn(text: Text, template: str) -> tuple[str, str]:
    if text.more:
        raise InputError(f"data.template = {template!r}: a text of {len(text.more) + 1} turns, it writes one")
    return text.turns[0]


def _no_system(system: str, template: str) -> None:
    if system:
        raise InputError(f"data.template = {template!r}: the text has a system prompt, and there is no place for it")


def build_template(cfg: DataConfig, tokenizer: Tokenizer) -> Template:
    """The template of ``cfg``; raises ValueError if it does not fit the tokenizer."""
    kind: type[Template] = registry.templates.get(cfg.template)
    return kind(cfg, tokenizer)


def stretches(cfg: DataConfig, text: Text) -> Iterator[str]:
    """What ``text`` becomes, without special tokens, in strings that are tokenised each alone; for the corpus
    of a tokenizer.
    """
    kind: type[Template] = registry.templates.get(cfg.template)
    if text.turns:
        yield from kind.stretches(cfg, text)


def render_answer(cfg: DataConfig, answer: str) -> str:
    """``answer`` as the template writes it, without the token that ends it."""
    kind: type[Template] = registry.templates.get(cfg.template)
    before, after = around_field(kind.answer_template(cfg))
    return before + answer + after
