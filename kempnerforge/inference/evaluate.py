"""Evaluation of a checkpoint, outside of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kempnerforge.eval.measure import measure
from kempnerforge.eval.predictions import write_predictions
from kempnerforge.eval.questions import HeldOut, examine
from kempnerforge.inference.restore import restore
from kempnerforge.training.setup import evaluated
from kempnerforge.util.errors import InputError


class OneProcess:
    """The ranks of a process that is alone."""

    rank, size = 0, 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]


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
    by_answer: dict[str, tuple[int, int]]
    held_out: HeldOut | None
    remarks: list[str]


def evaluate_checkpoint(path: Path, overrides: Sequence[str], limit: int, predictions: Path | None = None) -> Evaluated:
    """Scores a checkpoint on its held-out split.

    Args:
        path: checkpoint or run directory.
        limit: questions at most; 0 asks all.
        predictions: a file that gets every question and its answers, see ``write_predictions``.

    Raises:
        ValueError: there is nothing held out, too much of it cannot be read, or there is no question to write down.
    """
    restored = restore(path, overrides)
    assembly, job, last = restored.assembly, restored.assembly.job, restored.assembly.stages[-1]
    encoder = assembly.encoder(last)
    source, plain_text = evaluated(job, last, assembly.tokenizer)
    if source is None and plain_text is None:
        raise InputError(f"data.eval_path = '': {path} has no held-out data, and eval.text_path = '' names no plain text")
    held_out = examine(source, encoder, job.eval) if source is not None else None
    if held_out is not None:
        held_out.require(last.data.max_bad_fraction)
    if predictions is not None and not (held_out and held_out.questions and job.eval.exact_match):
        raise InputError(f"--predictions {predictions}: no question is asked; eval.exact_match = {str(job.eval.exact_match).lower()}")
    found = measure(
        assembly.model,
        encoder,
        job.eval,
        OneProcess(),
        restored.device,
        held_out=held_out,
        plain_text=plain_text,
        rows=job.train.batch_size,
        limit=limit,
    )
    if predictions is not None and held_out is not None and found.seeing is not None:
        write_predictions(predictions, found.seeing, found.blind, held_out.skipped)
    values = {key.removeprefix("eval/"): value for key, value in found.values.items()}
    return Evaluated(
        {"checkpoint": str(restored.path), "step": restored.state.step, **values},
        found.seeing.by_truth if found.seeing is not None else {},
        held_out,
        [*(held_out.remarks() if held_out else ()), *found.remarks(last.optimizer.lr)],
    )
