"""Images of a NaFlex encoder with more rows or columns than its square (``data.images.longer_sides``), against the tower of
transformers on each image alone."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from kempnerforge.config import TrainConfig
from kempnerforge.config.adapter import AvgPoolConfig, LinearAdapterConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.vision import Siglip2Config
from kempnerforge.data.images.tiling import native_grid
from kempnerforge.data.sample import Sample, Text
from kempnerforge.inspection.audit import audit
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.util.errors import InputError
from tests.data.samples import noise
from tests.training.tiny import call, make_job
from tests.vlm.test_native import build
from tests.vlm.tiny import MODEL, Tiny
from tests.vlm.views import generation_is_the_full_forward_pass, samples_are_as_alone

PATCH, SIDE = 2, 8
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_patches": SIDE**2}
NAFLEX = Siglip2Config(settings={"model_type": "siglip2_vision_model", "patch_size": PATCH, **SIZES})
LONGER = ImagesConfig(fit="native", longer_sides=True)
STRIPE, TOWER, SMALL, WHOLE = noise(64, 8, 0), noise(6, 40, 1), noise(5, 9, 2), noise(16, 16, 3)
SAMPLES = [
    Sample("leading", (STRIPE,), (Text("what colour is it?", "red"), Text("is it red?", "yes"))),
    Sample("among words", (TOWER, SMALL), (Text("is <image> like <image> ?", "no"),)),
    Sample("inside an answer", (WHOLE,), (Text("what?", "red <image> blue"),)),
    Sample("none", (), (Text("what?", "no"),)),
]


def longer(arch: str = "joint_decoder", images: ImagesConfig = LONGER, **sections: Any) -> Tiny:
    train = TrainConfig(max_steps=4, seq_len=200, mixed_precision="fp32")
    sections = {"model": replace(MODEL, max_seq_len=256), "adapter": LinearAdapterConfig(), "train": train, **sections}
    it = build(arch, images=images, **{"vision_encoder": NAFLEX, **sections})
    with torch.no_grad():
        it.model.vision_encoder.get_parameter("tower.embeddings.position_embedding.weight").normal_()
    return it


def alone(it: Tiny, image: bytes, rows: int, columns: int) -> Tensor:
    """(rows, columns, D) patch features of transformers' tower: the image at this size, no padding."""
    pixels = Image.open(io.BytesIO(image)).convert("RGB").resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    encoder: Any = it.model.vision_encoder
    x = (torch.from_numpy(np.array(pixels)).float() / 255 - encoder.mean.view(3)) / encoder.std.view(3)  # (H, W, 3)
    patches = x.view(rows, PATCH, columns, PATCH, 3).transpose(1, 2).reshape(1, rows * columns, -1)
    found = encoder.tower(patches, None, torch.tensor([[rows, columns]]), output_hidden_states=True)
    return found.last_hidden_state[0].view(rows, columns, -1)


@pytest.mark.parametrize("factor", [1, 2])
@torch.no_grad()
def test_tokens_are_those_of_transformers(factor: int) -> None:
    """64 patches: 3 x 21 of 64 x 8 pixels, and so on; with ``factor`` 2 neighbours of the image are joined, not of the square."""
    it = longer(adapter=AvgPoolConfig(factor=factor))
    cell = PATCH * factor
    grids = {1: [(3, 21), (20, 3), (4, 2), (8, 8)], 2: [(1, 11), (8, 2), (2, 1), (4, 4)]}[factor]
    images = [STRIPE, TOWER, SMALL, WHOLE]
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    assert [native_grid(size, 16, cell, longer=True) for size in sizes] == grids
    batch = it.batch(*(Sample("one", (image,), (Text("what?", "no"),)) for image in images))
    assert [part[:2] for part in batch.image_parts] == grids and batch.images is not None and batch.images.shape[-1] == 16
    features = it.model.features(batch)
    stream = it.model.insert(it.model.transformer.embed(batch.input_ids), features, batch)
    for row, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        want = alone(it, image, rows * factor, columns * factor)
        want = want.unflatten(1, (columns, factor)).unflatten(0, (rows, factor)).mean((1, 3)).flatten(0, 1)
        torch.testing.assert_close(stream[row, : rows * columns], it.model.adapter.get_submodule("proj")(want), rtol=1e-4, atol=1e-5)
        assert int((batch.kinds[row] == 1).sum()) == rows * columns


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_there_are_never_more_tokens_than_in_the_square(width: int, height: int) -> None:
    """The shape is kept as far as whole tokens let it be; images that fit are not enlarged."""
    rows, columns = native_grid((width, height), 64, 4, longer=True)
    assert min(rows, columns) >= 1 and rows * columns <= 256
    assert native_grid((height, width), 64, 4, longer=True) == (columns, rows)
    assert rows <= max(1, round(height / 4)) and columns <= max(1, round(width / 4))
    if width * height <= 64 * 64 and max(width, height) <= 64:
        assert (rows, columns) == native_grid((width, height), 64, 4)


@pytest.mark.parametrize("arch", ["joint_decoder", "mot", "moma"])
def test_samples_and_generation(arch: str) -> None:
    it = longer(arch, adapter=AvgPoolConfig(factor=2))
    samples_are_as_alone(it, SAMPLES, ("vision_encoder", "adapter.proj"))
    assert it.encoder.measure(SAMPLES[1]) == (it.encode(SAMPLES[1]).table.shape[1], 2)
    rows = [("what colour is it?", (STRIPE,)), ("is <image> like <image> ?", (SMALL, TOWER)), ("what?", ()), ("is it <image>", (WHOLE,))]
    generation_is_the_full_forward_pass(it, rows)
    batch, eos = it.batch(*SAMPLES), it.encoder.tokenizer.eos_id
    assert audit(batch, eos, ends=frozenset({eos}), every_turn=True, markers=frozenset()) == []


def test_the_encoder_costs_no_more_than_for_the_square() -> None:
    it = longer()
    names = frozenset(name for name, _ in it.model.named_parameters() if name.startswith("vision_encoder"))
    sample = Sample("", (STRIPE,), (Text("what?", "no"),))
    with torch.no_grad():
        assert it.model.vision_encoder(it.batch(sample).images).shape[1] == SIDE**2  # type: ignore[union-attr]
    stripe, square = (TrainingFlops(it.job).count(it.batch(replace(sample, images=(image,))), names) for image in (STRIPE, WHOLE))
    assert stripe <= square


def test_a_run_of_them_is_trained_and_asked(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    for number, content in enumerate((STRIPE, TOWER, SMALL)):
        (tmp_path / f"{number}.png").write_bytes(content)
    settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in NAFLEX.settings.items())
    encoder = f'[vision_encoder]\ntype = "siglip2"\nsettings = {{ {settings} }}\n'
    job.write_text(re.sub(r"\[vision_encoder\]\n([^\[].*\n)*", encoder, job.read_text()))
    keys = ("--adapter.type=linear", "--vlm.freeze=[]", "--vlm.max_text_len=48")
    sizes = ("--data.images.fit=native", "--data.images.longer_sides=true", "--train.seq_len=128", "--model.max_seq_len=128")
    for words in (
        ("train", job, *keys, *sizes, "--train.max_steps=2"),
        ("generate", tmp_path / "run", tmp_path / "1.png", "--prompt", "what?"),
    ):
        ended = call(*words)
        assert ended.code == 0, ended.err


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match=r"longer_sides = true: needs a NaFlex 'siglip2'"):
        build(images=LONGER)
    with pytest.raises(InputError, match=r"longer_sides = True: only fit = 'native' reads it"):
        ImagesConfig(longer_sides=True)
