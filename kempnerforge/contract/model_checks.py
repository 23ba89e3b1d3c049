"""Names, masks and packs: what a model computes.

Each test is a check that every architecture must pass, whichever it is.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kempnerforge.config import ModelConfig, load_config, to_toml
from kempnerforge.contract.cases import (
    ANSWERED,
    GQA,
    INTERLEAVED,
    LATE,
    MODEL,
    NO_IMAGE,
    ONE,
    SAMPLES,
    THREE,
    TWICE,
    TWO_IMAGES,
    WINDOW,
    WRITTEN,
    Tiny,
    accepted_masks,
    all_logits,
    gradients,
    may_see,
    picture,
    seeing,
    tiny,
    tiny_job,
)
from kempnerforge.contract.marks import each_arch, each_mask, most_masks, ours, with_images
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.data.sample import Sample
from kempnerforge.model import attention
from kempnerforge.util.name_rules import match_names
from kempnerforge.vlm.build import build_model
from kempnerforge.vlm.masks import SEES_PROMPT


def watched(arch: str | None, *args: Any, **kwargs: Any) -> Tiny:
    """In training mode, unless the arch says that positions may depend on later ones there."""
    it = tiny(arch, *args, **kwargs)
    it.model.train(it.model.causal_in_training)
    return it


# ---- names and parts -----------------------------------------------------------------------------


@ours
@pytest.mark.parametrize("model", [MODEL, GQA], ids=["default", "gqa"])
def test_a_text_checkpoint_loads_with_only_new_names_missing(arch: str | None, model: ModelConfig) -> None:
    text, it = tiny(None, model=model).model.state_dict(), tiny(arch, model=model, noise=0.3).model
    missing, unexpected = it.load_state_dict(text, strict=False)
    assert not unexpected, "the text model has names that this arch does not have"
    assert set(missing) == set(it.state_dict()) - set(text)
    assert all(torch.equal(it.state_dict()[name], value) for name, value in text.items())


@ours
@pytest.mark.parametrize("model", [MODEL, GQA], ids=["default", "gqa"])
def test_the_backbone_is_the_same_at_step_0(arch: str | None, model: ModelConfig) -> None:
    """Architectures are compared from one starting point: the text weights depend on the seed alone."""
    text, it = tiny(None, model=model, noise=0.0).model.state_dict(), tiny(arch, model=model, noise=0.0).model.state_dict()
    assert [name for name in text if not torch.equal(it[name], text[name])] == []


@each_arch
def test_the_state_is_the_parameters(arch: str | None) -> None:
    """Nothing else is needed to rebuild the model: a fresh one of another seed computes the same with it."""
    it, other = tiny(arch), tiny(arch, train=replace(tiny_job(arch).train, seed=7), noise=0.0)
    assert set(it.model.state_dict()) == {name for name, _ in it.model.named_parameters()}
    batch = it.batch(*SAMPLES)
    assert not torch.equal(all_logits(other.model, batch), all_logits(it.model, batch))
    other.model.load_state_dict(it.model.state_dict())
    assert torch.equal(all_logits(other.model, batch), all_logits(it.model, batch))


@each_arch
def test_building_leaves_the_random_state_alone(arch: str | None) -> None:
    job = tiny(arch).job
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    build_model(job)
    assert torch.equal(torch.rand(3), want)


@each_arch
def test_units_cover_every_parameter_once(arch: str | None) -> None:
    it = tiny(arch)
    model, units = it.model, list(it.model.shard_units())
    inside = [id(p) for unit in units for p in unit.parameters()]
    assert len(inside) == len(set(inside)), "units overlap"
    assert set(inside) < {id(p) for p in model.parameters()}
    names = [name for name, p in model.named_parameters() if ".layers." in name and id(p) not in set(inside)]
    assert not names, f"parameters of layers that no unit of shard_units has: {', '.join(names[:3])}"
    rest = sum(p.numel() for p in model.parameters() if id(p) not in set(inside))
    assert rest + sum(p.numel() for unit in units for p in unit.parameters()) == sum(p.numel() for p in model.parameters())


@with_images
def test_every_alias_hits(arch: str) -> None:
    it = tiny(arch)
    assert "transformer" in it.patterns
    names = [name for name, _ in it.model.named_parameters()]
    hits = {alias: match_names(names, alias, it.patterns, "alias") for alias in it.patterns}
    assert set(names) == {name for found in hits.values() for name in found}


@most_masks
def test_toml_round_trip(arch: str | None, mask: str, tmp_path: Path) -> None:
    job = tiny(arch, mask).job
    (tmp_path / "job.toml").write_text(to_toml(job), encoding="utf-8")
    assert load_config(tmp_path / "job.toml") == job


# ---- what sees what ------------------------------------------------------------------------------


def changes(a: Tensor, b: Tensor) -> Tensor:
    """(B, S): the largest difference of the logits at each position."""
    return (a - b).abs().amax(-1)


@each_mask
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.id)
def test_no_word_leaks(arch: str | None, mask: str, sample: Sample) -> None:
    """Changing the word at t changes no logits before t, nor the logits of another text; it does change all
    that may see it.
    """
    it = watched(arch, mask)
    one = it.batch(sample)
    words, batch = it.each_word_changed(sample)
    logits = all_logits(it.model, batch)
    moved = changes(logits[:-1], logits[-1:]) > 1e-5  # (words, S)
    assert torch.equal(moved, may_see(one, mask)[:, words].T), (
        f"under mask {mask!r} a word changes the logits of other positions than the ones that may see it"
    )


@with_images
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.images], ids=lambda s: s.id)
def test_no_image_leaks(arch: str, sample: Sample) -> None:
    """Changing an image changes all words after its places that may know of it, and no others."""
    for mask in accepted_masks(arch):
        it = watched(arch, mask)
        batch = it.batch(sample)
        want = all_logits(it.model, batch)
        texts, kinds = batch.text_ids[0], batch.kinds[0]
        assert batch.images is not None
        for image in range(len(batch.images)):
            images = batch.images.clone()
            images[image] = 255 - images[image]
            moved = changes(all_logits(it.model, replace(batch, images=images)), want)[0] > 1e-5
            allowed = torch.zeros_like(moved)
            prompt = may_see(batch, mask)  # what sees a word of the prompt that knows the image may know it, too
            for m in (batch.image_index == image).nonzero().flatten().tolist():
                start, text = int(batch.image_starts[m]), int(batch.image_text_ids[m])
                later = (torch.arange(len(moved)) >= start) & ((texts == text) | (text == 0))
                inside_answer = (kinds[:start][texts[:start] == text] == Kind.ANSWER).any()
                if mask in SEES_PROMPT and not inside_answer:
                    own = (kinds == Kind.PROMPT) & ((texts == text) | (text == 0))
                    own &= later | (mask == "prefix")
                    later |= own | prompt[:, own].any(1)
                allowed |= later
            words = kinds >= Kind.PROMPT
            assert torch.equal(moved[words], allowed[words]), f"under mask {mask!r} image {image} changes words that do not come after it"
            before = moved[: int(batch.image_starts[batch.image_index == image].min())]
            assert mask in SEES_PROMPT or not before.any(), f"under mask {mask!r} positions before image {image} know it"


@most_masks
def test_a_row_is_alone(arch: str | None, mask: str) -> None:
    """Other rows, padding and the order of rows make no difference: every image goes into its own row."""
    it = watched(arch, mask)
    batch = it.batch(*SAMPLES, pad_to=60)
    batch.input_ids[batch.kinds == Kind.PAD] = 5
    together = all_logits(it.model, batch)
    for row, sample in enumerate(SAMPLES):
        alone = all_logits(it.model, it.batch(sample))
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)


@most_masks
@pytest.mark.parametrize("sample", [THREE, TWICE], ids=lambda s: s.id)
def test_several_texts_have_the_loss_of_each_alone(arch: str | None, mask: str, sample: Sample) -> None:
    """A prefix mask lets a shared image see the prompt where there is one alone, so there rows of two are
    compared with the row of all.
    """
    it = watched(arch, mask)
    size = 2 if mask in SEES_PROMPT and sample is THREE else 1
    together = it.batch(sample)
    apart = it.batch(*(replace(sample, texts=texts) for texts in combinations(sample.texts, size)))
    assert together.num_targets * size == apart.num_targets
    torch.testing.assert_close(it.model(together).loss * size, it.model(apart).loss, rtol=1e-5, atol=0)


@with_images
def test_the_image_matters(arch: str) -> None:
    it = tiny(arch)
    batch = it.batch(ONE)
    assert batch.images is not None
    logits = [all_logits(it.model, replace(batch, images=images)) for images in (batch.images, torch.full_like(batch.images, 128))]
    logits.append(all_logits(it.model, it.batch(replace(ONE, images=(picture(9),)))))
    words = batch.kinds[0] >= Kind.PROMPT
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (changes(logits[a], logits[b])[0, words] > 1e-3).all(), "another image leaves the logits of words as they are"


@with_images
def test_a_batch_without_images_keeps_the_encoder_in_the_graph(arch: str) -> None:
    """Ranks that wait for each other's gradients need one, even zero; the loss is of the words alone."""
    it = tiny(arch)
    batch = it.batch(NO_IMAGE)
    assert batch.images is not None and len(batch.images) == 0
    _, grads = gradients(it.model, batch)
    names = set(seeing(it))
    assert names <= grads.keys(), "parameters of adapter or encoder get no gradient, not even zero"
    assert not any(grads[name].any() for name in names)
    mixed = it.batch(NO_IMAGE, ONE)
    only = replace(mixed, targets=mixed.targets[mixed.targets < mixed.input_ids.shape[1]])
    torch.testing.assert_close(it.model(only).loss, it.model(batch).loss, rtol=1e-5, atol=1e-6)


