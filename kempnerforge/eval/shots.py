"""Examples with their answers in front of each question (Brown et al. 2020; with images: Alayrac et al. 2022,
section 3.3).

Shapes: P examples to choose from, E width of a feature.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from kempnerforge.config import EvalConfig
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.images.decode import opened
from kempnerforge.data.sample import Text
from kempnerforge.data.source import Source
from kempnerforge.data.text.encode import Encoder
from kempnerforge.data.text.interleave import Prompt
from kempnerforge.eval.questions import Question, examine
from kempnerforge.util.errors import InputError


@dataclass
class Shots:
    """The examples of each question: ``eval.shots`` of ``pool``, in the templates of the data, as earlier
    turns of one conversation.

    A question's own sample, and one that equals it, is never among them.

    Attributes:
        pool: P questions with true answers.
        room: positions that the model takes.
        known: numbers of the examples whose images have features, and these, (P, E); see ``image_features``.
        features: of the images of questions, (E,) each, by ``feature_key``.
    """

    cfg: EvalConfig
    encoder: Encoder
    pool: list[Question]
    room: int
    known: tuple[list[int], Tensor] | None = None
    features: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def by_similarity(self) -> bool:
        """Whether features are needed."""
        return self.cfg.shots_by == "similarity"

    def choose(self, question: Question) -> list[Question]:
        """The examples of ``question``, in the order of its prompt: drawn by the encoder's seed; or those
        with the most similar images, the most similar one last (RICES: Yang et al. 2022, in OpenFlamingo's
        order).

        Raises:
            InputError: there are not enough, or the question's images have no features.
        """
        if self.by_similarity:
            order = self._nearest(question)
        else:
            seed = zlib.crc32(repr((question.sample_id, question.asked, question.part)).encode(errors="surrogatepass"))
            order = np.random.default_rng((self.encoder.seed, seed)).permutation(len(self.pool)).tolist()
        chosen = list[Question]()
        for example in map(self.pool.__getitem__, order):
            chosen += [example] if example.part == question.part and not _same(example, question) else []
            if len(chosen) == self.cfg.shots:
                return chosen[::-1]
        pool = f"; eval.shots_pool = {self.cfg.shots_pool} samples are drawn, 0 takes all" if self.cfg.shots_pool else ""
        raise InputError(
            f"eval.shots = {self.cfg.shots}: there are {len(chosen)} examples for a question of sample {question.sample_id}{pool}"
        )

    def _nearest(self, question: Question) -> list[int]:
        assert self.known is not None
        if (own := self.features.get(feature_key(question))) is None:
            raise InputError('eval.shots_by = "similarity": the question has no image that can be read')
        numbers, features = self.known
        return [numbers[at] for at in (features @ own).argsort(descending=True, stable=True).tolist()]

    def before(self, question: Question) -> Question:
        """``question`` with its examples in front, and with their images in front of its own.

        Raises:
            InputError: see ``choose``.
        """
        chosen = self.choose(question)
        shown = chosen if self.cfg.shots_images else []
        asked = question.asked if isinstance(question.asked, Text) else Text(question.asked, "")
        examples = [turn for each in chosen for turn in self._placed(each.answered, each).turns]
        (prompt, answer), *more = [*examples, *self._placed(asked, question).turns]
        blind = 0 if self.cfg.shots_images else len(examples)
        conversation = Text(prompt, answer, tuple(more), asked.system, blind=blind)
        images = [image for each in (*shown, question) for image in each.images]
        return replace(question, images=images, conversation=conversation)

    def _placed(self, text: Text, question: Question) -> Text:
        """``text`` with its images in its own prompts: at the head, if it does not say where they are."""
        texts = self.encoder.texts[question.part]
        head = text.leading or 0
        if text.leading is None and not texts.count_placeholders(text):
            head = len(question.images)
        return replace(text, prompt=texts.cfg.image_placeholder * head + text.prompt, leading=None)

    def check(self, prompt: Prompt, max_new_tokens: int) -> None:
        """Raises InputError if the model has no room for ``prompt`` and an answer."""
        length = prompt.length(self.encoder.layout.image_tokens)
        if length + max_new_tokens > self.room:
            raise InputError(
                f"eval.shots = {self.cfg.shots}: a prompt takes {length} positions with its examples, and the answer up to {max_new_tokens}:"
                f" more than model.max_seq_len = {self.room}; take fewer examples"
            )

    def require(self, asked: Iterable[Question]) -> None:
        """Raises InputError if the template has no place for examples, or if one of ``asked`` does not get
        enough or has no room for them, as far as that shows without a look at images.
        """
        if one_turn := next((texts for texts in self.encoder.texts if not texts.has_turns), None):
            raise InputError(
                f"eval.shots = {self.cfg.shots}: data.template = {one_turn.cfg.template!r} writes one turn, and examples are turns"
            )
        drawn_at_random = replace(self, cfg=replace(self.cfg, shots_by="random"))
        for question in asked:
            full = drawn_at_random.before(question)
            self.check(self.encoder.encode_question(full.asked, full.images, full.part), self.cfg.max_new_tokens)


def read_pool(source: Source, encoder: Encoder, cfg: EvalConfig) -> list[Question]:
    """Questions of ``eval.shots_pool`` samples of ``source``, drawn by the encoder's seed, that can be asked
    and whose images can be opened.
    """
    chosen = drawn(len(source), cfg.shots_pool, encoder.seed)
    return [question for question in examine(source, encoder, cfg, chosen=chosen, pictures=0).questions if _opens(question, encoder)]


def feature_key(question: Question) -> Hashable:
    """What two questions share that show the same images."""
    return question.sample_id, question.part, question.images if isinstance(question.images, Hashable) else tuple(question.images)


def _same(example: Question, question: Question) -> bool:
    if example.sample_id == question.sample_id or (len(question.images) and example.images == question.images):
        return True
    alike: Callable[[Question], Hashable] = lambda each: (each.asked, each.truth)
    return alike(example) == alike(question) and [*example.images] == [*question.images]


def _opens(question: Question, encoder: Encoder) -> bool:
    try:
        for image in question.images if encoder.layout.image_size else ():
            with opened(image, whole=False):
                pass
    except InputError:
        return False
    return True
