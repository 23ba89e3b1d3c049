"""Answers of a model to held-out questions, with images or blind; tasks that ask the same share them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import torch

from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.eval.embeddings import image_features
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.generate import Sampling, generate
from kempnerforge.eval.mode import mode
from kempnerforge.eval.pictures import Pictures
from kempnerforge.eval.questions import Question, Truth, Truths, plain
from kempnerforge.eval.shots import feature_key
from kempnerforge.util.errors import InputError


class Cut(str):
    """An answer that ended at the limit of its length, not with an end token."""


class Drawn(str):
    """An answer that is a picture; the text says what is on it.

    Attributes:
        picture: (H, W, 3) uint8, RGB.
    """

    picture: np.ndarray

    @classmethod
    def of(cls, text: str, picture: np.ndarray) -> Drawn:
        made = cls(text)
        made.picture = picture
        return made


@dataclass(frozen=True)
class Answer:
    """A question and what the model wrote.

    Attributes:
        number: of the question among the held-out ones.
        text: a ``Cut`` if the model did not end it.
        truth: what is right, as the tokenizer writes it.
        too_long: that takes more tokens than an answer may have.
    """

    question: Question
    number: int
    text: str
    truth: Truth
    too_long: bool

    @property
    def right(self) -> bool:
        """Whether it is a right answer, as the tokenizer writes them, white space normalised."""
        return plain(self.text) in (self.truth.text, *self.truth.others)


@dataclass(frozen=True)
class Answers:
    """What was asked, over all ranks; every count is one over the answers.

    Attributes:
        asked: all questions by their number among the held-out ones, ascending.
        answers: to those that could be asked, in the same order.
        unreadable: number of a question -> why it could not be asked.
    """

    asked: Mapping[int, Question]
    answers: list[Answer]
    unreadable: dict[int, str]

    @property
    def total(self) -> int:
        return len(self.answers)

    @property
    def too_long(self) -> int:
        """Questions among ``total`` whose true answer cannot be written whole."""
        return sum(answer.too_long for answer in self.answers)

    @property
    def cut(self) -> int:
        """Answers among ``total`` that the model did not end within the limit of their length."""
        return sum(isinstance(answer.text, Cut) for answer in self.answers)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(sample id, reason) of the questions that could not be asked."""
        return [(self.asked[number].sample_id, reason) for number, reason in self.unreadable.items()]


def ask(exam: Exam, asked: Mapping[int, Question], *, blind: bool = False, max_new_tokens: int = 0) -> Answers:
    """The model's answer to every question. What cannot be read is left out, with the reason. Questions that
    this exam has asked before, in the same words, are not asked again.

    Args:
        asked: questions by their number among the held-out ones.
        blind: all views are the same grey, of examples as well, so every distinct prompt is answered once for
            each number of images and of their views.
        max_new_tokens: of one answer; 0: ``eval.max_new_tokens``.

    Raises:
        InputError: nothing can be read.
    """
    most = max_new_tokens or exam.cfg.max_new_tokens
    keys = {number: (number, question, blind, most) for number, question in asked.items()}
    if missing := {number: question for number, question in asked.items() if keys[number] not in exam.answered}:
        _look_for_examples(exam, missing)
        key = (lambda question: _key(_as_prompted(question, exam), exam.encoder)) if blind else None
        found = spread(exam, missing, lambda chunk, failed: write_answers(exam, chunk, blind, most, failed), most, key)
        exam.answered |= {keys[number]: answer for number, answer in found.items()}
    return answers_of(asked, {number: exam.answered[key] for number, key in keys.items()})


def answers_of(asked: Mapping[int, Question], found: Mapping[int, Answer | str]) -> Answers:
    """What ``spread`` has found, as ``Answers``.

    Raises:
        InputError: nothing can be read.
    """
    answers = [answer for number in asked if isinstance(answer := found[number], Answer)]
    unreadable = {number: why for number in asked if isinstance(why := found[number], str)}
    if asked and not answers:
        raise InputError(f"eval: none of {len(asked)} held-out questions can be read; the first: {next(iter(unreadable.values()))}")
    return Answers(asked, answers, unreadable)


