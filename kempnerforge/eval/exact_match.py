"""Exact match of generated answers, with the images and without them ("blind"): a model that does not look is visible at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch

from kempnerforge.config import EvalConfig
from kempnerforge.data.batching.collate import prompt_batch
from kempnerforge.data.sample import ImageSource, SampleError, Text
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Block, Prompt
from kempnerforge.eval.generate import Sampling, generate
from kempnerforge.eval.mode import mode
from kempnerforge.eval.questions import Question, Truth, Truths, plain
from kempnerforge.util.errors import InputError

BLANK = 128
"""The value of a blank image: mid-grey, which is 0 after the usual normalisation."""


class Ranks(Protocol):
    """What evaluation must know of the processes it is spread over. It calls ``sum`` for each token and each batch:
    what that raises, on all ranks, breaks it off.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, values: Sequence[float]) -> list[float]: ...

    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Answer:
    """A question and what the model wrote.

    Attributes:
        number: of the question among those that were asked.
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
        return plain(self.text) in (self.truth.text, *self.truth.others)


@dataclass(frozen=True)
class Score:
    """What was asked, over all ranks; every count is one over the answers.

    Attributes:
        asked: all questions, in their order.
        answers: to those that could be asked, in the same order.
        unreadable: number of a question -> why it could not be asked.
    """

    asked: Sequence[Question]
    answers: list[Answer]
    unreadable: dict[int, str]

    @property
    def total(self) -> int:
        return len(self.answers)

    @cached_property
    def right(self) -> int:
        return sum(answer.right for answer in self.answers)

    @property
    def exact_match(self) -> float:
        return self.right / max(1, self.total)

    @property
    def too_long(self) -> int:
        """Questions among ``total`` whose true answer cannot be written whole."""
        return sum(answer.too_long for answer in self.answers)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(sample id, reason) of the questions that could not be asked."""
        return [(self.asked[number].sample_id, reason) for number, reason in self.unreadable.items()]

    @cached_property
    def by_truth(self) -> dict[str, tuple[int, int]]:
        """(right, total) of the questions with this answer, as the tokenizer writes it."""
        return self._by(lambda answer: answer.truth.text)

    @cached_property
    def by_kind(self) -> dict[str, tuple[int, int]]:
        """(right, total) of the questions of this kind, where they have one."""
        return {kind: counts for kind, counts in self._by(lambda answer: answer.question.kind).items() if kind}

    def _by(self, key: Callable[[Answer], str]) -> dict[str, tuple[int, int]]:
        groups: dict[str, list[bool]] = defaultdict(list)
        for answer in self.answers:
            groups[key(answer)].append(answer.right)
        return {name: (sum(right), len(right)) for name, right in sorted(groups.items())}


def evaluate(
    model: torch.nn.Module,
    asked: Sequence[Question],
    encoder: Encoder,
    cfg: EvalConfig,
    ranks: Ranks,
    device: torch.device,
    *,
    blind: bool = False,
) -> Score:
    """Generates an answer to every question and compares it with the truth, both as the tokenizer writes them, white space normalised.

    With ``blind`` all views are the same grey, so every distinct prompt is answered once for each number of images (and, where it depends on
    an image's size how many views it has, for each of these). What cannot be read is skipped and counted.

    Raises:
        ValueError: nothing can be read.
    """
    truths, true = Truths(encoder), dict[int, Truth]()
    keys, reasons = dict[int, Hashable](), dict[int, str]()
    for number in range(ranks.rank, len(asked), ranks.size):
        try:
            true[number] = truths.of(asked[number])
            keys[number] = _key(asked[number], encoder) if blind else number
        except InputError as error:
            reasons[number] = str(error)
    work = {key: asked[number] for number, key in keys.items()}
    chunks = _chunks(list(work.items()), encoder, cfg.batch_size)
    rounds = max(ranks.gather(len(chunks)))
    texts, failed = dict[Hashable, str](), dict[Hashable, str]()
    with mode(model, training=False):
        for chunk in islice(chain(chunks, repeat([])), rounds):
            texts.update(_answer(model, chunk, encoder, cfg, ranks, device, blind, failed))
    mine = {number: (texts[key], true[number]) for number, key in keys.items() if key in texts}
    reasons |= {number: failed[key] for number, key in keys.items() if key in failed}
    answered, unreadable = dict[int, tuple[str, Truth]](), dict[int, str]()
    for theirs, why in ranks.gather((mine, reasons)):
        answered |= theirs
        unreadable |= why
    answers = [
        Answer(asked[number], number, text, truth, truth.tokens > cfg.max_new_tokens) for number, (text, truth) in sorted(answered.items())
    ]
    unreadable = dict(sorted(unreadable.items()))
    if asked and not answers:
        reason = f"; the first: {next(iter(unreadable.values()))}" if unreadable else ""
        raise InputError(f"eval: none of {len(asked)} held-out questions can be read{reason}")
    return Score(asked, answers, unreadable)


