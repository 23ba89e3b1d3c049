"""Exact match of generated answers, with the images and without them ("blind"): a model that does not look is visible at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from typing import Any, Protocol

import numpy as np
import torch

from kempnerforge.config import EvalConfig
from kempnerforge.config.errors import InputError
from kempnerforge.data.collate import prompt_batch
from kempnerforge.data.encode import Encoder
from kempnerforge.data.interleave import Block, Prompt
from kempnerforge.data.sample import ImageSource, SampleError, Source, Text, render_answer
from kempnerforge.eval.generate import Sampling, generate
from kempnerforge.eval.mode import mode

BLANK = 128
"""The value of a blank image: mid-grey, which is 0 after the usual normalisation."""


class Ranks(Protocol):
    """What evaluation must know of the processes it is spread over."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, values: Sequence[float]) -> list[float]: ...


@dataclass(frozen=True)
class Images(Sequence[ImageSource]):
    """The first ``shown`` images of sample ``number``, read again when they are needed: those of a shard are bytes."""

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
    """

    sample_id: str
    images: Sequence[ImageSource]
    prompt: str
    truth: str
    written: str = ""
    part: int = 0
    conversation: Text | None = None
    kind: str = ""

    @property
    def asked(self) -> str | Text:
        """What ``Encoder.encode_question`` takes."""
        return self.conversation or self.prompt

    @property
    def unseen(self) -> tuple[str | Text, int, int]:
        """What is left of the question when nobody looks: the prompt and its templates, and how many images there are."""
        return self.asked, self.part, len(self.images)


@dataclass(frozen=True)
class Answer:
    """A question and what the model wrote."""

    question: Question
    text: str

    @property
    def right(self) -> bool:
        return _plain(self.text) == _plain(self.question.written or self.question.truth)


@dataclass
class Score:
    """Counts over all ranks; ``by_truth`` and ``answers`` are this rank's alone.

    Attributes:
        by_truth, by_kind: (right, total) of the questions with this answer, of this kind.
    """

    right: int
    total: int
    by_truth: dict[str, tuple[int, int]] = field(default_factory=dict)
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def exact_match(self) -> float:
        return self.right / max(1, self.total)


def _plain(text: str) -> str:
    return " ".join(text.split())


def questions(source: Source, limit: int = 0) -> tuple[list[Question], list[tuple[str, str]]]:
    """The answers of ``source``, those of a conversation turn by turn, at most ``limit`` (0: all) spread evenly over it; and (sample id,
    reason) of what cannot be asked: samples that cannot be read, and answers with images in them, which no model here writes.
    """
    found: list[Question] = []
    skipped: list[tuple[str, str]] = []
    for index in range(len(source)):
        try:
            sample = source[index]
        except SampleError as error:
            skipped.append((str(index), str(error)))
            continue
        section = source.cfg.sections()[sample.part]
        for text in sample.texts:
            for turn, (prompt, answer) in enumerate(text.turns):
                if text.leading is None and section.image_placeholder in answer:
                    skipped.append((sample.id, "the answer holds images, which cannot be generated"))
                    continue
                written = render_answer(section, answer)
                so_far = _up_to(text, turn)
                images = Images(source, index, _shown(text, turn, section.image_placeholder, len(sample.images)))
                found.append(Question(sample.id, images, prompt, answer, written, sample.part, so_far, text.kind))
    if limit and len(found) > limit:
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found, skipped


def _shown(text: Text, turn: int, placeholder: str, images: int) -> int:
    """Images that the question of ``turn`` has seen: where prompts say it, those up to it."""
    counts = [prompt.count(placeholder) + answer.count(placeholder) for prompt, answer in text.turns]
    return sum(counts[: turn + 1]) if text.leading is None and sum(counts) == images else images


def _up_to(text: Text, turn: int) -> Text | None:
    """``text`` up to the question of ``turn``; None: it is a prompt and nothing else."""
    if not turn:
        return replace(text, answer="", more=(), kind="") if text.system or text.leading is not None else None
    return replace(text, more=(*text.more[: turn - 1], (text.more[turn - 1][0], "")), kind="")


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
    """Generates an answer to every question and compares it with the truth, both with their white space normalised.

    With ``blind`` all views are the same grey, so every distinct prompt is answered once for each number of images (and, where it depends on
    an image's size how many views it has, for each of these). What cannot be read is skipped and counted.

    Raises:
        ValueError: nothing can be read.
    """
    mine = list(asked[ranks.rank :: ranks.size])
    skipped: list[tuple[str, str]] = []
    keys = [_key(q, encoder, skipped) if blind else q for q in mine]
    work = list({key: q for key, q in zip(keys, mine, strict=True) if key is not None}.items())
    chunks = _chunks(work, encoder, cfg.batch_size)
    rounds = int(max(_gather(len(chunks), ranks)))
    texts: dict[Hashable, str] = {}
    with mode(model, training=False):
        for chunk in islice(chain(chunks, repeat([])), rounds):
            texts.update(_answer(model, chunk, encoder, cfg, ranks, device, blind, skipped))
    answers = [Answer(q, texts[key]) for key, q in zip(keys, mine, strict=True) if key in texts]
    score = _score(answers, ranks, skipped, sorted({q.kind for q in asked if q.kind}))
    if asked and not score.total:
        reason = f"; the first: {skipped[0][1]}" if skipped else ""
        raise InputError(f"eval: none of {len(asked)} held-out questions can be read{reason}")
    return score


def _chunks(work: list[tuple[Hashable, Question]], encoder: Encoder, size: int) -> list[list[tuple[Hashable, Question]]]:
    """At most ``size`` at once, and together only those whose answers end in the same token."""
    by_end: dict[int, list[tuple[Hashable, Question]]] = defaultdict(list)
    for key, question in work:
        by_end[encoder.end_id(question.part)].append((key, question))
    return [group[i : i + size] for group in by_end.values() for i in range(0, len(group), size)]


def question_only_prior(train: Sequence[Question], asked: Sequence[Question]) -> float:
    """Exact match of the best guess without an image: for each prompt (and number of images) its most frequent answer in training, else
    that of all prompts.
    """
    by_prompt: dict[tuple[str | Text, int, int], Counter[str]] = defaultdict(Counter)
    for question in train:
        by_prompt[question.unseen][_plain(question.truth)] += 1
    overall = Counter(_plain(question.truth) for question in train)
    if not overall or not asked:
        return 0.0
    guess = {prompt: answers.most_common(1)[0][0] for prompt, answers in by_prompt.items()}
    fallback = overall.most_common(1)[0][0]
    return sum(guess.get(q.unseen, fallback) == _plain(q.truth) for q in asked) / len(asked)


def _gather(value: float, ranks: Ranks) -> list[float]:
    """``value`` of every rank, in rank order."""
    return ranks.sum([value if rank == ranks.rank else 0.0 for rank in range(ranks.size)])


def _key(question: Question, encoder: Encoder, skipped: list[tuple[str, str]]) -> Hashable:
    """What two questions share that cannot be told apart without looking; None: this one cannot be asked."""
    try:
        return question.unseen, tuple(encoder.images[question.part].blocks(question.images))
    except SampleError as error:
        skipped.append((question.sample_id, str(error)))
        return None


def _answer(
    model: torch.nn.Module,
    chunk: list[tuple[Hashable, Question]],
    encoder: Encoder,
    cfg: EvalConfig,
    ranks: Ranks,
    device: torch.device,
    blind: bool,
    skipped: list[tuple[str, str]],
) -> dict[Hashable, str]:
    """By its key, what the model writes to each question of ``chunk`` that can be read. Without any it is asked nothing, about a blank image,
    as all ranks must call it equally often.
    """
    size = encoder.layout.image_size
    prompts, keys, places = [], [], []
    pictures = _Pictures(encoder)
    for key, question in chunk:
        try:
            prompt = encoder.encode_question(question.asked, question.images, question.part)
            pairs = zip(question.images, prompt.blocks, strict=True) if size else ()
            places.append([place for image, block in pairs for place in pictures.places(None if blind else image, block, question.part)])
        except ValueError as error:
            skipped.append((question.sample_id, str(error)))
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
        eos_id=encoder.end_id(chunk[0][1].part if chunk else 0),
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


def _score(answers: list[Answer], ranks: Ranks, skipped: list[tuple[str, str]], kinds: list[str]) -> Score:
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    of_kind = {kind: [0, 0] for kind in kinds}
    for answer in answers:
        for counts in (groups[answer.question.truth], of_kind.get(answer.question.kind, [0, 0])):
            counts[0] += answer.right
            counts[1] += 1
    totals = [sum(counts[k] for counts in groups.values()) for k in range(2)]
    right, total, *by_kind = map(int, ranks.sum([*totals, *(count for kind in kinds for count in of_kind[kind])]))
    pairs = dict(zip(kinds, zip(by_kind[::2], by_kind[1::2], strict=True), strict=True))
    return Score(right, total, {k: (r, n) for k, (r, n) in sorted(groups.items())}, pairs, answers, skipped)
