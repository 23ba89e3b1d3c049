"""Evaluation of a checkpoint, outside of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kempnerforge.config.errors import InputError
from kempnerforge.eval.exact_match import evaluate, questions
from kempnerforge.eval.loss import held_out_loss
from kempnerforge.training.restore import restore
from kempnerforge.training.setup import evaluated


class OneProcess:
    """The ranks of a process that is alone."""

    rank, size = 0, 1

    def sum(self, values: Sequence[float]) -> list[float]:
        return list(values)


def evaluate_checkpoint(path: Path, overrides: Sequence[str], limit: int) -> tuple[dict[str, object], dict[str, tuple[int, int]]]:
    """Scores a checkpoint on its held-out split.

    Args:
        path: checkpoint or run directory.
        limit: questions at most; 0 asks all.

    Returns:
        Values by name, and (right, total) by true answer.

    Raises:
        ValueError: there is nothing held out.
    """
    restored = restore(path, overrides)
    assembly, device, ranks = restored.assembly, restored.device, OneProcess()
    cfg, encoder = assembly.job.eval, assembly.encoder(assembly.stages[-1])
    source, plain_text = evaluated(assembly.job, assembly.stages[-1], assembly.tokenizer)
    if source is None and plain_text is None:
        raise InputError(f"data.eval_path = '': {path} has no held-out data, and eval.text_path = '' names no plain text")
    values: dict[str, object] = {"checkpoint": str(restored.path), "step": restored.manifest.step}
    seeing = None
    if plain_text is not None:
        values["text_perplexity"] = plain_text.perplexity(assembly.model, ranks, device, limit)
    if source is None:
        return values, {}
    asked, skipped = questions(source, limit)
    if asked and cfg.exact_match:
        seeing = evaluate(assembly.model, asked, encoder, cfg, ranks, device)
        values |= {"exact_match": seeing.exact_match, "questions": seeing.total, "unreadable": len(skipped) + len(seeing.skipped)}
        values |= {f"exact_match/{kind}": right / total for kind, (right, total) in sorted(seeing.by_kind.items()) if total}
        if cfg.blind and assembly.model.has_images:
            values["exact_match_blind"] = evaluate(assembly.model, asked, encoder, cfg, ranks, device, blind=True).exact_match
    if cfg.loss or seeing is None:
        rows = assembly.job.train.batch_size
        values["loss"] = held_out_loss(assembly.model, source, encoder, ranks, device, rows=rows, limit=limit)
    return values, seeing.by_truth if seeing is not None else {}
