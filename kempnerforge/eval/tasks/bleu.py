"""BLEU, by sacrebleu."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kempnerforge.config import registry
from kempnerforge.eval.answers import Answer
from kempnerforge.eval.task import QuestionTask, Score
from kempnerforge.util.errors import InputError


@registry.register_task("bleu")
@dataclass
class BLEU(QuestionTask):
    """BLEU-4 of the corpus, from 0 to 1. The points of one answer are its own BLEU, smoothed.

    Papineni et al. 2002, "BLEU: a Method for Automatic Evaluation of Machine Translation", equations 1 to 3;
    tokens and smoothing as Post 2018, "A Call for Clarity in Reporting BLEU Scores". All given answers of a
    question are its references. Needs the extra ``bleu``.

    Attributes:
        tokenize: how sacrebleu splits texts into tokens.
        lowercase: compare in lower case.
    """

    title: ClassVar[str] = "BLEU"

    tokenize: str = "13a"
    lowercase: bool = False

    def __post_init__(self) -> None:
        if importlib.util.find_spec("sacrebleu") is None:
            raise InputError("bleu needs the package sacrebleu: pip install 'kempnerforge[bleu]'")
        from sacrebleu.metrics.bleu import BLEU as SacreBLEU

        if self.tokenize not in SacreBLEU.TOKENIZERS:
            raise InputError(f"tokenize = {self.tokenize!r}: must be one of {', '.join(sorted(SacreBLEU.TOKENIZERS))}")

    def points(self, answer: Answer) -> float:
        return self._metric(effective_order=True).sentence_score(answer.text, list(answer.question.given)).score / 100

    def value(self, score: Score) -> float:
        if not score.answers:
            return 0.0
        most = max(len(answer.question.given) for answer in score.answers)
        references: Sequence[Sequence[Any]] = [
            [given[k] if k < len(given := answer.question.given) else None for answer in score.answers] for k in range(most)
        ]
        return self._metric().corpus_score([answer.text for answer in score.answers], references).score / 100

    def _metric(self, **options: Any) -> Any:
        from sacrebleu.metrics.bleu import BLEU as SacreBLEU

        return SacreBLEU(tokenize=self.tokenize, lowercase=self.lowercase, **options)
