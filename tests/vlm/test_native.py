"""Images that keep their shape (``data.images.fit = "native"``): as many tokens as their shape has, in every arch that has tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kempnerforge.config import TrainConfig
from kempnerforge.config.adapter import AvgPoolConfig, PerceiverConfig
from kempnerforge.config.data import JsonlConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.vision import Siglip2Config, SiglipConfig
from kempnerforge.data.batching.batch import Kind, Part
from kempnerforge.data.images.tiling import native_grid
from kempnerforge.data.sample import Sample, Text
from kempnerforge.data.sources.mixture import MixtureConfig
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.model.vit import ViT
from kempnerforge.training.accounting import TrainingFlops
from kempnerforge.util.errors import InputError
from tests.data.samples import noise
from tests.interop.tiny_vlms import GRIDS
from tests.training.tiny import call, make_job
from tests.vlm.test_grids import GRID_OF_4, INNER, SECTIONS
from tests.vlm.tiny import MODEL, Tiny, all_logits, tiny
from tests.vlm.views import asked, generation_is_the_full_forward_pass, samples_are_as_alone

NATIVE = ImagesConfig(fit="native")
WIDE, TALL, SMALL, WHOLE = noise(40, 15, 0), noise(9, 30, 1), noise(5, 9, 2), noise(16, 16, 3)
"""With cells of 4 pixels in a square of 16: 2 x 4, 4 x 1, 2 x 1 and 4 x 4 tokens."""
SAMPLES = [
    Sample("leading", (WIDE,), (Text("what colour is it?", "red"), Text("is it red?", "yes"))),
    Sample("among words", (TALL, WIDE), (Text("is <image> like <image> ?", "no"),)),
    Sample("inside an answer", (SMALL,), (Text("what?", "red <image> blue"),)),
    Sample("none", (), (Text("what?", "no"),)),
    Sample("in front", (TALL,), (Text("what?", "yes"),)),
]
CASES = [("joint_decoder", "image_bidirectional"), ("mot", "causal"), ("mot", "image_bidirectional"), ("moma", "causal")]
each_arch = pytest.mark.parametrize(("arch", "mask"), CASES)


def parts(*grids: tuple[int, int]) -> tuple[Part, ...]:
    return tuple(Part(*grid) for grid in grids)


def build(arch: str = "joint_decoder", mask: str = "causal", images: ImagesConfig = NATIVE, **sections: Any) -> Tiny:
    train = TrainConfig(max_steps=4, seq_len=96, mixed_precision="fp32")
    sections = {
        "model": SECTIONS,
        "vision_encoder": INNER,
        "data": JsonlConfig(path="unread.jsonl", images=images),
        "train": train,
        **sections,
    }
    it = tiny(arch, mask, noise=0.3, **sections)
    it.model.train(it.model.causal_in_training)
    return it


# ---- shapes -------------------------------------------------------------------------------------------------------------------------


def test_grids_keep_the_shape_and_never_grow() -> None:
    sizes = {(40, 15): (2, 4), (9, 30): (4, 1), (5, 9): (2, 1), (16, 16): (4, 4), (160, 160): (4, 4), (1, 1): (1, 1), (300, 2): (1, 4)}
    assert {size: native_grid(size, 16, 4) for size in sizes} == sizes


def test_a_row_has_the_tokens_of_each_image() -> None:
    it = build()
    batch = it.batch(*SAMPLES)
    assert batch.image_parts == parts((2, 4), (4, 1), (2, 4), (2, 1), (4, 1)) and batch.row_image_tokens == 12
    assert (batch.kinds == Kind.IMAGE).sum(1).tolist() == [8, 12, 2, 0, 4]
    assert it.encoder.measure(SAMPLES[1]) == (it.encode(SAMPLES[1]).table.shape[1], 2)
    mean = it.batch(SAMPLES[2]).images
    assert mean is not None and mean[0, :, 8:].eq(127).all() and mean[0, :, :, 4:].eq(127).all() and not mean[0, :, :8, :4].eq(127).all()


def test_the_encoder_sees_the_part_alone() -> None:
    """The features are those of a smaller encoder with the same weights, and what is outside changes none."""
    large, small = ViT(GRID_OF_4).eval(), ViT(replace(GRID_OF_4, image_size=8)).eval()
    state = large.state_dict()
    state["position_embedding"] = state["position_embedding"].view(4, 4, -1)[:2, :2].reshape(4, -1)
    small.load_state_dict(state)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = large(pixels, [(2, 2), (4, 4)])
    torch.testing.assert_close(got[0].view(4, 4, -1)[:2, :2].flatten(0, 1), small(pixels[:1, :, :8, :8])[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], large(pixels)[1], rtol=1e-5, atol=1e-6)


def test_naflex_is_that_of_transformers() -> None:
    """Each image alone, with positions of its shape and no padding."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_patches": 16,
        "patch_size": 4,
    }
    cfg = Siglip2Config(settings={"model_type": "siglip2_vision_model", **sizes}, feature_layer=[-1, -2])
    torch.manual_seed(0)
    tower: Any = build_vision_encoder(cfg).eval()
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.normal_()
    assert (tower.side, tower.image_size) == (4, 16)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grids = [(2, 3), (4, 1), (4, 4)]
    got = tower(pixels, grids)
    for image, (rows, columns) in enumerate(grids):
        part = tower.normalise(pixels[image : image + 1])[:, :, : 4 * rows, : 4 * columns]
        patches = part.unflatten(2, (rows, 4)).unflatten(4, (columns, 4)).permute(0, 2, 4, 3, 5, 1).reshape(1, rows * columns, -1)
        found = tower.tower(patches, None, torch.tensor([[rows, columns]]), output_hidden_states=[-2])
        want = torch.cat([found.last_hidden_state, found.hidden_states[-2]], dim=-1)
        torch.testing.assert_close(got[image].view(4, 4, -1)[:rows, :columns].flatten(0, 1), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[2], tower(pixels)[2], rtol=1e-5, atol=1e-5)


