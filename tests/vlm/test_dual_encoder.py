"""The contrastive dual encoder: its losses against transformers and loops, ranks, and what its embeddings know."""

from __future__ import annotations

import math
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kempnerforge.config import DistributedConfig
from kempnerforge.config.adapter import AdapterConfig, MLPAdapterConfig, NoAdapterConfig
from kempnerforge.config.vlm_dual_encoder import DualEncoderConfig
from kempnerforge.distributed.world import start, stop
from kempnerforge.eval.generate import generate
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.dual_encoder import DualEncoder
from tests.dist import run_ranks
from tests.vlm.tiny import (
    ANSWERED,
    INTERLEAVED,
    LATE,
    NO_IMAGE,
    ONE,
    THREE,
    TWICE,
    TWO_IMAGES,
    Tiny,
    full,
    gradients,
    install,
    picture,
    tiny,
)

LOSSES = ("clip", "siglip")
both = pytest.mark.parametrize("loss", LOSSES)
OTHER = replace(ONE, images=(picture(20),))


def dual(loss: str = "clip", *, noise: float = 0.1, adapter: AdapterConfig | None = None, **keys: Any) -> Tiny:
    vlm = DualEncoderConfig(**{"max_text_len": 64, "freeze": [], "loss": loss, "embed_dim": 24, **keys})
    return tiny("dual_encoder", noise=noise, vlm=vlm, adapter=adapter or MLPAdapterConfig())


def arch(it: Tiny) -> DualEncoder:
    assert isinstance(it.model, DualEncoder)
    return it.model


# ---- the loss -----------------------------------------------------------------------------------------------------------


def of_transformers(loss: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 8}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if loss == "clip":
        return transformers.CLIPModel(
            transformers.CLIPConfig(text_config={**text, "eos_token_id": 49}, vision_config=vision, projection_dim=24)
        )
    return transformers.SiglipModel(transformers.SiglipConfig(text_config={**text, "projection_size": 16}, vision_config=vision))


@both
def test_loss_and_gradients_are_those_of_transformers(loss: str) -> None:
    """Of every weight of its towers, the scale and the bias included, for embeddings that its towers make."""
    theirs, ours = of_transformers(loss), arch(dual(loss, noise=0.0))
    pixels, ids = torch.randn(5, 3, 16, 16), torch.randint(1, 49, (5, 8))
    ids[:, -1] = 49
    assert ours.logit_scale.item() == pytest.approx(2.6592 if loss == "clip" else math.log(10), abs=1e-4)
    with torch.no_grad():
        theirs.logit_scale.fill_(2.1)
        ours.logit_scale.fill_(2.1)
        if loss == "siglip":
            assert ours.logit_bias is not None and ours.logit_bias.item() == -10
            theirs.logit_bias.fill_(-3.0)
            ours.logit_bias.fill_(-3.0)
    want = theirs(input_ids=ids, pixel_values=pixels, return_loss=True).loss
    want.backward()
    wanted = {name: p.grad.clone() for name, p in theirs.named_parameters() if p.grad is not None}
    theirs.zero_grad()
    images, texts = theirs.vision_model(pixel_values=pixels).pooler_output, theirs.text_model(input_ids=ids).pooler_output
    if loss == "clip":
        images, texts = theirs.visual_projection(images), theirs.text_projection(texts)
    got = ours.contrast(F.normalize(torch.stack([images, texts], 1), dim=-1), torch.arange(5)) / 5
    got.backward()
    torch.testing.assert_close(got, want)
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert ours.logit_scale.grad is not None
    found["logit_scale"] = ours.logit_scale.grad.view_as(theirs.logit_scale)
    if ours.logit_bias is not None:
        assert ours.logit_bias.grad is not None
        found["logit_bias"] = ours.logit_bias.grad.view_as(theirs.logit_bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert len(found) > 40


def by_hand(model: DualEncoder, embeddings: Tensor, images: list[int]) -> float:
    """Pair by pair; other texts of the same image do not count."""
    total, pairs = 0.0, range(len(images))
    scale = math.exp(model.logit_scale.item())
    negatives = {i: [j for j in pairs if j == i or images[j] != images[i]] for i in pairs}
    score = lambda i, j: float(embeddings[i, 0] @ embeddings[j, 1]) * scale
    for i in pairs:
        if model.logit_bias is not None:
            for j in negatives[i]:
                logit = score(i, j) + model.logit_bias.item()
                total += math.log1p(math.exp(-logit if i == j else logit))
        else:
            total -= 0.5 * (score(i, i) - math.log(sum(math.exp(score(i, j)) for j in negatives[i])))
            total -= 0.5 * (score(i, i) - math.log(sum(math.exp(score(j, i)) for j in negatives[i])))
    return total


@both
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_loss_by_hand(loss: str, pooling: str) -> None:
    """Three texts of one image and two of another; texts with no image or several are no pairs."""
    it = dual(loss, pooling=pooling)
    output = it.model(it.pack((THREE, ONE, TWO_IMAGES), (NO_IMAGE, TWICE, ANSWERED)))
    assert output.embeddings.shape == (6, 2, 24) and output.loss == 0
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(6, 2))
    want = by_hand(arch(it), output.embeddings, [0, 0, 0, 1, 2, 2])
    assert output.pair_loss.item() == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(output.mean(77, 6), output.pair_loss / 6)


