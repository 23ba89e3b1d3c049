"""Multiple choice by likelihood: of several answers the one that the model finds most likely; nothing is
generated.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from kempnerforge.config import registry
from kempnerforge.config.checks import one_of
from kempnerforge.data.batching.batch import IGNORE
from kempnerforge.data.sample import Sample
from kempnerforge.eval.answers import Answer, Answers, answers_of, spread
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.loss import log_likelihoods
from kempnerforge.eval.questions import Question, plain
from kempnerforge.eval.task import QuestionTask
from kempnerforge.eval.tasks.multiple_choice import letter_of, options_of
from kempnerforge.util.errors import InputError


@registry.register_task("choice_likelihood")
@dataclass
class ChoiceLikelihood(QuestionTask):
    """The share of questions whose true answer is the likeliest of the choices.

    Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.4; per "bytes" it is ``acc_norm`` of
    lm-evaluation-harness. The likelihood is of the whole answer, the token that ends it included.

    Attributes:
        choices: the same for all questions; empty: the options in the prompt of each (see
            ``multiple_choice``).
        score: what is scored of an option in the prompt: its "letter", or its "text".
        per: divide a log-likelihood by the "tokens" or "bytes" of the answer; "answer": do not.
    """

    title: ClassVar[str] = "Choice by likelihood"
    takes_examples: ClassVar[bool] = False

    choices: list[str] = field(default_factory=list)
    score: str = "letter"
    per: str = "answer"

    def __post_init__(self) -> None:
        one_of(self, "score", ("letter", "text"))
        one_of(self, "per", ("answer", "tokens", "bytes"))
        if len(self.choices) == 1 or len(set(map(plain, self.choices))) < len(self.choices):
            raise InputError(f"choices = {self.choices}: must be none, or two or more different ones")

    def question(self, question: Question) -> Question | None:
        return question if self._right(question) in self._choices(question) else None

    def points(self, answer: Answer) -> bool:
        return answer.text == self._right(answer.question)

    def answers(self, exam: Exam, asked: Mapping[int, Question], blind: bool) -> Answers:
        most = max((len(self._choices(question)) for question in asked.values()), default=0)
        write = lambda chunk, failed: self._likeliest(exam, chunk, failed, blind, most)
        return answers_of(asked, spread(exam, asked, write, self.max_new_tokens or exam.cfg.max_new_tokens))

    def _choices(self, question: Question) -> list[str]:
        options = options_of(question.prompt)
        return self.choices or list(options if self.score == "letter" else options.values())

    def _right(self, question: Question) -> str:
        """The choice that is right; empty: none of them."""
        if self.choices:
            return next((choice for choice in self.choices if plain(choice) == plain(question.truth)), "")
        options = options_of(question.prompt)
        letter = letter_of(question.truth, options)
        return letter if self.score == "letter" else options.get(letter, "")

    def _likeliest(
        self, exam: Exam, chunk: Sequence[tuple[Hashable, Question]], failed: dict[Hashable, str], blind: bool, most: int
    ) -> dict[Hashable, str]:
        """The likeliest choice of each question; ``most`` calls of the model, whatever there is to ask, so
        that ranks stay in step.
        """
        found: dict[Hashable, list[tuple[float, str]]] = {key: [] for key, _ in chunk}
        for k in range(most):
            rows = {}
            for key, question in chunk:
                if key in failed or k >= len(choices := self._choices(question)):
                    continue
                text = replace(question, truth=choices[k]).answered
                try:
                    sample = Sample(question.sample_id, tuple(question.images), (text,), question.part)
                    rows[key] = choices[k], exam.encoder.encode(sample, seed=0)
                except InputError as error:
                    failed[key] = str(error)
            nats = log_likelihoods(exam, [encoded for _, encoded in rows.values()], blind=blind)
            for (key, (choice, encoded)), one in zip(rows.items(), nats, strict=True):
                size = {"answer": 1, "tokens": int((encoded.table[1] != IGNORE).sum()), "bytes": len(choice.encode())}[self.per]
                found[key].append((one / size, choice))
        return {key: max(scores, key=lambda pair: pair[0])[1] for key, scores in found.items() if key not in failed}