@each_arch
def test_nothing_trained_is_loss_zero(arch: str | None) -> None:
    it = tiny(arch)
    batch = it.batch(*SAMPLES)
    batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE), targets=batch.targets[:0])
    batch = replace(batch, pair_images=batch.pair_images[:0], pair_ids=torch.full_like(batch.pair_ids, -1))
    output = it.model(batch)
    assert output.loss.item() == 0 and output.logits.shape == (0, it.encoder.tokenizer.vocab_size)
    output.mean(0, 0).backward()
    grads = {name: p.grad for name, p in it.model.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or grad.any()] == []


@each_arch
def test_the_loss_is_found_in_the_output(arch: str | None) -> None:
    """FSDP2 hangs its backward pass on the tensors that it finds in a module's output; before torch 2.13 it
    does not look into dataclasses.
    """
    it = tiny(arch)
    output = it.model(it.batch(ONE))
    assert any(leaf is output.loss for leaf in tree_leaves(output))


@each_arch
def test_the_loss_is_a_sum_over_targets(arch: str | None) -> None:
    it = tiny(arch)
    batch = it.batch(*SAMPLES)
    output, logits = it.model(batch), all_logits(it.model, batch)
    kept = batch.labels != IGNORE
    assert int(kept.sum()) == batch.num_targets
    with torch.no_grad():
        torch.testing.assert_close(it.model(batch).logits, logits[kept], rtol=1e-5, atol=1e-5)
    want = -logits[kept].log_softmax(-1).gather(-1, batch.labels[kept][:, None]).sum()
    torch.testing.assert_close(output.loss, want, rtol=1e-5, atol=0)


