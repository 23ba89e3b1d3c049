"""Evaluation of a checkpoint, outside of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kempnerforge.eval.exam import Ranks
from kempnerforge.eval.predictions import write_predictions
from kempnerforge.eval.questions import HeldOut
from kempnerforge.inference.restore import restore
from kempnerforge.training.setup import read_held_out
from kempnerforge.util.errors import InputError


@dataclass(frozen=True)
class Evaluated:
    """What was found.

    Attributes:
        values: by name.
        by_answer: (right, total) by true answer, as the tokenizer writes it.
        held_out: what was asked; None: only plain text was read.
        remarks: what has to be known beside the values.
    """

    values: dict[str, object]
    by_answer: Mapping[str, tuple[float, int]]
    held_out: HeldOut | None
    remarks: list[str]


def evaluate_checkpoint(path: Path, overrides: Sequence[str], limit: int, predictions: Path | None = None) -> Evaluated:
    """Scores a checkpoint on its held-out split.

    Args:
        path: checkpoint or run directory.
        limit: questions at most; 0 asks all.
        predictions: a file that gets every question and its answers, see ``write_predictions``.

    Raises:
        InputError: there is nothing held out, too much of it cannot be read, or no question is asked.
    """
    restored = restore(path, overrides)
    assembly, job, last = restored.assembly, restored.assembly.job, restored.assembly.stages[-1]
    assembly.held_out, assembly.plain_text = read_held_out(job, last, assembly.tokenizer)
    if assembly.held_out is None and assembly.plain_text is None:
        raise InputError(f"data.eval_path = '': {path} has no held-out data, and eval.text_path = '' names no plain text")
    assembly.require_held_out()
    held_out = assembly.examined
    if predictions is not None and not (held_out and held_out.questions and (job.eval.exact_match or job.eval.tasks)):
        raise InputError(f"--predictions {predictions}: no question is asked; eval.exact_match = {str(job.eval.exact_match).lower()}")
    found = assembly.evaluate(Ranks(), restored.device, rows=job.train.batch_size, limit=limit)
    if predictions is not None and held_out is not None:
        write_predictions(predictions, found, held_out.skipped)
    values = {key.removeprefix("eval/"): value for key, value in found.values.items()}
    return Evaluated(
        {"checkpoint": str(restored.path), "step": restored.state.step, **values},
        found.by_answer,
        held_out,
        [*(held_out.remarks() if held_out else ()), *found.remarks(last.optimizer.lr)],
    )
