"""All that one evaluation measures, by the names under which it is recorded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from kempnerforge.config import EvalConfig
from kempnerforge.data.text.encode import Encoder
from kempnerforge.eval.exact_match import Ranks, Score, evaluate
from kempnerforge.eval.loss import PlainText, held_out_loss
from kempnerforge.eval.questions import HeldOut


@dataclass
class Measured:
    """What was found.

    Attributes:
        values: numbers by name.
        seeing, blind: the answers with the images and without; None where no question was asked.
    """

    values: dict[str, float] = field(default_factory=dict)
    seeing: Score | None = None
    blind: Score | None = None

    def remarks(self, lr: float) -> list[str]:
        """A line where the model gives one answer to everything, with the images and without, and there is more than one to give.

        Args:
            lr: that it was trained with.
        """
        if self.seeing is None or self.blind is None or len(self.seeing.by_truth) < 2:
            return []
        said = {answer.text for score in (self.seeing, self.blind) for answer in score.answers}
        if len(said) > 1:
            return []
        return [
            f"the model gives one answer, {said.pop()!r}, to all {self.seeing.total} questions, with the images and without: it has not learned"
            f" to tell them apart. Try another optimizer.lr (it was {lr:g}), more steps, or thaw frozen parts with random weights (vlm.freeze)"
        ]


def measure(
    model: torch.nn.Module,
    encoder: Encoder,
    cfg: EvalConfig,
    ranks: Ranks,
    device: torch.device,
    *,
    held_out: HeldOut | None,
    plain_text: PlainText | None,
    rows: int,
    limit: int,
) -> Measured:
    """Asks the questions, measures the loss, reads the plain text, as ``cfg`` says.

    Args:
        held_out: what is known of it; without images in the job there is no blind answer.
        rows: samples that a rank takes at once for the loss.
        limit: questions, samples and windows at most, drawn by the seed of ``encoder``; 0: all.
    """
    found = Measured()
    if plain_text is not None:
        text = plain_text.measure(model, ranks, device, limit)
        found.values |= {"eval/text_perplexity": text.perplexity, "eval/text_windows": text.samples}
    if held_out is None:
        return found
    if held_out.questions and cfg.exact_match:
        asked = held_out.draw(limit, encoder.seed)
        found.seeing = seeing = evaluate(model, asked, encoder, cfg, ranks, device)
        unreadable = len(held_out.skipped) + len(seeing.unreadable)
        found.values |= {"eval/exact_match": seeing.exact_match, "eval/questions": seeing.total}
        found.values |= {"eval/unreadable": unreadable, "eval/too_long": seeing.too_long, **_kinds(seeing, "")}
        if cfg.blind and encoder.layout.image_size:
            same = [answer.question for answer in seeing.answers]  # so that the two can be compared
            found.blind = evaluate(model, same, encoder, cfg, ranks, device, blind=True)
            found.values |= {"eval/exact_match_blind": found.blind.exact_match, **_kinds(found.blind, "_blind")}
    if cfg.loss or found.seeing is None:
        loss = held_out_loss(model, held_out.source, encoder, ranks, device, rows=rows, limit=limit)
        found.values |= {"eval/loss": loss.nats, "eval/loss_samples": loss.samples, "eval/loss_unreadable": len(loss.skipped)}
        found.values |= {"eval/loss_texts_left_out": loss.left_out} if loss.left_out else {}
    return found


def _kinds(score: Score, suffix: str) -> dict[str, float]:
    return {f"eval/exact_match{suffix}/{kind}": right / total for kind, (right, total) in score.by_kind.items()}
