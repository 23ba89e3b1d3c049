"""Held-out data as questions, examined before any is asked: unreadable samples, answers that are too long."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kempnerforge.config import EvalConfig
from kempnerforge.config.model import BEGIN_PICTURE
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.images.decode import opened
from kempnerforge.data.sample import ImageSource, Sample, SampleError, Text
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.template import render_answer
from kempnerforge.util.errors import InputError

PICTURES, DECODED = 2000, 200
"""Samples whose image headers are read before training, drawn at random; how many of them are decoded."""


@dataclass(frozen=True)
class Images(Sequence[ImageSource]):
    """The first ``shown`` images of sample ``number``, read when needed: images of a shard are bytes."""

    source: Source = field(compare=False, repr=False)
    number: int
    shown: int

    def __len__(self) -> int:
        return self.shown

    def __getitem__(self, index: Any) -> Any:
        return self.source[self.number].images[: self.shown][index]

    def __iter__(self) -> Iterator[ImageSource]:
        return iter(self[:])


@dataclass(frozen=True)
class Question:
    """One answer of a held-out sample, asked for.

    Attributes:
        prompt: its turn's.
        truth: the answer.
        written: the answer as the template writes it; empty: as ``truth``.
        part: the section of the data that it is from.
        conversation: all up to the question; None: ``prompt`` is all there is.
        kind: what is asked, for scores.
        references: further answers that are right, as often as they were given (VQA accuracy counts them).
    """

    sample_id: str
    images: Sequence[ImageSource]
    prompt: str
    truth: str
    written: str = ""
    part: int = 0
    conversation: Text | None = None
    kind: str = ""
    references: tuple[str, ...] = ()

    @property
    def asks_picture(self) -> bool:
        """Whether the answer is a picture, which tasks about texts leave out."""
        return self.truth.startswith(BEGIN_PICTURE)

    @property
    def given(self) -> tuple[str, ...]:
        """All answers that were given: ``truth``, then ``references``."""
        return self.truth, *self.references

    @property
    def also_right(self) -> list[str]:
        """The different ``references`` that are not ``truth``."""
        return [text for text in dict.fromkeys(self.references) if text != self.truth]

    @property
    def asked(self) -> str | Text:
        """What ``Encoder.encode_question`` takes."""
        return self.conversation or self.prompt

    @property
    def unseen(self) -> tuple[str | Text, int, int]:
        """The question without its images: the prompt, its templates, and how many images there are."""
        return self.asked, self.part, len(self.images)

    @property
    def answered(self) -> Text:
        """The conversation up to this question, and its true answer."""
        text = self.conversation or Text(self.prompt, "")
        if text.more:
            return replace(text, more=(*text.more[:-1], (text.more[-1][0], self.truth)))
        return replace(text, answer=self.truth)


def questions(source: Source) -> tuple[list[Question], list[tuple[str, str]]]:
    """A question for each answer of ``source``, turn by turn; and (sample id, reason) of what cannot be
    asked: samples that cannot be read, and answers with images in them, which no model here writes.
    """
    found: list[Question] = []
    skipped: list[tuple[str, str]] = []
    for index in range(len(source)):
        try:
            found += _of_sample(source, index, source[index], skipped)
        except SampleError as error:
            skipped.append((str(index), str(error)))
    return found, skipped


def _of_sample(source: Source, index: int, sample: Sample, skipped: list[tuple[str, str]]) -> list[Question]:
    section = source.cfg.sections()[sample.part]
    found = []
    for text in sample.texts:
        for turn, (prompt, answer) in enumerate(text.turns):
            if text.leading is None and section.image_placeholder in answer:
                skipped.append((sample.id, "the answer holds images, which cannot be generated"))
                continue
            written = render_answer(section, answer)
            images = Images(source, index, _shown(text, turn, section.image_placeholder, len(sample.images)))
            found.append(Question(sample.id, images, prompt, answer, written, sample.part, _up_to(text, turn), text.kind, text.references))
    return found


def _shown(text: Text, turn: int, placeholder: str, images: int) -> int:
    """Images that the question of ``turn`` has seen: where prompts say it, those up to it."""
    counts = [prompt.count(placeholder) + answer.count(placeholder) for prompt, answer in text.turns]
    return sum(counts[: turn + 1]) if text.leading is None and sum(counts) == images else images


def _up_to(text: Text, turn: int) -> Text | None:
    """``text`` up to the question of ``turn``; None: it is a prompt and nothing else."""
    if not turn:
        return replace(text, answer="", more=(), kind="") if text.system or text.leading is not None else None
    return replace(text, more=(*text.more[: turn - 1], (text.more[turn - 1][0], "")), kind="")


# ---- true answers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """A true answer in its template as the tokenizer writes it: an answer of the model is compared with it.

    Attributes:
        text: its white space normalised.
        tokens: that it takes, the one that ends it included.
        unknown: whether one of them is the token for unknown characters.
        others: texts of further answers that are right.
    """

    text: str
    tokens: int
    unknown: bool
    others: tuple[str, ...] = ()


class Truths:
    """Makes the ``Truth`` of questions, once for each that is told from others by its words."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._made: dict[Hashable, Truth] = {}

    def of(self, question: Question) -> Truth:
        """The truth of ``question``.

        Raises:
            SampleError: it cannot be written: it is empty, say.
        """
        key = question.asked, question.truth, question.part, question.references
        if key not in self._made:
            ids = self.encoder.texts[question.part].answer_ids(question.answered)
            tokenizer, others = self.encoder.tokenizer, list[str]()
            for reference in question.also_right:
                with contextlib.suppress(SampleError):  # one that cannot be written is no answer that could be given
                    others.append(self.of(replace(question, truth=reference, references=())).text)
            self._made[key] = Truth(plain(tokenizer.decode(ids)), len(ids) + 1, tokenizer.unknown_id in ids, tuple(others))
        return self._made[key]