def _chunks(work: list[tuple[Hashable, Question]], encoder: Encoder, size: int) -> list[list[tuple[Hashable, Question]]]:
    """At most ``size`` at once, and together only those whose answers end in the same tokens."""
    by_end: dict[frozenset[int], list[tuple[Hashable, Question]]] = defaultdict(list)
    for key, question in work:
        by_end[encoder.stops(question.part)].append((key, question))
    return [group[i : i + size] for group in by_end.values() for i in range(0, len(group), size)]


def question_only_prior(train: Sequence[Question], asked: Sequence[Question], encoder: Encoder) -> float:
    """Exact match of the best guess without an image: for each prompt (and number of images) its most frequent answer in training, else
    that of all prompts. Answers are told apart as the tokenizer writes them.
    """
    truths, overall = Truths(encoder), Counter[str]()
    by_prompt: dict[tuple[str | Text, int, int], Counter[str]] = defaultdict(Counter)
    for question in train:
        with suppress(SampleError):  # nor is it trained on
            truth = truths.of(question).text
            by_prompt[question.unseen][truth] += 1
            overall[truth] += 1
    if not overall or not asked:
        return 0.0
    guess = {prompt: answers.most_common(1)[0][0] for prompt, answers in by_prompt.items()}
    fallback = overall.most_common(1)[0][0]
    return sum(guess.get(q.unseen, fallback) == truths.of(q).text for q in asked) / len(asked)


def _key(question: Question, encoder: Encoder) -> Hashable:
    """What two questions share that cannot be told apart without looking."""
    return question.unseen, tuple(encoder.images[question.part].blocks(question.images))


def _answer(
    model: torch.nn.Module,
    chunk: list[tuple[Hashable, Question]],
    encoder: Encoder,
    cfg: EvalConfig,
    ranks: Ranks,
    device: torch.device,
    blind: bool,
    failed: dict[Hashable, str],
) -> dict[Hashable, str]:
    """By its key, what the model writes to each question of ``chunk`` that can be read; ``failed`` gets why the others cannot. Without any it is
    asked nothing, about a blank image, as all ranks must call it equally often.
    """
    size = encoder.layout.image_size
    prompts, keys, places = [], [], []
    pictures = _Pictures(encoder)
    for key, question in chunk:
        try:
            prompt = encoder.encode_question(question.asked, question.images, question.part)
            pairs = zip(question.images, prompt.blocks, strict=True) if size else ()
            places.append([place for image, block in pairs for place in pictures.places(None if blind else image, block, question.part)])
        except InputError as error:
            failed[key] = str(error)
            continue
        prompts.append(prompt)
        keys.append(key)
    if not keys:
        prompts, places = [Prompt([encoder.tokenizer.eos_id], (0,) if size else ())], [[pictures.blank()] if size else []]
    batch = prompt_batch(prompts, pictures.stack(), places, encoder.layout, encoder.tokenizer.pad_id).to(device)
    made = generate(
        model,
        batch,
        max_new_tokens=cfg.max_new_tokens,
        eos_id=encoder.stops(chunk[0][1].part if chunk else 0),
        sampling=Sampling(),
        all_done=lambda done: ranks.sum([float(not done)])[0] == 0,
    )
    return {key: encoder.tokenizer.decode(ids) for key, ids in zip(keys, made, strict=bool(keys))}


class _Pictures:
    """The distinct views of a chunk, those of an image made once; None is the blank image."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.size = encoder, encoder.layout.image_size
        self._places: dict[tuple[ImageSource, int] | None, list[int]] = {}
        self._pixels: list[np.ndarray] = []

    def places(self, image: ImageSource | None, block: Block, part: int) -> list[int]:
        """Indices of an image's views in ``stack``; of the blank one for each view if there is no image."""
        if image is None:
            return [self.blank()] * len(block.starts)
        if (image, part) not in self._places:
            self._places[image, part] = self._add(self.encoder.images[part].load(image, len(block.starts)))
        return self._places[image, part]

    def blank(self) -> int:
        """Index of the blank view."""
        if None not in self._places:
            self._places[None] = self._add([np.full((self.size, self.size, 3), BLANK, np.uint8)])
        return self._places[None][0]

    def _add(self, views: list[np.ndarray]) -> list[int]:
        self._pixels += views
        return list(range(len(self._pixels) - len(views), len(self._pixels)))

    def stack(self) -> torch.Tensor | None:
        """(N, 3, H, W) uint8; None where the job has no images."""
        if not self.size:
            return None
        shape = (0, self.size, self.size, 3)
        return torch.from_numpy(np.stack(self._pixels) if self._pixels else np.zeros(shape, np.uint8)).permute(0, 3, 1, 2)