def test_the_scale_ends_at_100() -> None:
    it = dual()
    with torch.no_grad():
        arch(it).logit_scale.fill_(6.0)
        got = it.model(it.batch(ONE, OTHER)).pair_loss
        arch(it).logit_scale.fill_(math.log(100))
        torch.testing.assert_close(it.model(it.batch(ONE, OTHER)).pair_loss, got)


# ---- what embeddings are made of ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "mask"), [(0.0, "causal"), (0.5, "causal"), (0.0, "bidirectional")])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_text_does_not_know_its_image(pooling: str, weight: float, mask: str) -> None:
    """Nor the other texts and samples of its row, nor padding; an image knows no text."""
    it = dual(pooling=pooling, caption_weight=weight, attention_mask=mask)
    batch = it.pack((THREE, ONE, TWICE), (OTHER,))
    want = it.model(batch).embeddings
    assert batch.images is not None
    other = it.model(replace(batch, images=255 - batch.images)).embeddings
    assert torch.equal(other[:, 1], want[:, 1]) and (other[:, 0] - want[:, 0]).abs().amax(-1).min() > 1e-4
    ids = torch.where(batch.pair_ids == 1, (batch.input_ids + 7) % 256, batch.input_ids)
    moved = (it.model(replace(batch, input_ids=ids)).embeddings - want).abs().amax(-1) > 1e-5  # (P, 2)
    assert moved.nonzero().tolist() == [[1, 1]]
    alone = it.model(it.batch(THREE, ONE, TWICE, OTHER, pad_to=70)).embeddings
    torch.testing.assert_close(alone, want, rtol=1e-4, atol=1e-5)