def spread(
    exam: Exam,
    asked: Mapping[int, Question],
    write: Callable[[list[tuple[Hashable, Question]], dict[Hashable, str]], dict[Hashable, str]],
    max_new_tokens: int,
    key: Callable[[Question], Hashable] | None = None,
) -> dict[int, Answer | str]:
    """Shares questions out over the ranks, each to one of them, and gathers the answers.

    Args:
        asked: questions by number.
        write: takes at most ``eval.batch_size`` (key, question) whose answers end in the same tokens, and
            returns the answers by key; it puts into its second argument why a question cannot be asked. NOTE:
            it is called equally often on all ranks, without a question where a rank has none left, and must
            call the model then as well.
        max_new_tokens: a true answer with more tokens is too long.
        key: questions with the same key are asked once; None: each is asked.

    Returns:
        By number, the answer or why there is none.
    """
    encoder, ranks = exam.encoder, exam.ranks
    truths, true = Truths(encoder), dict[int, Truth]()
    keys, reasons = dict[int, Hashable](), dict[int, str]()
    for number in [*asked][ranks.rank :: ranks.size]:
        try:
            true[number] = truths.of(asked[number])
            keys[number] = key(asked[number]) if key is not None else number
        except InputError as error:
            reasons[number] = str(error)
    work = {key: asked[number] for number, key in keys.items()}
    chunks = _chunks(list(work.items()), encoder, exam.cfg.batch_size)
    rounds = max(ranks.gather(len(chunks)))
    texts, failed = dict[Hashable, str](), dict[Hashable, str]()
    with mode(exam.model, training=False):
        for chunk in islice(chain(chunks, repeat([])), rounds):
            texts.update(write(chunk, failed))
    mine = {number: (texts[key], true[number]) for number, key in keys.items() if key in texts}
    reasons |= {number: failed[key] for number, key in keys.items() if key in failed}
    found = dict[int, Answer | str]()
    for theirs, why in ranks.gather((mine, reasons)):
        found |= {
            number: Answer(asked[number], number, text, truth, truth.tokens > max_new_tokens) for number, (text, truth) in theirs.items()
        } | why
    return found


def _chunks(work: list[tuple[Hashable, Question]], encoder: Encoder, size: int) -> list[list[tuple[Hashable, Question]]]:
    """At most ``size`` at once, and together only those whose answers end in the same tokens."""
    by_end: dict[frozenset[int], list[tuple[Hashable, Question]]] = defaultdict(list)
    for key, question in work:
        by_end[encoder.stops(question.part)].append((key, question))
    return [group[i : i + size] for group in by_end.values() for i in range(0, len(group), size)]


def _look_for_examples(exam: Exam, asked: Mapping[int, Question]) -> None:
    """Measures the images by which ``eval.shots`` are chosen, where that is not done yet."""
    shots = exam.shots
    if shots is None or not shots.by_similarity:
        return
    if shots.known is None:
        found = image_features(exam, dict(enumerate(shots.pool)))
        numbers = sorted(found)
        shots.known = numbers, torch.stack([found[number] for number in numbers]) if numbers else torch.zeros(0, 0)
    new = {key: question for question in asked.values() if (key := feature_key(question)) not in shots.features}
    shots.features |= image_features(exam, new)


def _as_prompted(question: Question, exam: Exam) -> Question:
    return question if exam.shots is None else exam.shots.before(question)


def _key(question: Question, encoder: Encoder) -> Hashable:
    """What two questions share that cannot be told apart without looking."""
    return question.unseen, tuple(encoder.images[question.part].blocks(question.images))


def write_answers(
    exam: Exam,
    chunk: list[tuple[Hashable, Question]],
    blind: bool,
    most: int,
    failed: dict[Hashable, str],
    sampling: Sampling | None = None,
) -> dict[Hashable, str]:
    """By key, what the model writes to the questions of ``chunk`` that can be read; ``failed`` gets why the
    others cannot. Without any the model reads an end token and a blank image, as all ranks must call it
    equally often.
    """
    encoder, ranks = exam.encoder, exam.ranks
    size = encoder.layout.image_size
    prompts, keys, places = [], [], []
    pictures = Pictures(encoder)
    for key, question in chunk:
        try:
            question = _as_prompted(question, exam)
            prompt = encoder.encode_question(question.asked, question.images, question.part)
            if exam.shots is not None:
                exam.shots.check(prompt, most)
            pairs = zip(question.images, prompt.blocks, strict=True) if size else ()
            places.append([place for image, block in pairs for place in pictures.places(None if blind else image, block, question.part)])
        except InputError as error:
            failed[key] = str(error)
            continue
        prompts.append(prompt)
        keys.append(key)
    if not keys:
        prompts, places = [Prompt([encoder.tokenizer.eos_id], (0,) if size else ())], [[pictures.blank()] if size else []]
    batch = prompt_batch(prompts, pictures.stack(), places, encoder.layout, encoder.tokenizer.pad_id).to(exam.device)
    made = generate(
        exam.model,
        batch,
        max_new_tokens=most,
        eos_id=encoder.stops(chunk[0][1].part if chunk else 0),
        sampling=sampling or Sampling(beams=exam.cfg.beams, length_penalty=exam.cfg.length_penalty),
        all_done=lambda done: ranks.sum([float(not done)])[0] == 0,
    )
    texts = {key: (len(ids), encoder.tokenizer.decode(ids)) for key, ids in zip(keys, made, strict=bool(keys))}
    return {key: Cut(text) if tokens == most else text for key, (tokens, text) in texts.items()}
