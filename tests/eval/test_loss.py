"""Held-out loss: the mean over tokens, not over batches. Perplexity: that of every token of a text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kempnerforge.data.sample import Sample, Text
from kempnerforge.eval.loss import PlainText, held_out_loss
from tests.eval.scripted import DEVICE, TEXT_ENCODER, Alone, ListSource, Scripted, shade
from tests.vlm.tiny import NO_IMAGE, ONE, THREE, all_logits, tiny

SAMPLES = [
    Sample("a", (), (Text("", (3, 10, 20)),)),
    None,
    Sample("b", (), (Text("", (3, 40)),)),
    Sample("c", (), (Text("", (3, 1, 2, 3, 4)),)),
]


def mean_of(samples: list[Sample | None], **settings: int) -> float:
    return held_out_loss(
        Scripted(shade, lambda labels: labels.double()), ListSource(samples), TEXT_ENCODER, Alone(), DEVICE, **{"limit": 0, **settings}
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 10])
def test_the_mean_over_trained_tokens(rows: int) -> None:
    """Each label is its own loss here; a sample that cannot be used is left out, also when it is a batch of its own."""
    assert mean_of(SAMPLES, rows=rows) == pytest.approx((10 + 20 + 40 + 1 + 2 + 3 + 4) / 7)


@pytest.mark.parametrize(("limit", "want"), [(1, 15.0), (2, (10 + 20 + 40) / 3), (4, 80 / 7), (9, 80 / 7)])
def test_a_limit_spreads_over_the_source(limit: int, want: float) -> None:
    assert mean_of(SAMPLES, rows=2, limit=limit) == pytest.approx(want)


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
    got = held_out_loss(it.model, ListSource(samples), it.encoder, Alone(), DEVICE, rows=2, limit=0)
    assert got == pytest.approx(total / count, rel=1e-5)
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
    assert text.perplexity(it.model, Alone(), DEVICE, 0) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert text.perplexity(it.model, Alone(), DEVICE, 1) == pytest.approx(math.exp(sum(losses[:8]) / 8), rel=1e-4)