def test_pooling_takes_the_last_word_or_all() -> None:
    """With layers that add nothing, an embedding is of the words themselves; of an image it is of all its tokens."""
    for pooling in ("last", "mean"):
        it = dual(pooling=pooling)
        model = arch(it)
        batch = it.batch(ONE, TWICE)
        for layer in model.transformer.layers:
            torch.nn.init.zeros_(layer.attention.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        words = model.transformer.embed(batch.input_ids)
        for pair in range(3):
            row = words[batch.pair_ids == pair]
            assert batch.input_ids[batch.pair_ids == pair][-1] == it.encoder.tokenizer.eos_id
            pooled = row[-1] if pooling == "last" else row.mean(0)
            want = F.normalize(model.text_projection(model.transformer.norm(pooled)), dim=-1)
            torch.testing.assert_close(model(batch).embeddings[pair, 1], want, rtol=1e-5, atol=1e-6)
        features = model.features(batch)
        assert features is not None and features.shape[:2] == (2, 4)
        want = F.normalize(model.image_projection(features.sum(1)[batch.pair_images]), dim=-1)
        torch.testing.assert_close(model(batch).embeddings[:, 0], want, rtol=1e-5, atol=1e-6)


def test_an_image_without_a_projection() -> None:
    """Its tokens' mean is its embedding, in the width that they have."""
    it = dual(image_projection=False, embed_dim=32)
    batch = it.batch(ONE, OTHER)
    features = it.model.features(batch)
    assert features is not None and not [name for name, _ in it.model.named_parameters() if "image_projection" in name]
    torch.testing.assert_close(it.model(batch).embeddings[:, 0], F.normalize(features.mean(1), dim=-1))
    with pytest.raises(InputError, match="vlm.embed_dim = 24: image_projection = false, and the adapter gives tokens 32 wide"):
        dual(image_projection=False)
    other = dual(caption_weight=0.5, adapter=NoAdapterConfig())
    assert arch(other).image_projection.in_features == 16 != other.job.model.dim
    prompts = other.prompts([("what?", [0])], [picture(0)])
    assert len(generate(other.model.eval(), prompts, max_new_tokens=2, eos_id=-1)[0]) == 2


@both
def test_captions_and_contrast_together(loss: str) -> None:
    """The sum of both means, the caption's weighted; the words' loss is that of the model in evaluation."""
    it = dual(loss, caption_weight=0.5)
    batch = it.batch(ONE, THREE, NO_IMAGE, LATE)
    output = it.model(batch)
    it.model.eval()
    plain = it.model(batch)
    torch.testing.assert_close(output.loss, 0.5 * plain.loss)
    torch.testing.assert_close(output.mean(batch.num_targets, 4), 0.5 * plain.loss / batch.num_targets + plain.pair_loss / 4)
    assert it.model.gives == {"words", "embeddings"}
    plain = replace(it.batch(NO_IMAGE), images=None)  # as in a job without images
    torch.testing.assert_close(it.model(plain).loss, it.model(it.batch(NO_IMAGE)).loss)


def test_embeddings_alone_write_nothing() -> None:
    it = dual()
    assert it.model.gives == {"embeddings"}
    assert not [name for name, _ in it.model.named_parameters() if "cross_attention" in name]
    with pytest.raises(InputError, match=r"vlm\.caption_weight = 0: .*writes no text"):
        it.model(replace(it.batch(NO_IMAGE), images=None))
    with pytest.raises(InputError, match=r"vlm\.caption_weight = 0: .*writes no text"):
        generate(it.model, it.prompts([("what?", [0])], [picture(0)]), max_new_tokens=2, eos_id=1)


@pytest.mark.parametrize("samples", [(NO_IMAGE,), (ONE, TWO_IMAGES), (INTERLEAVED,)])
def test_too_few_pairs_are_an_error_in_training(samples: tuple[Any, ...]) -> None:
    it = dual()
    with pytest.raises(InputError, match=rf"exactly one image in a micro-batch of all ranks together: {int(ONE in samples)}; two"):
        it.model(it.batch(*samples))
    it.model.eval()
    assert it.model(it.batch(*samples)).pair_loss == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"loss": "triplet"}, "loss = 'triplet'"),
        ({"pooling": "first"}, "pooling = 'first'"),
        ({"embed_dim": 0}, "embed_dim = 0"),
        ({"caption_weight": -1.0}, "caption_weight = -1.0"),
        ({"attention_mask": "bidirectional", "caption_weight": 0.5}, "a word would see what it predicts, caption_weight = 0.5"),
        ({"attention_mask": "image_bidirectional"}, "attention_mask = 'image_bidirectional'"),
    ],
)
def test_bad_values(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DualEncoderConfig(**keys)


# ---- ranks --------------------------------------------------------------------------------------------------------------

SHARES = {
    "uneven": ((ONE, THREE, LATE), (OTHER, NO_IMAGE, TWICE, TWO_IMAGES, replace(ONE, images=(picture(21),)))),
    "one without pairs": ((NO_IMAGE, TWO_IMAGES), (ONE, OTHER, THREE)),
}
CASES = [(loss, weight, share) for loss in LOSSES for weight in (0.0, 0.5) for share in SHARES]


def test_two_ranks_are_one_process_with_all_pairs(tmp_path: Path) -> None:
    """Loss and all gradients under FSDP2 are those of the concatenated batch."""
    ended = run_ranks("tests.vlm.test_dual_encoder:two_ranks", 2, tmp_path)
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    for loss, weight, share in CASES:
        it = dual(loss, caption_weight=weight)
        want, grads = gradients(it.model, it.batch(*SHARES[share][0], *SHARES[share][1]))
        got = torch.load(tmp_path / f"{loss}-{weight}-{share}.pt", weights_only=True)
        torch.testing.assert_close(got.pop("loss"), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got, grads, rtol=1e-4, atol=1e-6)


def two_ranks(out: str) -> None:
    """Each rank has its own samples; rank 0 writes loss and whole gradients of every case."""
    try:
        torch.set_num_threads(1)
        world = start(DistributedConfig(timeout_s=60))
        for loss, weight, share in CASES:
            it = dual(loss, caption_weight=weight)
            install(it, world)
            batch = it.batch(*SHARES[share][world.rank])
            targets, pairs = map(int, world.sum([batch.num_targets, batch.num_pairs]))
            mean = it.model(batch).mean(targets, pairs)
            mean.backward()
            found = full({name: p.grad for name, p in it.model.named_parameters() if p.grad is not None})
            (found["loss"],) = map(torch.tensor, world.sum([mean.item()]))
            if world.is_main:
                torch.save(found, f"{out}/{loss}-{weight}-{share}.pt")
        stop()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
