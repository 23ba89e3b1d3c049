"""Embeddings of padding (Molmo's ``pad_and_partial_pad``), against masks that are read off the pixels of a white image."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.images import AugmentConfig, ImagesConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import CrossAttentionConfig
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.sources.mixture import MixtureConfig
from kempnerforge.model.attention_pool import AttentionPoolConfig, padding_of
from kempnerforge.util.errors import InputError
from tests.training.tiny import call, make_job
from tests.vlm.test_tile_rows import ANYRES, WRITTEN, build
from tests.vlm.tiny import Tiny, gradients
from tests.vlm.views import generation_is_the_full_forward_pass, samples_are_as_alone

PATCH, SIDE = 2, 8
ENCODER = ViTConfig(image_size=16, patch_size=PATCH, dim=16, n_layers=1, n_heads=2)
POOL = AttentionPoolConfig(factor=2, heads=2, head_dim=8, pad_embed=True)
TILES = [replace(ANYRES, rows=False), replace(WRITTEN, overlap=0.5), ImagesConfig(fit="tiles", max_side=32, markers=False)]
FITS = [ImagesConfig(fit="letterbox"), ImagesConfig(), *TILES]
FITTED = ("letterbox", "native", "squash")
SIZES = [(40, 15), (9, 30), (30, 30), (64, 5), (3, 31)]


def pad_build(images: ImagesConfig, arch: str = "joint_decoder", **keys: Any) -> Tiny:
    it = build(arch, images, vision_encoder=ENCODER, **{"adapter": POOL, **keys})
    it.model.double()
    return it


def white(width: int, height: int) -> bytes:
    Image.new("RGB", (width, height), (255, 255, 255)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def sample(*images: bytes) -> Sample:
    return Sample("one", images, (Text("what?", "no"),))


@pytest.mark.parametrize("images", FITS, ids=lambda cfg: f"{cfg.fit}-{cfg.tiling}")
@torch.no_grad()
def test_the_vectors_are_added_where_theirs_are(images: ImagesConfig) -> None:
    """Their code: the share of a patch's pixels that are of the image; ``pad_embed[0]`` where it is 0, ``pad_embed[1]`` where it is
    between 0 and 1."""
    it = pad_build(images)
    seen = set[int]()
    for size in SIZES:
        batch = it.batch(sample(white(*size)))
        assert batch.images is not None
        shown = (batch.images == 255).all(1).double()  # (N, H, W)
        share = shown.unflatten(1, (SIDE, PATCH)).unflatten(3, (SIDE, PATCH)).mean((2, 4)).flatten(1)  # (N, patches)
        want = it.model.vision_encoder(batch.images)
        pad_embed = it.model.adapter.get_parameter("pad_embed")
        want = want + pad_embed[0] * (share == 0)[..., None] + pad_embed[1] * ((share > 0) & (share < 1))[..., None]
        kept = pad_embed.clone()
        got = it.model.features(batch)
        pad_embed.zero_()
        torch.testing.assert_close(got, it.model.adapter(want), rtol=0, atol=1e-12)
        pad_embed.copy_(kept)
        seen |= {0} if (share == 0).any() else set()
        seen |= {1} if ((share > 0) & (share < 1)).any() else set()
    assert seen == ({0, 1} if images.fit == "letterbox" or images.tiling != "grid" else set())


def test_patches_by_hand() -> None:
    """A view of 6 pixels in 3 x 3 patches whose rows 0 to 3 and columns 1 to 6 show the image."""
    assert padding_of(torch.tensor([[0, 1, 3, 6, 6]]), 3).tolist() == [[2, 0, 0, 2, 2, 2, 1, 1, 1]]


@pytest.mark.parametrize("arch", ["joint_decoder", "mot", "moma", "cross_attention"])
def test_samples_and_generation(arch: str) -> None:
    """As alone in packs, and with a cache; changes of the pixels leave what is padding as it is."""
    vlm = CrossAttentionConfig(max_text_len=64, freeze=[], cross_attention_every_n_layers=2)
    images = replace(FITS[0], augment=AugmentConfig(flip=0.5, crop_scale=0.5))
    it = pad_build(images, arch, **({"vlm": vlm} if arch == "cross_attention" else {}))
    texts = (Text("what colour is it?", "red"), Text("is it red?", "yes"))
    wide, tall = white(40, 15), white(9, 30)
    samples = [Sample("a", (wide,), texts), Sample("b", (tall, wide), texts[:1]), Sample("c", (), texts), Sample("d", (tall,), texts[1:])]
    samples_are_as_alone(it, samples, ("adapter.pad_embed",))
    _, grads = gradients(it.model, it.batch(samples[2]))
    assert "adapter.pad_embed" in grads
    generation_is_the_full_forward_pass(it, [("what colour is it?", (wide,)), ("is <image> like <image> ?", (tall, wide)), ("what?", ())])
    trained = [it.encoder.encode(samples[1], seed=seed, training=True) for seed in (1, 2)]
    assert trained[0].image_parts == trained[1].image_parts == it.encode(samples[1]).image_parts


def test_a_mixture_of_fits_is_each_of_them() -> None:
    """Images of which a part is in the stream and none is padding, beside views that are filled up."""
    it = pad_build(FITS[0], data=MixtureConfig(parts=[JsonlConfig(path="unread.jsonl", images=ImagesConfig(fit=fit)) for fit in FITTED]))
    it.model.eval()
    samples = [replace(sample(white(40, 15)), part=part) for part in range(len(FITTED))]
    with torch.no_grad():
        alone = [it.model(it.batch(one)).loss for one in samples]
        assert len({float(loss) for loss in alone}) == len(FITTED)
        torch.testing.assert_close(it.model(it.batch(*samples)).loss, torch.stack(alone).sum(), rtol=1e-9, atol=1e-9)


def test_without_the_option_nothing_is_told() -> None:
    it = build(images=FITS[0], vision_encoder=ENCODER, adapter=replace(POOL, pad_embed=False))
    assert it.batch(sample(white(40, 15))).image_parts == ()
    assert "adapter.pad_embed" not in dict(it.model.named_parameters())


def test_videos_are_refused() -> None:
    pytest.importorskip("av")
    with pytest.raises(InputError, match=r"data.images.frames = 2: adapter.pad_embed is for images alone"):
        build(images=ImagesConfig(frames=2), vision_encoder=ENCODER, adapter=POOL)


def test_a_run_of_them_is_inspected_trained_and_asked(tmp_path: Path) -> None:
    """Evaluation asks without images, too."""
    job = make_job(tmp_path)
    keys = ("--adapter.type=attention_pool", "--adapter.pad_embed=true", "--data.images.fit=letterbox", "--train.max_steps=2")
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(white(*np.random.default_rng(0).integers(9, 40, 2).tolist()))
    for words in (("inspect", job, *keys), ("train", job, *keys), ("generate", tmp_path / "run", tmp_path / "1.png", "--prompt", "what?")):
        ended = call(*words)
        assert ended.code == 0, ended.err
