"""Positions by row and column (M-RoPE), and features of inner layers (DeepStack), compared with Qwen2.5-VL and Qwen3-VL of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kempnerforge.config import JobConfig, ModelConfig
from kempnerforge.config.adapter import AvgPoolConfig, LinearAdapterConfig, PerceiverConfig
from kempnerforge.config.vision import EfficientNetLite0Config, SiglipConfig, ViTConfig
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.batching.known_features import KnownFeatures
from kempnerforge.data.sample import Sample, Text
from kempnerforge.interop.families import hf_name
from kempnerforge.model.rope import rope_tables
from kempnerforge.model.vision import build_vision_encoder
from kempnerforge.util.errors import InputError
from tests.interop.tiny_vlms import GRIDS
from tests.vlm.tiny import ANSWERED, INTERLEAVED, LATE, MODEL, NO_IMAGE, ONE, SAMPLES, THREE, TWICE, VISION, Tiny, all_logits, picture, tiny

GRID_OF_4 = replace(VISION, patch_size=4, n_layers=3)
INNER = replace(GRID_OF_4, deepstack_layers=[-2, -3])
SECTIONS = replace(MODEL, rope_sections=[4, 2, 2])
BLIND = Sample("no image", (), (Text("what?", "no"),))
PROMPTS = [("what colour?", [0]), ("is <image> like <image>, <image>?", [1, 0, 2]), ("what?", [])]


def decoder(**sections: Any) -> Tiny:
    it = tiny("joint_decoder", **{"model": SECTIONS, "vision_encoder": GRID_OF_4, **sections})
    it.model.eval()
    return it


def prompts(it: Tiny) -> Batch:
    return it.prompts(PROMPTS, [picture(k) for k in range(3)])


# ---- positions ----------------------------------------------------------------------------------------------------------------------


def walked(batch: Batch, side: int) -> torch.Tensor:
    """(3, B, S), written down from the rules: a sample begins at 0, each of its texts goes on after the shared part."""
    found = torch.zeros(3, *batch.kinds.shape, dtype=torch.int64)
    starts = set(zip(batch.image_rows.tolist(), batch.image_starts.tolist(), strict=True))
    for row, column in (batch.kinds != Kind.PAD).nonzero().tolist():
        sample, text = int(batch.sample_ids[row, column]), int(batch.text_ids[row, column])
        before = (batch.sample_ids[row] == sample) & ((batch.text_ids[row] == 0) | (batch.text_ids[row] == text))
        before &= torch.arange(len(before)) < column
        firsts = [start for r, start in starts if r == row and (before[start] or start == column)]
        words, images = int((before & (batch.kinds[row] >= Kind.PROMPT)).sum()), len(firsts)
        if batch.kinds[row, column] == Kind.IMAGE:
            place, begin = column - max(firsts), words + (images - 1) * side
            found[:, row, column] = torch.tensor([begin, begin + place // side, begin + place % side])
        else:
            found[:, row, column] = words + images * side
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_positions_are_counted_row_by_row(packed: bool) -> None:
    it = decoder()
    batch = it.pack((THREE, ONE, LATE), (NO_IMAGE, TWICE, ANSWERED)) if packed else it.batch(*SAMPLES)
    got = it.model.rope_positions(batch, None) * (batch.kinds != Kind.PAD)
    assert torch.equal(got, walked(batch, 4))
    assert int(got.max()) < int(batch.positions.max())


@pytest.mark.parametrize("left", [False, True], ids=["training", "prompts"])
def test_positions_are_those_of_transformers(left: bool) -> None:
    """Rows padded on the right and on the left, images between words."""
    it, theirs = decoder(), GRIDS["qwen3_vl"]().model
    batch = prompts(it) if left else it.batch(ONE, LATE, BLIND, INTERLEAVED, ANSWERED)
    image, used = batch.kinds == Kind.IMAGE, batch.kinds != Kind.PAD
    assert not used.all() and (batch.kinds[:, 0] == Kind.PAD).any() == left
    grid = torch.tensor([[1, 8, 8]] * len(batch.image_index))
    want, _ = theirs.get_rope_index(batch.input_ids, image.int(), grid, attention_mask=used)
    assert torch.equal(it.model.rope_positions(batch, None) * used, want)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_tables_are_those_of_transformers(name: str) -> None:
    rotary = GRIDS[name]().model.language_model.rotary_emb
    width, sections = 2 * len(rotary.inv_freq), rotary.mrope_section
    cfg = ModelConfig(n_heads=1, dim=width, rope_sections=list(sections), rope_interleaved=name == "qwen3_vl")
    positions = torch.randint(0, 100, (3, 2, 50), generator=torch.Generator().manual_seed(0))
    want = rotary(torch.zeros(1), positions.clone())
    for ours, theirs in zip(rope_tables(positions, cfg), want, strict=True):
        torch.testing.assert_close(ours[:, 0], theirs[..., : width // 2], rtol=0, atol=1e-6)


# ---- whole decoders -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def with_text_of(name: str, text: Any, vision: ViTConfig) -> Tiny:
    """A joint decoder with the text weights of a Qwen-VL."""
    config, rope = text.config, text.config.rope_parameters
    model = ModelConfig(
        dim=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=len(text.rotary_emb.inv_freq) * 2,
        ffn_dim=config.intermediate_size,
        norm_eps=config.rms_norm_eps,
        qkv_bias=name != "qwen3_vl",
        qk_norm=name == "qwen3_vl",
        rope_theta=rope["rope_theta"],
        rope_sections=rope["mrope_section"],
        rope_interleaved=name == "qwen3_vl",
        max_seq_len=128,
    )
    it = decoder(model=model, vision_encoder=vision)
    for own, parameter in it.model.transformer.named_parameters():
        if own.startswith("layers"):
            parameter.copy_(text.get_parameter(hf_name(own, "qwen3" if name == "qwen3_vl" else "qwen2")))
    return it


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_decoder_is_that_of_transformers(name: str) -> None:
    """All layers on one stream, with features of inner layers where the class takes them."""
    text = GRIDS[name]().model.language_model.eval()
    it = with_text_of(name, text, INNER if name == "qwen3_vl" else GRID_OF_4)
    model, batch = it.model, it.batch(ONE, LATE, BLIND, INTERLEAVED)
    with torch.no_grad():
        features = model.features(batch)
        assert features is not None
        own, *deeper = features.split(it.job.model.dim, dim=-1)
        x, ctx = model.place(model.transformer.embed(batch.input_ids), own, batch, None)
        got = model.transformer.norm(model.run(x, ctx, batch, deeper))
        image, more = batch.kinds == Kind.IMAGE, {}
        if name == "qwen3_vl":
            assert len(deeper) == 2
            added = [model.insert(torch.zeros_like(x), each, batch)[image] for each in deeper]
            more = {"visual_pos_masks": image, "deepstack_visual_embeds": added}
        text.norm = torch.nn.Identity()
        want = model.transformer.norm(
            text(inputs_embeds=x, position_ids=model.rope_positions(batch, None), attention_mask=None, **more).last_hidden_state
        )
    used = batch.kinds != Kind.PAD
    torch.testing.assert_close(got[used], want[used], rtol=1e-5, atol=1e-5)


# ---- what goes with what ------------------------------------------------------------------------------------------------------------


def test_without_image_tokens_in_the_stream_nothing_is_turned_by_rows() -> None:
    batch = tiny("cross_attention").batch(*SAMPLES)
    plain, sections = (all_logits(tiny("cross_attention", model=model).model.eval(), batch) for model in (MODEL, SECTIONS))
    assert torch.equal(plain, sections)


def test_layers_of_a_tower_of_transformers() -> None:
    """Their channels come last, in the order of the key."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    }
    make = lambda **keys: build_vision_encoder(SiglipConfig(settings={"model_type": "siglip_vision_model", **sizes}, **keys)).eval()
    torch.manual_seed(0)
    deep = make(deepstack_layers=[-3, -2])
    joined = make(feature_layer=[-1, -3, -2])
    joined.load_state_dict(deep.state_dict())
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(deep(pixels), joined(pixels))
    assert (deep.dim, deep.layer_dim) == (48, 16)


