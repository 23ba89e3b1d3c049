"""Embeddings of frames and of images in the resampler, against OpenFlamingo's equations over (T, F, v, D)."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kempnerforge.config.adapter import PerceiverConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.vlm import JointDecoderConfig
from kempnerforge.data.sample import Sample, Text
from kempnerforge.inspection.audit import audit
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.training.initial_weights import initialise
from tests.data.images.test_video import recorded
from tests.vlm.test_openflamingo import HEAD_DIM, HEADS, LATENTS, RESAMPLER, WIDE, checkpoint, ours
from tests.vlm.tiny import Tiny, picture, shake
from tests.vlm.views import asked, generation_is_the_full_forward_pass, samples_are_as_alone

FRAMES, MEDIA = 3, 4
ADAPTER = PerceiverConfig(
    latents=LATENTS, depth=2, heads=HEADS, head_dim=HEAD_DIM, project=False, max_num_frames=FRAMES, max_num_media=MEDIA
)
torch.manual_seed(1)
FRAME_EMBS, MEDIA_TIME_EMBS = torch.randn(FRAMES, WIDE), torch.randn(MEDIA, 1, WIDE)


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    return [recorded([20 * k for k in range(12)], half=90), recorded([250 - 20 * k for k in range(12)], half=10)]


def samples(clips: list[bytes]) -> list[Sample]:
    return [
        Sample("clip, picture, clip", (clips[0], picture(1), clips[1]), (Text("is <image> like <image> or <image>?", "no"),)),
        Sample("two texts of a clip", (clips[1],), (Text("what?", "red"), Text("is it red?", "yes"))),
        Sample("none", (), (Text("what?", "no"),)),
        Sample("picture, clip", (picture(1), clips[0]), (Text("is <image> like <image>?", "yes"),)),
    ]


def build(path: Path | str = "", adapter: PerceiverConfig = ADAPTER, **keys: Any) -> Tiny:
    data = JsonlConfig(path="unread.jsonl", images=ImagesConfig(frames=FRAMES))
    return ours(path, adapter=adapter, **{"data": data, **keys})


def theirs(features: Tensor, media: int) -> Tensor:
    """(F, v, D), the image with this number -> (T, D)."""
    x = features + FRAME_EMBS[: len(features)].double()[:, None]
    return deepcopy(RESAMPLER).double()(x.flatten(0, 1)[None] + MEDIA_TIME_EMBS[media].double())[0]


def test_the_resampler_is_that_of_the_equations(clips: list[bytes], tmp_path: Path) -> None:
    tensors = checkpoint() | {"perceiver.frame_embs": FRAME_EMBS, "perceiver.media_time_embs": MEDIA_TIME_EMBS}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "c.safetensors")
    it = build(tmp_path / "c.safetensors")
    initialise(it.model)
    it.model.double()
    batch = it.batch(*samples(clips))
    assert batch.images is not None and len(batch.images) == 7 + 3 + 4 and batch.row_images == 3
    assert batch.image_index.tolist() == [0, 3, 4, 7, 10, 11]
    eos = it.encoder.tokenizer.eos_id
    assert audit(batch, eos, ends=frozenset({eos}), every_turn=True, markers=it.encoder.marker_ids) == []
    with torch.no_grad():
        seen, got = it.model.vision_encoder(batch.images), it.model.features(batch)
        assert got is not None
        for first, views, media in ((0, 3, 0), (3, 1, 1), (4, 3, 2), (7, 3, 0), (10, 1, 0), (11, 3, 1)):
            torch.testing.assert_close(got[first], theirs(seen[first : first + views], media), rtol=0, atol=1e-12)
            assert not got[first + 1 : first + views].any()


def test_embeddings_of_frames_alone(clips: list[bytes]) -> None:
    """Without ``max_num_media`` images of a sample are not told apart; the other way round frames are not."""
    for keys in ({"max_num_media": 0}, {"max_num_frames": 0}):
        it = build(adapter=replace(ADAPTER, **keys))
        names = {name for name, _ in it.model.named_parameters() if "_embs" in name}
        assert names == {"adapter.frame_embs" if "max_num_media" in keys else "adapter.media_time_embs"}
        features = torch.randn(4, 5, WIDE)
        with torch.no_grad():
            got = it.model.adapter(features, views=[(0, 0), (0, 1), (1, 0), (1, 1)])  # type: ignore[call-arg]
            swapped = it.model.adapter(features[[1, 0, 3, 2]], views=[(0, 0), (0, 1), (1, 0), (1, 1)])  # type: ignore[call-arg]
            other = it.model.adapter(features, views=[(1, 0), (1, 1), (0, 0), (0, 1)])  # type: ignore[call-arg]
        assert torch.allclose(got, swapped, atol=1e-5) == ("max_num_frames" in keys)
        assert torch.equal(got, other) == ("max_num_media" in keys)


def test_a_sample_in_a_pack_or_beside_others_is_as_alone(clips: list[bytes]) -> None:
    it = build()
    shake(it.model, 0.3)
    samples_are_as_alone(it, samples(clips), ("adapter.frame_embs", "adapter.media_time_embs", "vision_encoder"))
    assert it.encoder.measure(samples(clips)[0]) == (it.encode(samples(clips)[0]).table.shape[1], 7)


def test_generation_with_a_cache_is_the_full_forward_pass(clips: list[bytes]) -> None:
    it = build()
    shake(it.model, 0.3)
    rows = [("is <image> like <image>?", (clips[0], picture(1))), ("what?", ()), ("is it <image>", (picture(1),))]
    generation_is_the_full_forward_pass(it, rows)
    shown = asked(it, rows)
    assert [(part.image, part.view) for part in shown.image_parts] == [(0, 0), (0, 1), (0, 2), (1, 0), (0, 0)]


def test_an_image_that_prompts_share_under_two_numbers_is_there_twice() -> None:
    """As with examples that are drawn for several questions."""
    it = build()
    asked = "<image> and <image>?"
    prompts = it.prompts([(asked, [0, 1]), (asked, [1, 1]), (asked, [0, 0])], [picture(0), picture(1)])
    assert prompts.images is not None and prompts.image_index.tolist() == [0, 1, 2, 1, 0, 3]
    assert [part.image for part in prompts.image_parts] == [0, 1, 0, 1]
    assert torch.equal(prompts.images[[0, 2]], prompts.images[[3, 1]])


def test_flops_depend_on_how_views_are_joined(clips: list[bytes]) -> None:
    it = build()
    names = frozenset(name for name, _ in it.model.named_parameters())
    of_a_clip = Sample("", (clips[0],), (Text("is it red?", "no"),))
    of_pictures = Sample("", tuple(map(picture, (1, 2, 3))), (Text("is it red?", "no"),))
    counter = TrainingFlops(it.job)
    found = [counter.count(it.batch(sample), names) for sample in (of_a_clip, of_pictures)]
    assert found[0] < found[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: build(vlm=JointDecoderConfig(max_text_len=64, freeze=[]), adapter=replace(ADAPTER, project=True)), "image tokens in the stream"),
        (lambda: build(data=JsonlConfig(path="u", images=ImagesConfig(frames=4))), "data.images.frames = 4: adapter.max_num_frames = 3"),
        (lambda: build(data=JsonlConfig(path="u", images=ImagesConfig(frames=2, frame_times=True))), "not with .* frame_times"),
        (lambda: build(data=JsonlConfig(path="u", images=ImagesConfig(fit="tiles", tiling="anyres", markers=False))), "not with .*fit = 'tiles'"),
        (lambda: build().encode(Sample("5", tuple(map(picture, range(5))), (Text("what?", "no"),))), "5 images in a sample, .*max_num_media = 4"),
        (lambda: replace(ADAPTER, max_num_frames=-1), "max_num_frames = -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change()
