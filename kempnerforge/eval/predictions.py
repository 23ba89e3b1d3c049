"""All questions and answers, one JSON object a line: every number can be counted again from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kempnerforge.eval.answers import Cut
from kempnerforge.eval.evaluate import Measured
from kempnerforge.eval.task import Found
from kempnerforge.util.errors import InputError
from kempnerforge.util.files import write_text
from kempnerforge.util.reading import parse_json

LINE = 2**20
"""Characters that are read of a line at most."""
KEYS = (
    *("id", "prompt", "kind", "truth", "compared", "truth_tokens", "too_long", "also_right"),
    *("answer", "right", "answer_blind", "right_blind", "unreadable"),
)


def require_replaceable(path: Path) -> None:
    """Raises InputError if something else than predictions is at ``path``: the data, say, that are asked
    about.
    """
    try:
        with open(path, encoding="utf-8") as file:
            first = file.readline(LINE)
        fine = not first or set(KEYS) <= set(parse_json(first, ""))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        fine = False
    if not fine:
        raise InputError(f"--predictions {path}: holds something else, and would be lost; write to another file")


def write_predictions(path: Path, found: Measured, skipped: Sequence[tuple[str, str]]) -> Path:
    """Writes the file, in one move. A line has

    * ``id``, ``prompt``, ``kind``, ``truth``: of the sample;
    * ``compared``: the truth as the tokenizer writes it, which decides and by which answers are grouped;
    * ``truth_tokens``, ``too_long``: its tokens, the end included; whether the model may not write as many;
    * ``also_right``: further right answers;
    * ``answer``, ``right``, ``cut``: with the images, and whether the model did not end it;
    * ``answer_blind``, ``right_blind``: with blank images; with ``eval.shuffled`` the same of images of other
      questions;
    * ``unreadable``: why it could not be asked, else null. Other values that are not known are null, too.

    The questions of a task other than exact match follow in further lines, with its name as ``task`` and the
    scores of the answers as ``points``, ``points_blind`` and ``points_shuffled``.

    Args:
        skipped: (sample id, reason) of what no question could be made of.

    Raises:
        InputError: it cannot be written.
    """
    rows = [row for name, task in found.tasks.items() for row in _rows("" if name == "exact_match" else name, task)]
    rows += [dict.fromkeys(KEYS) | {"id": name, "unreadable": reason} for name, reason in skipped]
    try:
        return write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise InputError(f"--predictions {path}: cannot be written: {error.strerror or error}") from None


def _rows(task: str, found: Found) -> Iterator[dict[str, Any]]:
    if (seeing := found.seeing) is None:
        return
    scores = ((seeing, ""), (found.blind, "_blind"), (found.shuffled, "_shuffled"))
    asked_scores = [(score, suffix) for score, suffix in scores if score is not None]
    answers = {
        (answer.number, suffix): (answer, points)
        for score, suffix in asked_scores
        for answer, points in zip(score.answers, score.points, strict=True)
    }
    for number, question in seeing.asked.items():
        row = dict.fromkeys(KEYS) | {"id": question.sample_id, "prompt": question.prompt, "kind": question.kind, "truth": question.truth}
        row |= {"cut": None} | ({"answer_shuffled": None, "right_shuffled": None} if found.shuffled is not None else {})
        if task:
            row |= {"task": task, "points": None, "points_blind": None}
        for _, suffix in asked_scores:
            if (number, suffix) in answers:
                answer, points = answers[number, suffix]
                row |= {"compared": answer.truth.text, "truth_tokens": answer.truth.tokens, "too_long": answer.too_long}
                row |= {"also_right": list(answer.truth.others), f"answer{suffix}": answer.text, f"right{suffix}": answer.right}
                row |= {f"points{suffix}": float(points)} if task else {}
                row |= {} if suffix else {"cut": isinstance(answer.text, Cut)}
        yield row | {"unreadable": seeing.unreadable.get(number)}