# ---- several samples in a row --------------------------------------------------------------------


PACKS = ((THREE, ONE, WINDOW, LATE), (NO_IMAGE, TWO_IMAGES, WRITTEN, TWICE), (ANSWERED, INTERLEAVED, ONE, TWICE, WINDOW), (ONE,))
each_form = pytest.mark.parametrize("apart", [True, False], ids=["apart", "dense"])
"""Rows taken apart into their samples, as on a CPU, or under one mask, as in other places."""


def in_form(batch: Batch, apart: bool, monkeypatch: pytest.MonkeyPatch) -> Batch:
    monkeypatch.setattr(attention, "DOCUMENTS_FROM", 1)
    assert batch.documents and batch.has_documents
    return batch if apart else replace(batch, documents=())


@most_masks
@each_form
def test_a_sample_in_a_pack_learns_as_it_does_alone(arch: str | None, mask: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits, its loss and what that sends back."""
    it = watched(arch, mask)
    together = in_form(it.pack(*PACKS), apart, monkeypatch)
    alone = it.batch(*(sample for row in PACKS for sample in row))
    assert together.num_targets == alone.num_targets  # and in the same order
    got, want = it.model(together), it.model(alone)
    with torch.no_grad():
        torch.testing.assert_close(it.model(together).logits, it.model(alone).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-5, atol=1e-5)
    grads = []
    for output in (got, want):
        it.model.zero_grad()
        (output.loss / alone.num_targets).backward()
        grads.append({name: p.grad for name, p in it.model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@each_mask
@each_form
def test_nothing_leaks_from_sample_to_sample(arch: str | None, mask: str, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing all words and images of one sample changes that sample's logits and no others."""
    it = watched(arch, mask)
    row = (THREE, ONE, NO_IMAGE, INTERLEAVED, TWICE)
    batch = in_form(it.pack(*[row] * (len(row) + 1)), apart, monkeypatch)  # row k has sample k changed, the last row none
    ids, numbers = batch.sample_ids, torch.arange(len(row) + 1)
    changed = (ids == numbers[:, None]) & (batch.kinds >= Kind.PROMPT)
    batch.input_ids[changed] = it.others(batch.input_ids[changed])
    if batch.images is not None:
        own = batch.image_index[batch.image_sample_ids == numbers[batch.image_rows]].unique()
        batch.images[own] = 255 - batch.images[own]
    logits = all_logits(it.model, batch)
    moved = changes(logits[:-1], logits[-1:]) > 1e-5
    assert torch.equal(moved, ids[:-1] == numbers[:-1, None]), "a sample changes the logits of another sample of its row"
