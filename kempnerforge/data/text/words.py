"""Texts and prompts -> tokens, and the places of images among them. A, text tokens of one text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice

import numpy as np

from kempnerforge.config.data import DataConfig
from kempnerforge.data.batching.batch import Kind
from kempnerforge.data.sample import SampleError, Text, text_size
from kempnerforge.data.text.interleave import INPUT_IDS, KINDS, LABELS, POSITIONS, TEXT_IDS, Layout, Prompt, TextTokens
from kempnerforge.data.text.template import Piece, build_template
from kempnerforge.data.text.tokenizer import CACHED_CHARACTERS, Tokenizer
from kempnerforge.util.errors import InputError

CACHED_TEXTS = 8192
IMAGE, TOKEN, BREAK = "image", "token", "break"
"""What a name inside a piece is: the place of an image, a special token, or text that must not become the
token of that name.
"""


@dataclass
class _Line:
    """Tokens as they come.

    Attributes:
        ids: A tokens.
        trained: which of them are.
        at: for each image how many tokens are before it.
        front: tokens before the first answer.
    """

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    front: int | None = None

    def add(self, ids: Sequence[int], trained: bool) -> None:
        self.ids += ids
        self.trained += [trained] * len(ids)


class TextEncoder:
    """Tokenises for one model.

    Args:
        tokenizer: of the model.
        data_cfg: template and placeholder.
        layout: what the model needs.

    Attributes:
        end_id: the token that ends an answer: EOS, or the template's end token.
        ends: tokens that a trained span may end in.
        stops: tokens at which generation stops: ``end_id``, and those that the tokenizer has.

    Raises:
        ValueError: the template does not fit the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, data_cfg: DataConfig, layout: Layout) -> None:
        self.tokenizer, self.cfg, self.layout = tokenizer, data_cfg, layout
        self.template = build_template(data_cfg, tokenizer)
        end = tokenizer.token_id(self.template.end) if self.template.end else None
        self.end_id: int = tokenizer.eos_id if end is None else end
        self.ends: frozenset[int] = frozenset({self.end_id, tokenizer.eos_id})
        self.stops: frozenset[int] = frozenset({self.end_id, *tokenizer.stop_ids})
        self._added = list(tokenizer.backend.get_added_tokens_decoder().values())
        self._eats = {token.content: (token.lstrip, token.rstrip) for token in self._added}  # white space in front of it, after it
        self._finders = {(own, literal): self._finder(own, literal) for own in (True, False) for literal in (True, False)}
        self._cache: dict[Text, TextTokens] = {}

    def encode(self, text: Text) -> TextTokens:
        """One text of a sample.

        Raises:
            SampleError: an empty answer, a text that is not Unicode or that the template cannot write, an
                image that the token after it cannot see.
        """
        if isinstance(text.answer, tuple):
            return self._window(text.answer)
        if wrong := next((turn for turn in text.turns if not all(isinstance(part, str) for part in turn)), None):
            raise SampleError(f"prompt and answer must be strings, not {' and '.join(type(part).__name__ for part in wrong)}")
        if text_size((text,)) > CACHED_CHARACTERS:
            return self._words(*self._shorten(text))
        words = self._cache.get(text)
        if words is None:
            if len(self._cache) >= CACHED_TEXTS:
                self._cache.clear()
            words = self._cache[text] = self._words(*self._shorten(text))
        return words

    def as_asked(self, text: Text) -> list[Text]:
        """``text`` as it is trained: itself, or the conversation up to each answer where the template writes
        no row that holds for all of them.

        Raises:
            SampleError: an image comes later than the first answer, and not all of these would show it.
        """
        if not self.template.by_turn or not text.more:
            return [text]
        name = self.cfg.image_placeholder
        if text.leading is None and any(name in str(part) for part in islice(text.strings, 1, None)):
            raise SampleError(
                "an image after the first answer of a conversation, and the chat template writes earlier answers otherwise than the last one"
            )
        fitting = self._turns_that_fit(text)
        if fitting < len(text.more) and not self.cfg.truncate:
            raise SampleError(f"a text of {len(self._line(text).ids)} tokens, max_text_len = {self.layout.max_text_len}")
        return [replace(text, more=text.more[:k]) for k in range(fitting + 1)]

    def _turns_that_fit(self, text: Text) -> int:
        """Turns of ``text.more``, from the first, with which it is not too long. Its length is asked for a
        few times, not for each turn.
        """
        room, turns = self.layout.max_text_len, len(text.more)
        too_long = lambda k: len(self._line(replace(text, more=text.more[:k])).ids) > room
        return turns if not too_long(turns) else max(0, bisect_left(range(turns), True, key=too_long) - 1)

    def encode_prompt(self, prompt: str | Text, num_images: int) -> Prompt:
        """What is before an answer, for generation: the same as in training. Placeholders that the template
        begins an answer with are in it, too.

        Args:
            prompt: with a placeholder for each image, or with none: the images are in front then. A
                conversation: its last answer is asked for; what it says is not read.
            num_images: how many the question has.

        Raises:
            ValueError: ``prompt`` is not Unicode text, its placeholders are not as many as the images, or an
                image ends it where the model needs a token after it.
        """
        name = self.cfg.image_placeholder
        line = self._open(prompt, check=bool(self.layout.image_size))
        if not self.layout.image_size:
            return Prompt(line.ids)
        if line.at and len(line.at) != num_images:
            raise InputError(f"{len(line.at)} of {name!r} in the prompt and {num_images} images: must be as many, or no {name!r}")
        if self._needs_token_after and len(line.ids) in line.at:
            raise InputError(f"an image ends the prompt, and no token after it could see it: {self._remedy}")
        return Prompt(line.ids, tuple(line.at) or (0,) * num_images)

    def answer_ids(self, text: Text) -> list[int]:
        """The last answer of ``text`` as it is trained: what has to be generated after its prompt, without
        the token that ends it.

        Raises:
            SampleError: as ``encode``.
        """
        line, prompt = self._line(text), self._open(text, check=False)
        ids = line.ids[len(prompt.ids) :]
        return ids[: ids.index(self.end_id)] if self.end_id in ids else ids

    @property
    def has_turns(self) -> bool:
        """Whether the template can write conversations of several turns."""
        return self.template.turns

    def count_placeholders(self, prompt: str | Text) -> int:
        """Images that are where ``prompt`` (and the template) says; 0: they are in front, or the job has
        none.
        """
        return len(self._open(prompt, check=False).at) if self.layout.image_size else 0

    # ---- pieces -> tokens ------------------------------------------------------------------------

    @property
    def _mark(self) -> int | None:
        """The token that is at a placeholder where images take no position, if the tokenizer has one for it."""
        if self.layout.image_tokens or not self.layout.image_size or self.cfg.image_placeholder not in self.tokenizer.appended:
            return None
        return self.tokenizer.token_id(self.cfg.image_placeholder)

    @property
    def _needs_token_after(self) -> bool:
        """Whether the token after an image is the first to see it: it takes no position, and no tile tokens
        are around it.
        """
        return not self.layout.image_tokens and not self.cfg.images.has_markers

    @property
    def _remedy(self) -> str:
        return f"add {self.cfg.image_placeholder!r} to model.new_tokens"

    def _finder(self, own: bool, literal: bool) -> tuple[re.Pattern[str], dict[str, str]] | None:
        """What to look for inside a piece: a pattern of names, and what each is.

        Args:
            own: the template's writing, not the sample's.
            literal: the placeholder in a sample's words is text.
        """
        anywhere = {token.content for token in self._added if not token.special}  # the tokenizer finds these inside any text
        placeholder = self.cfg.image_placeholder
        found: dict[str, str] = {}
        if self.template.specials and own:
            found = dict.fromkeys(self.tokenizer.special_names.values(), TOKEN)
        elif self.template.specials:  # a sample's words must not pass for the template's
            found = dict.fromkeys((name for name in anywhere if name in self.template.own), BREAK)
        if not own:
            found |= dict.fromkeys((name for name in self.cfg.images.new_tokens() if name in anywhere), BREAK)
        if own or not literal:
            found[placeholder] = IMAGE
        elif placeholder in anywhere:
            found[placeholder] = BREAK
        names = sorted(found, key=len, reverse=True)
        return (re.compile("|".join(map(re.escape, names))), found) if names else None

    def _find(self, piece: Piece, literal: bool) -> Iterator[tuple[str, str]]:
        """(kind, string) over a piece; kind is empty for text between names."""
        finder = self._finders[not piece.field, literal]
        begin = 0
        for match in finder[0].finditer(piece.text) if finder else ():
            yield "", piece.text[begin : match.start()]
            yield finder[1][match[0]], match[0]  # type: ignore[index]
            begin = match.end()
        yield "", piece.text[begin:]

    def _tokenise(self, pieces: Iterable[Piece], literal: bool) -> _Line:
        """Neighbours that are trained alike are tokenised together, up to special tokens and images."""
        line, after = _Line(), ""
        for trained, group in groupby(pieces, key=lambda piece: piece.trained):
            line.front = len(line.ids) if trained and line.front is None else line.front
            run, skip_space = "", False
            for piece in group:
                for kind, string in [*self._find(piece, literal), *([(TOKEN, self.tokenizer.eos)] if piece.eos else [])]:
                    if not kind:
                        run += string.lstrip() if skip_space else string
                        skip_space = skip_space and not run
                        continue
                    if kind == BREAK:
                        after = self._flush(line, run + string[0], after, trained)
                        run = string[1:]
                        continue
                    lstrip, rstrip = self._eats.get(string, (False, False)) if kind == TOKEN else (False, False)
                    after = self._flush(line, run.rstrip() if lstrip else run, after, trained)
                    run, skip_space = "", rstrip
                    if kind == TOKEN:
                        line.add([self._id(string)], trained)
                        after = "special"
                    else:
                        line.at += [len(line.ids)] if self.layout.image_size else []
                        line.add([] if self._mark is None else [self._mark], False)
                        after = "special" if line.ids else after
            after = self._flush(line, run, after, trained)
        return line

    def _flush(self, line: _Line, run: str, after: str, trained: bool) -> str:
        if not run:
            return after
        line.add(self.tokenizer.encode(run, after), trained)
        return "text"

    def _id(self, name: str) -> int:
        found = self.tokenizer.token_id(name)
        assert found is not None, name
        return found

    # ---- whole texts -----------------------------------------------------------------------------

    def _pieces(self, text: Text) -> list[Piece]:
        pieces = self.template.pieces(text, text.system or self.cfg.system)
        if text.leading:
            first = next(k for k, piece in enumerate(pieces) if piece.field == "prompt")
            pieces.insert(first, Piece(self.cfg.image_placeholder * text.leading, False))
        if text.blind:
            last = [k for k, piece in enumerate(pieces) if piece.field == "answer"][text.blind - 1]
            end = next(k for k in range(last, len(pieces)) if not pieces[k].trained)
            pieces[:end] = [piece._replace(text=piece.text.replace(self.cfg.image_placeholder, "")) for piece in pieces[:end]]
        return pieces

    def _begin(self, line: _Line) -> _Line:
        """``line`` with the token that it starts with. Where nothing is read before the answer, and there is
        no BOS, that is EOS: the first answer token needs one before it, if it is trained.
        """
        alone = self.template.bare and bool(line.ids)
        bare = not line.front and not alone
        start = self.tokenizer.start_id if self.template.bos else None
        if bare or self.template.own_bos:
            start = self.tokenizer.bos_id
        if start is None and bare:
            start = self.tokenizer.eos_id
        if start is None:
            return _Line(line.ids, [False, *line.trained[1:]], line.at, line.front) if alone else line
        lead = self._lead(line)
        return _Line([start, *line.ids], [False, *line.trained], [0] * lead + [k + 1 for k in line.at[lead:]], line.front)

    def _lead(self, line: _Line) -> int:
        """Images that come before anything else."""
        return sum(k == 0 for k in line.at) if self._mark is None else 0

    def _open(self, prompt: str | Text, check: bool) -> _Line:
        """A text up to its last answer; with ``check``, what the template adds to the answer must be possible
        to generate.
        """
        text = prompt if isinstance(prompt, Text) else Text(prompt, "")
        pieces = self._pieces(text)
        answer = max(k for k, piece in enumerate(pieces) if piece.field == "answer")
        start = answer
        while start and pieces[start - 1].trained:
            start -= 1
        name = self.cfg.image_placeholder
        opening = "".join(piece.text for piece in pieces[start:answer])
        count = 0
        while opening.startswith(name * (count + 1)):
            count += 1
        rest = [opening[count * len(name) :], *(piece.text for piece in pieces[answer + 1 :] if piece.trained)]
        if check and any(name in part for part in rest):
            key, template = (
                ("answer_template", self.cfg.answer_template) if self.cfg.template == "prompt" else ("turns", self.cfg.turns.answer)
            )
            raise InputError(f"data.{key} = {template!r}: {name!r} after text cannot be generated")
        return self._begin(self._tokenise([*pieces[:start], Piece(name * count, True)], text.leading is not None))

    def _line(self, text: Text) -> _Line:
        """A whole text, up to its last trained token: nothing is learnt from what follows."""
        literal, name = text.leading is not None, self.cfg.image_placeholder
        for number, (_, answer) in enumerate(text.turns, 1):
            if not (answer if literal else answer.replace(name, "")).strip():
                raise SampleError("empty answer" if len(text.turns) == 1 else f"empty answer in turn {number}")
        try:
            line = self._begin(self._tokenise(self._pieces(text), literal))
        except InputError as error:
            raise SampleError(str(error)) from None
        length = len(line.ids) - line.trained[::-1].index(True)
        if all(k < length for k in line.at):
            line.ids, line.trained = line.ids[:length], line.trained[:length]
        return line

    def _shorten(self, text: Text) -> tuple[_Line, int]:
        """A text as a line, with ``data.truncate`` cut to what fits; and the images that come before anything
        else.

        Whole turns go first, the last ones; then the end of the only answer that is left, in front of the
        token that ends it. Where that would take an image, or leave no answer, nothing is cut, and the text
        is too long.
        """
        whole = line = self._line(text)
        room = self.layout.max_text_len
        if self.cfg.truncate:
            if len(line.ids) > room and text.more and not self.template.by_turn:
                text = replace(text, more=text.more[: self._turns_that_fit(text)])
                line = self._line(text)
            keep = min(room, len(line.ids)) - 1
            if keep < len(line.ids) - 1 and keep > 0 and all(line.trained[keep - 1 :]) and all(k <= keep for k in line.at):
                line = _Line([*line.ids[:keep], line.ids[-1]], [*line.trained[:keep], True], line.at)
            if len(line.ids) > room or len(line.at) < len(whole.at):
                line = whole
        return line, self._lead(line)

    def _words(self, line: _Line, lead: int) -> TextTokens:
        if self.template.fills:
            line.add([self.tokenizer.pad_id] * (self.layout.max_text_len - len(line.ids)), False)
        trained = np.array(line.trained)
        seen_late = [k for k in line.at if k < len(line.ids)]
        if self._needs_token_after and trained[seen_late].any():
            raise SampleError(f"an image is right before a trained token, and no position could see it and predict that: {self._remedy}")
        return TextTokens.of(line.ids, trained, tuple(line.at), lead)

    def _window(self, ids: tuple[int, ...]) -> TextTokens:
        if len(ids) < 2:
            raise SampleError(f"a window of {len(ids)} tokens: nothing to predict")
        table = np.empty((5, len(ids) - 1), dtype=np.int64)
        table[INPUT_IDS], table[LABELS] = ids[:-1], ids[1:]
        table[POSITIONS] = np.arange(len(ids) - 1)
        table[TEXT_IDS], table[KINDS] = 1, Kind.ANSWER
        return TextTokens(table)