def test_the_backbone_and_the_adapter_stay_as_they_are() -> None:
    """More layers add names, and change no weight that a model without them has."""
    deep, plain = (decoder(vision_encoder=vision, noise=0.0).model.state_dict() for vision in (INNER, GRID_OF_4))
    new = deep.keys() - plain.keys()
    assert new == {f"adapter.deepstack.{k}.{name}" for k in range(2) for name in ADAPTER}
    assert [name for name in plain if not name.startswith("vision_encoder") and not torch.equal(deep[name], plain[name])] == []


ADAPTER = ("proj.fc1.weight", "proj.fc1.bias", "proj.fc2.weight", "proj.fc2.bias")


@pytest.mark.parametrize("adapter", [AvgPoolConfig(), LinearAdapterConfig()])
def test_any_adapter_is_made_again_for_each_layer(adapter: Any) -> None:
    model = decoder(vision_encoder=INNER, adapter=adapter).model
    assert model.num_image_tokens == adapter.num_tokens(16)
    assert model.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8)).shape == (2, model.num_image_tokens, 3 * MODEL.dim)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": SECTIONS, "adapter": PerceiverConfig(latents=4)},
            r"rope_sections = \[4, 2, 2\]: needs a square grid .* 'perceiver' gives 4",
        ),
        ({"model": SECTIONS, "vision_encoder": replace(VISION, cls_token=True)}, r"needs a square grid .*no CLS token.* gives 5"),
        (
            {"vision_encoder": replace(VISION, n_layers=9, deepstack_layers=[-2, -3, -4, -5, -6])},
            r"deepstack_layers = .* model.n_layers = 4",
        ),
        ({"vlm": "cross_attention", "vision_encoder": INNER}, r"deepstack_layers = \[-2, -3\]: vlm.arch = 'cross_attention' has no image"),
    ],
)
def test_what_does_not_go_together_is_refused_at_load(sections: dict[str, Any], message: str) -> None:
    job: JobConfig = tiny(sections.pop("vlm", "joint_decoder")).job
    with pytest.raises(ValueError, match=message):
        replace(job, **sections).validate()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(rope_sections=[16, 8, 7]), r"rope_sections = \[16, 8, 7\]: .* whose sum is 32"),
        (lambda: ModelConfig(rope_sections=[16, 16]), r"must be three counts"),
        (lambda: ModelConfig(rope_sections=[8, 12, 12], rope_interleaved=True), r"no more than a third"),
        (lambda: ModelConfig(rope_interleaved=True), r"rope_interleaved = True"),
        (lambda: ViTConfig(deepstack_layers=[-1, 0]), r"deepstack_layers = \[-1, 0\]: count from the end"),
        (lambda: ViTConfig(deepstack_layers=[-2, -2]), r"deepstack_layers = \[-2, -2\]: names a layer twice"),
        (lambda: ViTConfig(n_layers=3, deepstack_layers=[-4]), r"deepstack_layers = \[-4\]: there are only n_layers = 3"),
        (
            lambda: decoder(vision_encoder=EfficientNetLite0Config(pretrained=False, image_size=32, deepstack_layers=[-2])),
            "no inner layers",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_kept_features_are_all_layers() -> None:
    """``train.feature_cache`` gives back what the encoder gave, inner layers as well."""
    model = decoder(vision_encoder=INNER).model
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = list(model.vision_encoder(pixels).detach())
    known = [
        KnownFeatures(["a", "b"], list(found), complete, torch.float32) for found, complete in ((kept, True), ((kept[0], None), False))
    ]
    for each in known:
        torch.testing.assert_close(model.encode(pixels, each), model.encode(pixels), rtol=1e-6, atol=1e-6)
