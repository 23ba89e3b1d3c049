"""Every question of an evaluation and what became of it, one JSON object a line: each number of the evaluation can be counted from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kempnerforge.eval.exact_match import Score
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text

KEYS = (
    *("id", "prompt", "kind", "truth", "compared", "truth_tokens", "too_long", "also_right"),
    *("answer", "right", "answer_blind", "right_blind", "unreadable"),
)


def write_predictions(path: Path, seeing: Score, blind: Score | None, skipped: Sequence[tuple[str, str]]) -> Path:
    """Writes the file, in one move. A line has

    * ``id``, ``prompt``, ``kind``, ``truth``: of the sample;
    * ``compared``, ``truth_tokens``, ``too_long``: the truth as the tokenizer writes it, which decides and by which answers are grouped; the
      tokens that it takes with the one that ends it; whether these are more than ``eval.max_new_tokens``; ``also_right``: further right answers;
    * ``answer``, ``right``: with the images; ``answer_blind``, ``right_blind``: without;
    * ``unreadable``: why it could not be asked, else null. All that is not known is null.

    Args:
        skipped: (sample id, reason) of what no question could be made of.

    Raises:
        ValueError: it cannot be written.
    """
    try:
        return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(seeing, blind, skipped)))
    except OSError as error:
        raise InputError(f"--predictions {path}: cannot be written: {error.strerror or error}") from None


def _rows(seeing: Score, blind: Score | None, skipped: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    nothing = dict.fromkeys(KEYS)
    answers = {answer.number: answer for answer in seeing.answers}
    without = {answer.number: answer for answer in blind.answers} if blind is not None else {}
    position = {number: at for at, number in enumerate(answers)}  # blind, only what was answered is asked
    for number, question in enumerate(seeing.asked):
        row = nothing | {"id": question.sample_id, "prompt": question.prompt, "kind": question.kind, "truth": question.truth}
        if number in answers:
            answer = answers[number]
            row |= {"compared": answer.truth.text, "truth_tokens": answer.truth.tokens, "too_long": answer.too_long}
            row["also_right"] = list(answer.truth.others)
            row |= {"answer": answer.text, "right": answer.right}
            unseen = without.get(position[number])
            row |= {"answer_blind": unseen.text, "right_blind": unseen.right} if unseen is not None else {}
        yield row | {"unreadable": seeing.unreadable.get(number)}
    for name, reason in skipped:
        yield nothing | {"id": name, "unreadable": reason}
