"""Exact match of generated answers, with the images and without them ("blind"): a model that does not look is visible at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat
from typing import Protocol

import numpy as np
import torch

from kempnerforge.config import EvalConfig
from kempnerforge.data.collate import prompt_batch
from kempnerforge.data.encode import Encoder
from kempnerforge.data.images import load_image
from kempnerforge.data.interleave import Prompt
from kempnerforge.data.sample import ImageSource, SampleError, Source, render_answer
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
class Question:
    """One text of a held-out sample."""

    sample_id: str
    images: tuple[ImageSource, ...]
    prompt: str
    truth: str
    written: str = ""
    part: int = 0

    @property
    def unseen(self) -> tuple[str, int, int]:
        """What is left of the question when nobody looks: the prompt and its templates, and how many images there are."""
        return self.prompt, self.part, len(self.images)


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
    """Counts over all ranks; ``answers`` are this rank's alone."""

    right: int
    total: int
    by_truth: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def exact_match(self) -> float:
        return self.right / max(1, self.total)


def _plain(text: str) -> str:
    return " ".join(text.split())


def questions(source: Source, limit: int = 0) -> tuple[list[Question], list[tuple[str, str]]]:
    """The texts of ``source``, at most ``limit`` (0: all) spread evenly over it, and (sample id, reason) of what cannot be asked: samples that
    cannot be read, and answers with images in them, which no model here writes.
    """
    found, skipped = [], []
    for index in range(len(source)):
        try:
            sample = source[index]
        except SampleError as error:
            skipped.append((str(index), str(error)))
            continue
        section = source.cfg.sections()[sample.part]
        for text in sample.texts:
            if isinstance(text.answer, str) and section.image_placeholder in text.answer:
                skipped.append((sample.id, "the answer holds images, which cannot be generated"))
            elif isinstance(text.answer, str):
                written = render_answer(section, text.answer)
                found.append(Question(sample.id, sample.images, text.prompt, text.answer, written, sample.part))
    if limit and len(found) > limit:
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found, skipped


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

    With ``blind`` all images are the same grey, so every distinct prompt is answered once for each number of images. What cannot be read
    is skipped and counted.

    Raises:
        ValueError: nothing can be read.
    """
    mine = list(asked[ranks.rank :: ranks.size])
    work = list({q.unseen: q for q in mine}.values()) if blind else mine
    chunks = [list(work[i : i + cfg.batch_size]) for i in range(0, len(work), cfg.batch_size)]
    rounds = int(max(_gather(len(chunks), ranks)))
    texts: dict[Question | tuple[str, int, int], str] = {}
    skipped: list[tuple[str, str]] = []
    with mode(model, training=False):
        for chunk in islice(chain(chunks, repeat([])), rounds):
            texts.update(_answer(model, chunk, encoder, cfg, ranks, device, blind, skipped))
    answers = [Answer(q, texts[q.unseen if blind else q]) for q in mine if (q.unseen if blind else q) in texts]
    score = _score(answers, ranks, skipped)
    if asked and not score.total:
        reason = f"; the first: {skipped[0][1]}" if skipped else ""
        raise ValueError(f"eval: none of {len(asked)} held-out questions can be read{reason}")
    return score


def question_only_prior(train: Sequence[Question], asked: Sequence[Question]) -> float:
    """Exact match of the best guess without an image: for each prompt (and number of images) its most frequent answer in training, else
    that of all prompts.
    """
    by_prompt: dict[tuple[str, int, int], Counter[str]] = defaultdict(Counter)
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


def _answer(
    model: torch.nn.Module,
    chunk: list[Question],
    encoder: Encoder,
    cfg: EvalConfig,
    ranks: Ranks,
    device: torch.device,
    blind: bool,
    skipped: list[tuple[str, str]],
) -> dict[Question | tuple[str, int, int], str]:
    """What the model writes to the questions of ``chunk`` that can be read. Without any it is asked nothing, about a blank image, as all
    ranks must call it equally often.
    """
    size = encoder.layout.image_size
    prompts, rows, places = [], [], []
    pictures = _Pictures(size)
    for question in chunk:
        try:
            prompt = encoder.encode_prompt(question.prompt, len(question.images), question.part)
            places.append([pictures.place(None if blind else image) for image in question.images] if size else [])
        except ValueError as error:
            skipped.append((question.sample_id, str(error)))
            continue
        prompts.append(prompt)
        rows.append(question)
    if not rows:
        prompts, places = [Prompt([encoder.tokenizer.eos_id], (0,) if size else ())], [[pictures.place(None)] if size else []]
    batch = prompt_batch(prompts, pictures.stack(), places, encoder.layout, encoder.tokenizer.pad_id).to(device)
    made = generate(
        model,
        batch,
        max_new_tokens=cfg.max_new_tokens,
        eos_id=encoder.tokenizer.eos_id,
        sampling=Sampling(),
        all_done=lambda done: ranks.sum([float(not done)])[0] == 0,
    )
    decoded = [encoder.tokenizer.decode(ids) for ids in made]
    return {(q.unseen if blind else q): text for q, text in zip(rows, decoded, strict=bool(rows))}


class _Pictures:
    """The distinct images of a chunk, each decoded once; None is the blank one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._places: dict[ImageSource | None, int] = {}
        self._pixels: list[np.ndarray] = []

    def place(self, image: ImageSource | None) -> int:
        """Index of ``image`` in ``stack``."""
        if image not in self._places:
            blank = np.full((self.size, self.size, 3), BLANK, np.uint8)
            self._pixels.append(blank if image is None else load_image(image, self.size))
            self._places[image] = len(self._pixels) - 1
        return self._places[image]

    def stack(self) -> torch.Tensor | None:
        """(N, 3, H, W) uint8; None where the job has no images."""
        if not self.size:
            return None
        shape = (0, self.size, self.size, 3)
        return torch.from_numpy(np.stack(self._pixels) if self._pixels else np.zeros(shape, np.uint8)).permute(0, 3, 1, 2)


def _score(answers: list[Answer], ranks: Ranks, skipped: list[tuple[str, str]]) -> Score:
    groups: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for answer in answers:
        groups[answer.question.truth][0] += answer.right
        groups[answer.question.truth][1] += 1
    right, total = ranks.sum([sum(g[0] for g in groups.values()), sum(g[1] for g in groups.values())])
    return Score(int(right), int(total), {k: (r, n) for k, (r, n) in sorted(groups.items())}, answers, skipped)
