"""Held-out loss: the mean over tokens, not over batches. Perplexity: that of every token of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest

from kempnerforge.config import EvalConfig
from kempnerforge.data.batching.order import drawn
from kempnerforge.data.sample import Sample, Text
from kempnerforge.eval.exam import Exam
from kempnerforge.eval.loss import HeldOutLoss, held_out_loss
from kempnerforge.eval.plain_text import PlainText
from kempnerforge.eval.tasks.text_perplexity import TextPerplexity
from tests.eval.scripted import DEVICE, TEXT_ENCODER, ListSource, Scripted, shade
from tests.vlm.tiny import NO_IMAGE, ONE, THREE, all_logits, tiny

SAMPLES = [
    Sample("a", (), (Text("", (3, 10, 20)),)),
    None,
    Sample("b", (), (Text("", (3, 40)),)),
    Sample("c", (), (Text("", (3, 1, 2, 3, 4)),)),
]


def mean_of(samples: list[Sample | None], **settings: int) -> float:
    return loss_of(samples, **settings).nats


def loss_of(samples: list[Sample | None], rows: int, limit: int = 0) -> HeldOutLoss:
    model = Scripted(shade, lambda labels: labels.double())
    return held_out_loss(Exam(model, TEXT_ENCODER, EvalConfig(), DEVICE, limit=limit), ListSource(samples), TEXT_ENCODER, rows)


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
def test_the_mean_over_trained_tokens(rows: int) -> None:
    """Each label is its own loss here; a sample that cannot be used is left out, also when it is a batch of its own."""
    loss = loss_of(SAMPLES, rows=rows)
    assert loss.nats == pytest.approx((10 + 20 + 40 + 1 + 2 + 3 + 4) / 7)
    assert loss.samples == 3 and loss.skipped == [("1", "row 1 is broken")] and loss.left_out == 0


@pytest.mark.parametrize("limit", [1, 7, 39, 40, 99])
def test_a_limit_takes_samples_once_by_the_seed(limit: int) -> None:
    samples: list[Sample | None] = [Sample(str(k), (), (Text("", (3, k)),)) for k in range(40)]
    loss = loss_of(samples, rows=4, limit=limit)
    taken = drawn(40, limit, TEXT_ENCODER.seed)
    assert loss.samples == len(set(taken)) == min(limit, 40)
    assert loss.nats == pytest.approx(sum(taken) / len(taken)) and loss.nats == mean_of(samples, rows=4, limit=limit)


def test_texts_that_do_not_fit_are_counted() -> None:
    """32 tokens fit into a row: of three texts of twelve, two."""
    answers = [" ".join("red" for _ in range(count)) for count in (3, 4, 5)]
    lengths = [TEXT_ENCODER.texts[0].encode(Text("what colour?", answer)).table.shape[1] for answer in answers]
    assert max(lengths) <= 32 < sum(lengths)
    assert loss_of([Sample("s", (), tuple(Text("what colour?", answer) for answer in answers))], rows=1).left_out > 0


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of 2 held-out samples can be read"):
        mean_of([None, None], rows=1)


def test_of_a_real_model_by_hand() -> None:
    it = tiny(None)
    it.model.train()
    samples = [ONE, THREE, NO_IMAGE]
    total, count = 0.0, 0
    for sample in samples:
        batch = it.batch(sample)
        kept = batch.labels >= 0
        total -= all_logits(it.model, batch)[kept].log_softmax(-1).gather(-1, batch.labels[kept][:, None]).sum().item()
        count += int(kept.sum())
    got = held_out_loss(Exam(it.model, it.encoder, EvalConfig(), DEVICE), ListSource(samples), it.encoder, rows=2)
    assert got.nats == pytest.approx(total / count, rel=1e-5)
    assert it.model.training


@pytest.mark.parametrize("arch", [None, "joint_decoder", "cross_attention", "mot"])
def test_perplexity_of_plain_text_by_hand(arch: str | None, tmp_path: Path) -> None:
    """Windows do not see each other; without images every arch is a language model."""
    it = tiny(arch)
    (path := tmp_path / "a.txt").write_text("what shape is in the image? is it a red circle?\n\nno, it is a blue one " * 3)
    tokenizer = it.encoder.tokenizer
    ids = [*tokenizer.encode(path.read_text()), tokenizer.eos_id]
    assert len(ids) > 20
    losses = []
    for begin in range(0, len(ids) - 1, 8):
        window = ids[begin : begin + 9]
        batch = it.batch(Sample("a window", (), (Text("", tuple(window)),)))
        assert batch.input_ids[0, : len(window) - 1].tolist() == window[:-1]
        scores = all_logits(it.model, batch)[0].log_softmax(-1)
        losses += [-scores[at, token].item() for at, token in enumerate(window[1:])]
    assert len(losses) == len(ids) - 1
    text = PlainText(str(path), 8, tokenizer)

    def measured(limit: int) -> Mapping[str, float]:
        found = TextPerplexity().measure(Exam(it.model, it.encoder, EvalConfig(), DEVICE, plain_text=text, limit=limit))
        assert found is not None
        return found.values

    assert measured(0)["eval/text_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    (begin,) = (8 * at for at in drawn(-(-len(losses) // 8), 1, 0))
    part = measured(1)
    assert part["eval/text_windows"] == 1 and part["eval/text_perplexity"] == pytest.approx(
        math.exp(sum(losses[begin : begin + 8]) / len(losses[begin : begin + 8])), rel=1e-4
    )
