"""Generation: with a cache, in batches, with beams, as in training.

Each test is a check that every architecture must pass, whichever it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kempnerforge.config import ModelConfig
from kempnerforge.contract.cases import GQA, INTERLEAVED, LATE, MODEL, ONE, Tiny, picture, tiny, with_answer
from kempnerforge.contract.marks import each_arch, most_masks
from kempnerforge.data.sample import Sample
from kempnerforge.eval.beams import beam_search
from kempnerforge.eval.generate import Sampling, generate
from kempnerforge.model.transformer import Cache

IMAGES = [picture(k) for k in range(4)]
ROWS: list[tuple[str, list[int]]] = [
    ("what colour is it?", [0]),
    ("", [1]),
    ("is there a circle? is it red?", [1]),
    ("red?", [0, 2, 3]),
    ("what?", []),
    ("is <image> like <image>, <image>?", [3, 0, 0]),
    ("<boi><code_5>", [2]),
]
"""Unequal prompts with no, one and three images, in front or between words, some shared by rows."""


def some_rows(it: Tiny) -> list[tuple[str, list[int]]]:
    return ROWS if it.model.has_images else [(prompt, []) for prompt, _ in ROWS]


@most_masks
@pytest.mark.parametrize("model", [MODEL, GQA], ids=["default", "gqa"])
def test_the_cache_is_the_full_forward_pass(arch: str | None, mask: str, model: ModelConfig) -> None:
    """Token for token, and in the logits."""
    it = tiny(arch, mask, model=model, noise=0.3)
    it.model.eval()
    prompts = it.prompts(some_rows(it), IMAGES)
    made = torch.tensor(generate(it.model, prompts, max_new_tokens=6, eos_id=-1))
    assert made.shape == (len(ROWS), 6) and len(made.unique()) > 5
    with torch.no_grad():
        for step in range(6):
            logits = it.model(with_answer(prompts, made[:, :step])).logits
            assert torch.equal(logits.argmax(-1), made[:, step])
        torch.testing.assert_close(
            it.model(prompts, Cache()).logits, it.model(with_answer(prompts, made[:, :0])).logits, rtol=1e-4, atol=1e-5
        )


@most_masks
def test_prompts_together_are_prompts_one_by_one(arch: str | None, mask: str) -> None:
    it = tiny(arch, mask, noise=0.3)
    it.model.eval()
    together = it.prompts(some_rows(it), IMAGES)
    made = generate(it.model, together, max_new_tokens=5, eos_id=-1)
    with torch.no_grad():
        logits = it.model(together, Cache()).logits
        for row, (prompt, which) in enumerate(some_rows(it)):
            alone = it.prompts([(prompt, range(len(which)))], [IMAGES[k] for k in which])
            torch.testing.assert_close(it.model(alone, Cache()).logits[0], logits[row], rtol=1e-4, atol=1e-5)
            assert generate(it.model, alone, max_new_tokens=5, eos_id=-1) == [made[row]]


@each_arch
def test_beams_with_a_cache_are_beams_without(arch: str | None) -> None:
    """All rows at once, with one cache for all beams, find what each finds that reads its text anew."""
    it = tiny(arch, noise=0.3)
    it.model.eval()
    made = generate(it.model, it.prompts(some_rows(it), IMAGES), max_new_tokens=4, eos_id=7, sampling=Sampling(beams=3))
    with torch.no_grad():
        found = [beams_anew(it, asked, beams=3, max_new_tokens=4, ends=torch.tensor([7])) for asked in some_rows(it)]
    assert made == [text[: text.index(7) if 7 in text else None] for text in found]


def beams_anew(it: Tiny, asked: tuple[str, list[int]], **options: Any) -> list[int]:
    """What ``beam_search`` finds without a cache."""
    texts = torch.zeros(1, 0, dtype=torch.int64)

    def logits() -> Tensor:
        return it.model(with_answer(it.prompts([asked] * len(texts), IMAGES), texts)).logits

    def advance(rows: Tensor, ids: Tensor) -> Tensor:
        nonlocal texts
        texts = torch.cat([texts[rows], ids[:, None]], dim=1)
        return logits()

    return beam_search(logits(), advance, **options)[0].tolist()


@most_masks
@pytest.mark.parametrize("sample", [ONE, INTERLEAVED, LATE], ids=lambda s: s.id)
def test_generation_reads_what_training_reads(arch: str | None, mask: str, sample: Sample) -> None:
    """The prompt of a training row and the same prompt to generate from give the same next token."""
    it = tiny(arch, mask)
    it.model.eval()
    batch = it.batch(sample)
    first = batch.targets[:1]  # the position that predicts the first token of the answer
    images = range(len(sample.images)) if it.model.has_images else []
    with torch.no_grad():
        want = it.model(replace(batch, targets=first)).logits
        got = it.model(it.prompts([(sample.texts[0].prompt, images)], sample.images), Cache()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