def plain(text: str) -> str:
    """``text`` with its white space normalised."""
    return " ".join(text.split())


# ---- before anything is asked --------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """What is held out, as far as it shows without pixels.

    Attributes:
        source: where it is.
        samples: that were read.
        questions: all that can be asked.
        skipped: (sample id, reason) of what cannot.
        bad, looked: how many samples cannot be used, of how many: of those whose images were read, or of all,
            whichever share is larger.
        first: what is wrong with the first bad one.
        longest: tokens of the longest true answer that is text, its end included.
        too_long: questions whose true answer takes more than ``max_new_tokens``: no model can write it whole.
        unknown, empty: questions whose true answer has unknown characters; becomes nothing.
        merged: different true answers that the tokenizer writes alike, the first two in front.
    """

    source: Source
    samples: int
    questions: list[Question]
    skipped: list[tuple[str, str]]
    bad: int
    looked: int
    first: str
    max_new_tokens: int
    longest: int
    too_long: int
    unknown: int
    empty: int
    merged: list[str]

    def draw(
        self, limit: int, seed: int, wording: Callable[[Question], Question | None] = lambda question: question
    ) -> dict[int, Question]:
        """``limit`` questions at most, drawn by ``seed``, by their number among all; 0: all.

        Args:
            wording: a question as it is asked; None: it is not.
        """
        fitting = [(number, said) for number, question in enumerate(self.questions) if (said := wording(question)) is not None]
        return dict(fitting[at] for at in drawn(len(fitting), limit, seed))

    def require(self, max_bad_fraction: float) -> None:
        """Raises InputError if no sample can be used, or more than ``max_bad_fraction`` of them cannot."""
        if not self.samples:
            raise InputError("held-out data: no samples")
        if self.bad == self.looked or self.bad > max_bad_fraction * self.looked:
            raise InputError(
                f"held-out data: {self.bad} of {self.looked} samples cannot be read; the first: {self.first}. Mend them or take them out"
                + (f", or raise data.max_bad_fraction = {max_bad_fraction}" if self.bad < self.looked else "")
            )

    def counts(self) -> dict[str, int]:
        """What is said of it beside a score."""
        return {
            "samples": self.samples,
            "questions": len(self.questions),
            "unreadable": self.bad,
            "looked_at": self.looked,
            "too_long": self.too_long,
            "longest_answer": self.longest,
            "unknown_answers": self.unknown,
            "empty_answers": self.empty,
            "merged_answers": len(self.merged),
        }

    def summary(self) -> str:
        """Its counts in one line."""
        return (
            f"held out: {self.samples:,} samples, {len(self.questions):,} questions; of {self.looked:,} samples {self.bad:,} cannot be read;"
            f" {self.too_long:,} true answers take more than eval.max_new_tokens = {self.max_new_tokens} tokens, the longest {self.longest}"
        )

    def remarks(self) -> list[str]:
        """A line for each thing that keeps a score from being what it seems."""
        lines, asked = [], len(self.questions)
        if self.bad:
            lines.append(f"held-out data: {self.bad} of {self.looked} samples cannot be read; the first: {self.first}")
        elif self.skipped:
            lines.append(f"held-out data: {len(self.skipped)} answers cannot be asked for; the first: {self.skipped[0][1]}")
        if self.too_long:
            lines.append(
                f"held-out data: {self.too_long} of {asked} true answers take more than eval.max_new_tokens = {self.max_new_tokens} tokens, their"
                f" end included, and cannot be written whole; the longest takes {self.longest}"
            )
        if self.unknown or self.empty or self.merged:
            alike = f" ({', '.join(map(repr, self.merged[:2]))})" if self.merged else ""
            lines.append(
                f"held-out data: of {asked} true answers {self.unknown} have characters that the tokenizer does not know, {self.empty} become"
                f" nothing, and {len(self.merged)} different ones{alike} are written as others are; answers are compared as it writes them"
            )
        return lines


def examine(source: Source, encoder: Encoder, cfg: EvalConfig, *, chosen: Sequence[int] | None = None, pictures: int = PICTURES) -> HeldOut:
    """Reads what is held out: all rows and texts, and some pictures.

    Args:
        chosen: the samples that are read; None: all.
        pictures: samples whose pictures are looked at, drawn by the seed of ``encoder``.
    """
    chosen = range(len(source)) if chosen is None else chosen
    counts = pictures, min(pictures, DECODED)
    looked, decoded = ({chosen[at] for at in drawn(len(chosen), n, encoder.seed)} if n else set() for n in counts)
    found = _Found(encoder, loss=cfg.loss or not (cfg.exact_match or cfg.tasks))
    bad_rows = bad_looked = 0
    for index in chosen:
        bad = not found.read(source, index)
        bad_rows += bad
        bad_looked += index in looked and (bad or not found.look(source, index, index in decoded))
    bad, of = max((bad_rows, len(chosen)), (bad_looked, len(looked)), key=lambda pair: pair[0] / max(1, pair[1]))
    truths = [found.truths.of(question) for question in found.questions]
    sizes = [truth.tokens for question, truth in zip(found.questions, truths, strict=True) if not question.asks_picture]
    raw: dict[str, set[str]] = defaultdict(set)
    for question, truth in zip(found.questions, truths, strict=True):
        raw[truth.text].add(plain(question.written or question.truth))
    return HeldOut(
        source=source,
        samples=len(chosen),
        questions=found.questions,
        skipped=found.skipped,
        bad=bad,
        looked=of,
        first=found.first,
        max_new_tokens=cfg.max_new_tokens,
        longest=max(sizes, default=0),
        too_long=sum(size > cfg.max_new_tokens for size in sizes),
        unknown=sum(truth.unknown for truth in truths),
        empty=sum(not truth.text for truth in truths),
        merged=[text for texts in raw.values() if len(texts) > 1 for text in sorted(texts)],
    )


class _Found:
    """What has been read.

    Args:
        loss: samples have to fit into a row, too.
    """

    def __init__(self, encoder: Encoder, loss: bool) -> None:
        self.encoder, self.loss = encoder, loss
        self.truths = Truths(encoder)
        self.questions: list[Question] = []
        self.skipped: list[tuple[str, str]] = []
        self.first = ""
        self._asked: set[Hashable] = set()

    def read(self, source: Source, index: int) -> bool:
        """Reads a sample; whether all of it can be used."""
        try:
            sample = source[index]
        except SampleError as error:
            self._skip(str(index), error)
            return False
        asked = _of_sample(source, index, sample, self.skipped)
        usable = [question for question in asked if self._can_be_asked(question)]
        self.questions += usable
        if self.loss and not self.encoder.measure(sample)[0]:
            self.first = self.first or f"sample {sample.id}: cannot be encoded, or is too long for a row"
            return False
        return len(usable) == len(asked)

    def look(self, source: Source, index: int, decode: bool) -> bool:
        """Whether the images of a sample can be opened, and decoded. Its questions are asked nevertheless."""
        try:
            sample = source[index]
            for image in sample.images if self.encoder.layout.image_size else ():
                with opened(image, whole=decode) as picture:
                    picture.allow(self.encoder.images[sample.part].cfg.frames)
                    if decode:
                        picture.pixels((1, 1))
        except InputError as error:
            self.first = self.first or str(error)
            return False
        return True

    def _can_be_asked(self, question: Question) -> bool:
        try:
            self.truths.of(question)
            if question.unseen not in self._asked:
                self.encoder.encode_prompt(question.asked, len(question.images), question.part)
                self._asked.add(question.unseen)
        except InputError as error:
            self._skip(question.sample_id, error)
            return False
        return True

    def _skip(self, name: str, error: InputError) -> None:
        self.first = self.first or str(error)
        self.skipped.append((name, str(error)))