# ---- archs --------------------------------------------------------------------------------------------------------------------------


@each_arch
def test_whole_images_are_as_without(arch: str, mask: str) -> None:
    sample = Sample("whole", (WHOLE, WHOLE), (Text("is <image> like <image> ?", "no"),))
    logits = [all_logits(it.model, it.batch(sample)) for it in (build(arch, mask), build(arch, mask, ImagesConfig()))]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@each_arch
def test_a_sample_in_a_pack_or_beside_others_is_as_alone(arch: str, mask: str) -> None:
    samples_are_as_alone(build(arch, mask), SAMPLES, ("vision_encoder", "adapter.deepstack.1", "adapter.proj"))


@pytest.mark.parametrize("arch", ["joint_decoder", "mot", "moma"])
def test_a_mixture_of_fits_is_each_of_them(arch: str) -> None:
    """Images of which a part is in the stream, beside tiles and whole ones."""
    tiles = ImagesConfig(fit="tiles", tiling="anyres", markers=False)
    sections = [JsonlConfig(path="unread.jsonl", images=images) for images in (NATIVE, tiles, ImagesConfig())]
    samples = [replace(sample, part=part) for part, sample in enumerate((SAMPLES[1], SAMPLES[0], SAMPLES[4]))]
    it = build(arch, data=MixtureConfig(parts=list(sections)))
    it.model.eval()
    with torch.no_grad():
        alone = [it.model(it.batch(sample)).loss for sample in samples]
        for chosen in ((0, 1, 2), (2, 0), (1, 0), (2, 1)):
            got = it.model(it.batch(*(samples[k] for k in chosen))).loss
            torch.testing.assert_close(got, torch.stack([alone[k] for k in chosen]).sum(), rtol=1e-5, atol=1e-5)


@each_arch
def test_generation_with_a_cache_is_the_full_forward_pass(arch: str, mask: str) -> None:
    it = build(arch, mask)
    rows = [("what colour is it?", (WIDE,)), ("is <image> like <image> ?", (SMALL, TALL)), ("what?", ()), ("is it <image>", (WHOLE,))]
    assert asked(it, rows).image_parts == parts((2, 4), (2, 1), (4, 1), (4, 4))
    generation_is_the_full_forward_pass(it, rows)


def test_flops_are_counted_without_values() -> None:
    it, found = build(), list[int]()
    for sample in (SAMPLES[2], SAMPLES[4]):
        found.append(TrainingFlops(it.job).count(it.batch(sample), frozenset(name for name, _ in it.model.named_parameters())))
    assert 0 < found[1] < 1.2 * found[0]


def test_positions_are_those_of_transformers() -> None:
    """An image counts as many positions as its longer side has tokens."""
    it, theirs = build(), GRIDS["qwen3_vl"]().model
    batch = it.batch(SAMPLES[1], SAMPLES[2], SAMPLES[4])
    grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns, *_ in batch.image_parts])
    used = batch.kinds != Kind.PAD
    want, _ = theirs.get_rope_index(batch.input_ids, (batch.kinds == Kind.IMAGE).int(), grid, attention_mask=used)
    assert torch.equal(it.model.rope_positions(batch, None) * used, want)


# ---- what goes with what ------------------------------------------------------------------------------------------------------------


def test_adapters_join_neighbours_inside_the_image() -> None:
    it = build(adapter=AvgPoolConfig(factor=2))
    assert it.model.cell == 8 and it.batch(SAMPLES[1]).image_parts == parts((2, 1), (1, 2))
    assert it.model(it.batch(*SAMPLES)).loss.isfinite()


@pytest.mark.parametrize(
    "sections",
    [
        {"adapter": PerceiverConfig(latents=16), "model": MODEL},
        {"vision_encoder": replace(GRID_OF_4, cls_token=True), "model": MODEL},
        {"vision_encoder": replace(GRID_OF_4, patch_size=6, stride=4)},
        {
            "vision_encoder": SiglipConfig(
                settings={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
            )
        },
    ],
)
def test_what_cannot_see_a_part_is_refused(sections: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="fit = 'native': needs an encoder that sees a part of its square"):
        build(**sections)


def test_it_needs_image_tokens_in_the_stream() -> None:
    job = replace(tiny("cross_attention").job, data=JsonlConfig(path="unread.jsonl", images=NATIVE))
    with pytest.raises(InputError, match=r"images.fit = 'native': vlm.arch = 'cross_attention' has no image tokens in the stream"):
        job.validate()


def test_a_run_of_them_is_inspected_trained_and_asked(tmp_path: Path) -> None:
    """Evaluation asks without images, too, with as many blank tokens."""
    job = make_job(tmp_path)
    for number, content in enumerate((WIDE, TALL, SMALL)):
        (tmp_path / f"{number}.png").write_bytes(content)
    keys = ("--data.images.fit=native", "--model.rope_sections=[4,2,2]", "--data.batching=pack", "--train.max_steps=2")
    found = json.loads(call("data", "check", job, *keys, "--json").out)["sources"][0]
    assert found["bad"] == 0 and found["totals"]["views"] == 16
    for words in (("inspect", job, *keys), ("train", job, *keys), ("generate", tmp_path / "run", tmp_path / "1.png", "--prompt", "what?")):
        ended = call(*words)
        assert ended.code == 0, ended.err
    scores = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("eval/exact_match_blind" in line for line in scores)
