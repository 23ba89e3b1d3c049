"""Pictures that a model writes, judged by a classifier of real ones: is what was asked for on it?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import only_if
from kempnerforge.config.model import BEGIN_PICTURE, END_PICTURE
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.images.decode import load_image
from kempnerforge.data.sample import Sample
from kempnerforge.data.sources.picture_codes import codes_in
from kempnerforge.data.text.interleave import LABELS
from kempnerforge.eval.answers import Answer, Answers, Drawn, answers_of, spread, write_answers
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.generate import Sampling
from kempnerforge.eval.loss import log_likelihoods
from kempnerforge.eval.mode import mode
from kempnerforge.eval.questions import Images, Question
from kempnerforge.eval.task import Found, QuestionTask, ReportRow, Score, percent
from kempnerforge.model.vq import VQVAE, PictureClassifier
from kempnerforge.report.facts import Facts
from kempnerforge.util.errors import InputError
from kempnerforge.util.paths import PathText


@registry.register_task("picture_class")
@dataclass
class PictureClass(QuestionTask):
    """The share of written pictures on which the classifier sees what the prompt asks for.

    Prompts are held-out captions that are classes of the classifier. Two ceilings are recorded: ``_real``,
    the share of the held-out pictures themselves that it sees so, and ``_reconstructed``, of these pictures
    after the picture tokenizer. ``_loss`` is the cross-entropy of the held-out pictures, in nats per token;
    ``_whole`` is the share of answers that are one picture and nothing else;
    others are wrong.

    NOTE: draws depend on ``eval.batch_size`` and on the number of processes.

    Attributes:
        classifier: its folder (``model/vq.py``).
        temperature, top_k: of the draws, see ``Sampling``; 0 takes the likeliest token, which for pictures
            is a bad choice: the likeliest code of most places is the background.
        seed: of the draws.
        constrained: only codes may be written, as many as a picture has.
    """

    title: ClassVar[str] = "Pictures of the class asked for"

    classifier: PathText = ""
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    constrained: bool = True

    def __post_init__(self) -> None:
        only_if(self, False, "a task that writes texts", "max_new_tokens")
        self.sampling = Sampling(self.temperature, self.top_k)

    def question(self, question: Question) -> Question | None:
        judge = self._judge().cfg
        if not question.asks_picture or question.prompt not in judge.classes:
            return None
        if judge.image_size != (size := _codec_of(question).cfg.image_size):
            raise InputError(f"eval.options.{self.name}.classifier: judges {judge.image_size} pixels a side, data.codec writes {size}")
        return replace(question, truth=question.prompt)

    def points(self, answer: Answer) -> bool:
        return answer.text == answer.question.truth

    def answers(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Answers:
        judge, codec = self._judge(), _codec_of(next(iter(asked.values())))
        most, names = codec.cfg.tokens + 3, exam.encoder.tokenizer.token_id  # <boi>, <eoi> and the end

        def draw(chunk: list[tuple[Hashable, Question]], failed: dict[Hashable, str]) -> dict[Hashable, str]:
            end = exam.encoder.texts[chunk[0][1].part if chunk else 0].end_id
            steps = [names(BEGIN_PICTURE), *[None] * codec.cfg.tokens, names(END_PICTURE), end]
            codes = exam.encoder.layout.codes[: codec.cfg.codes]
            allowed = tuple(codes if step is None else range(step, step + 1) for step in steps) if self.constrained else ()
            first = int(str(chunk[0][0])) if chunk else 0
            sampling = replace(self.sampling, seed=self.seed + 1_000_003 * first, allowed=allowed)
            texts = write_answers(exam, chunk, False, most, failed, sampling)
            return {key: seen(text) for key, text in texts.items()}

        def seen(text: str) -> str:
            codes = codes_in(text, codec.cfg.tokens)
            if codes is None or max(codes) >= codec.cfg.codes:
                return "(no picture)"
            picture = codec.decode([codes])[0]
            return Drawn.of(judge.name([picture])[0], picture)

        return answers_of(asked, spread(exam, asked, draw, most))

    def further(self, score: Score) -> dict[str, float]:
        codec, judge = _codec_of(score.answers[0].question), self._judge()
        size = codec.cfg.image_size
        real = [load_image(_sample(answer.question).shows[0], size) for answer in score.answers]
        truths = [answer.question.truth for answer in score.answers]
        share = lambda names: sum(name == truth for name, truth in zip(names, truths, strict=True)) / len(truths)
        return {
            "_real": share(judge.name(real)),
            "_reconstructed": share(judge.name(list(codec.decode(codec.encode(real))))),
            "_whole": sum(isinstance(answer.text, Drawn) for answer in score.answers) / len(truths),
        }

    def measure(self, exam: Exam) -> Found | None:
        """Without blank images and those of other questions: prompts have none."""
        found = super().measure(replace(exam, cfg=replace(exam.cfg, blind=False, shuffled=False)))
        if found is None or found.seeing is None:
            return found
        return replace(found, values={**found.values, f"eval/{self.name}_loss": _picture_loss(exam, found.seeing.asked)})

    def rows(self, facts: Facts) -> list[ReportRow]:
        ceilings = [(facts.result(f"{self.name}_{name}"), name) for name in ("real", "reconstructed")]
        about = "; ".join(f"{percent(value)}\u00a0% of {name} pictures are seen so" for value, name in ceilings if value is not None)
        asked = facts.beside(f"{self.name}_questions", "asked for")
        return [row._replace(about=f"{about}{asked}", lead=True) for row in super().rows(facts)]

    def _judge(self) -> PictureClassifier:
        return _classifier(self.classifier, f"eval.options.{self.name}.classifier")


@cache
def _classifier(path: str, key: str) -> PictureClassifier:
    return PictureClassifier.load(path, key)


@cache
def _codec(path: str) -> VQVAE:
    return VQVAE.load(path, "data.codec")


def _codec_of(question: Question) -> VQVAE:
    """The picture tokenizer of the data that ``question`` is from."""
    assert isinstance(question.images, Images), "held-out questions know their sample"
    section: Any = question.images.source.cfg.sections()[question.part]
    return _codec(section.codec)


def _sample(question: Question) -> Sample:
    assert isinstance(question.images, Images), "held-out questions know their sample"
    return question.images.source[question.images.number]


def _picture_loss(exam: Exam, asked: Mapping[int, Question]) -> float:
    """Mean cross-entropy of the true pictures, in nats per trained token, nearly all of which are codes."""
    ranks, step = exam.ranks, exam.rows * exam.ranks.size
    samples = list({sample.id: sample for question in asked.values() for sample in [_sample(question)]}.values())
    nats, tokens = 0.0, 0
    with mode(exam.model, training=False):
        for start in range(0, len(samples), step):
            rows = [exam.encoder.encode(sample, seed=0) for sample in samples[start : start + step][ranks.rank :: ranks.size]]
            nats -= sum(log_likelihoods(exam, rows))
            tokens += sum(int((row.table[LABELS] != IGNORE).sum()) for row in rows)
    nats, total = ranks.sum([nats, tokens])
    return nats / total
