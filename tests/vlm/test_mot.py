"""Mixture-of-Transformers: what its towers compute, against the dense model that it is when they are equal."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kempnerforge.checkpoint import save_training
from kempnerforge.config import ModelConfig, MoTConfig, VLMConfig, to_toml
from kempnerforge.data.batching.batch import Batch, Kind
from kempnerforge.data.sample import Sample
from kempnerforge.eval.generate import _following, generate
from kempnerforge.model.rope import Rope
from kempnerforge.model.transformer import Block, Cache
from kempnerforge.vlm.joint_decoder import JointDecoder
from kempnerforge.vlm.mot import MoT, SortedContext
from tests.interop.families import config_of, save
from tests.params import quick
from tests.vlm.tiny import (
    ANSWERED,
    INTERLEAVED,
    LATE,
    MODEL,
    NO_IMAGE,
    ONE,
    SAMPLES,
    THREE,
    TWICE,
    TWO_IMAGES,
    WRITTEN,
    Tiny,
    all_logits,
    copies,
    differing,
    everywhere,
    gradients,
    picture,
    tiny,
    tiny_job,
    with_answer,
)

MASKS = ["causal", "image_bidirectional", "prefix"]
QUICKSTART = ModelConfig(dim=128, n_layers=4, n_heads=4, activation="gelu", max_seq_len=256)
PARTS = {"attn": {"attention"}, "ffn": {"mlp"}, "norm": {"attention_norm", "mlp_norm"}}

USUAL = {
    "one image": (ONE,),
    "48 rows": (ONE,) * 48,
    "unequal texts": (ONE, THREE),
    "two images": (TWO_IMAGES,) * 3,
    "no image": (NO_IMAGE,) * 2,
}
"""Every row begins with the same number of images."""
MIXED = {"with and without": (ONE, NO_IMAGE), "interleaved": (INTERLEAVED, LATE, TWICE, ANSWERED), "all": SAMPLES}


def mot(
    mask: str = "causal", *, warm: bool = False, noise: float = 0.1, model: ModelConfig = MODEL, device: str | None = None, **knobs: Any
) -> Tiny:
    """A tiny ``mot``.

    Args:
        warm: with equal towers.
        knobs: of ``[vlm]``.
    """
    vlm = VLMConfig.for_arch("mot", max_text_len=64, attention_mask=mask, mot_warm_start_from_text=warm, **knobs)
    it = tiny("mot", mask, noise=noise, model=model, vlm=vlm, device=device)
    it.model.warm_start()
    return it


def context(it: Tiny, batch: Batch) -> tuple[Tensor, SortedContext]:
    """The stream that enters the first layer."""
    model = it.model
    features = model.encode(batch.images) if batch.images is not None and len(batch.images) else None
    x, ctx = model.place(model.transformer.embed(batch.input_ids), features, batch, None)
    assert isinstance(ctx, SortedContext)
    return x, ctx


def by_position(x: Tensor, ctx: SortedContext, batch: Batch) -> Tensor:
    """(B, K, ...) of the stream -> (positions that are not padding, ...) in the order of the batch."""
    if ctx.columns is None:
        return x[batch.kinds != Kind.PAD]
    rows, places = (batch.kinds != Kind.PAD).nonzero(as_tuple=True)
    return x[rows, ctx.columns[rows, places]]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def rows_are_independent(transformer: nn.Module, shape: torch.Size, sizes: Sequence[int]) -> bool:
    """Whether the linear layers give each section of ``sizes`` positions the same bits alone as in the whole stream of ``shape``."""
    linears = [layer for layer in transformer.modules() if isinstance(layer, nn.Linear)]
    streams = [torch.randn(*shape[:2], layer.in_features, generator=torch.Generator().manual_seed(0)) for layer in linears]
    with torch.no_grad():
        return all(
            torch.equal(torch.cat([layer(part) for part in x.split(list(sizes), 1)], 1), layer(x))
            for layer, x in zip(linears, streams, strict=True)
        )


# ---- equal towers are the dense model -------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", USUAL.values(), ids=USUAL)
@pytest.mark.parametrize("mask", quick(MASKS, "causal"))
@pytest.mark.parametrize("model", [MODEL, QUICKSTART], ids=["tiny", "quickstart"])
def test_equal_towers_are_joint_decoder_bitwise(model: ModelConfig, mask: str, samples: Sequence[Sample]) -> None:
    """Bitwise where this machine gives the rows of a matrix product the same bits alone and among others; the kernel
    that it takes for few rows may differ, and then the logits are equal within rounding.
    """
    joint, it = tiny("joint_decoder", mask, model=model), mot(mask, warm=True, model=model)
    batch = joint.batch(*samples)
    x, ctx = context(it, batch)
    assert ctx.index is None
    logits, want = all_logits(it.model, batch), all_logits(joint.model, batch)
    if rows_are_independent(joint.model.transformer, x.shape, ctx.sizes):
        assert torch.equal(logits, want)
        assert it.model(batch).loss.item() == joint.model(batch).loss.item()
    else:
        assert relative(logits, want) < 1e-6
        assert it.model(batch).loss.item() == pytest.approx(joint.model(batch).loss.item(), rel=1e-6)


@pytest.mark.parametrize("samples", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("mask", MASKS)
def test_equal_towers_are_joint_decoder_however_images_stand(mask: str, samples: Sequence[Sample]) -> None:
    """Nearly bitwise: attention sums in the order of storage. The gradient of a weight is the sum of what its copies get."""
    joint, it = tiny("joint_decoder", mask), mot(mask, warm=True)
    batch = joint.batch(*samples)
    assert context(it, batch)[1].index is not None
    words = batch.kinds != Kind.PAD
    assert relative(all_logits(it.model, batch)[words], all_logits(joint.model, batch)[words]) < 1e-6
    loss, grads = gradients(it.model, batch)
    want_loss, want = gradients(joint.model, batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    for name, grad in want.items():
        copy = ".".join([*name.split(".")[:3], "image", *name.split(".")[3:]])
        torch.testing.assert_close(grads[name] + grads.get(copy, 0), grad, rtol=1e-4, atol=1e-5)


class PostNormBlock(Block):
    """A dense block as in Liang et al. 2024: norms on what attention and feed-forward give."""

    def pre(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.attention.qkv(x, rope)

    def post(self, x: Tensor, o: Tensor) -> Tensor:
        h = x + self.attention_norm(self.attention.o_proj(o))
        return h + self.mlp_norm(self.mlp(h))


class PostNorm(JointDecoder):
    def block(self, cfg: ModelConfig, layer: int) -> Block:
        return PostNormBlock(cfg, layer)


@pytest.mark.parametrize("mask", MASKS)
def test_equal_towers_of_the_papers_placement_are_that_dense_model(mask: str) -> None:
    it = mot(mask, warm=True, norm_placement="paper")
    dense = PostNorm(tiny("joint_decoder", mask).job)
    missing, unexpected = dense.load_state_dict(it.model.state_dict(), strict=False)
    assert not missing and all(".image." in name for name in unexpected)
    usual, mixed = it.batch(ONE, THREE), it.batch(*SAMPLES)
    assert torch.equal(all_logits(it.model, usual), all_logits(dense, usual))
    words = mixed.kinds != Kind.PAD
    assert relative(all_logits(it.model, mixed)[words], all_logits(dense, mixed)[words]) < 1e-6
    assert not torch.allclose(all_logits(mot(mask, warm=True).model, usual), all_logits(dense, usual), atol=0.1)


@pytest.mark.parametrize("samples", [*USUAL.values(), (INTERLEAVED,), (LATE,)], ids=[*USUAL, "interleaved", "late"])
def test_flops_are_those_of_joint_decoder(samples: Sequence[Sample]) -> None:
    """One matrix product for each modality, over as many rows as the dense one has."""
    counts = []
    for it in (tiny("joint_decoder"), mot()):
        with FlopCounterMode(display=False) as counter:
            it.model(everywhere(it.batch(*samples))).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("samples", MIXED.values(), ids=MIXED)
def test_the_sorted_stream_runs_on_the_meta_device(samples: Sequence[Sample]) -> None:
    counts = []
    for device in ("meta", "cpu"):
        it = mot(device=device)
        with FlopCounterMode(display=False) as counter:
            it.model(it.batch(*samples).to(device)).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# ---- routing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def disturb(module: nn.Module) -> None:
    for p in module.parameters():
        p += 0.5


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("placement", ["pre", "paper"])
@pytest.mark.parametrize("sample", [ONE, TWO_IMAGES, INTERLEAVED, LATE, ANSWERED], ids=lambda s: s.id)
def test_every_token_has_the_weights_of_its_modality(sample: Sample, placement: str, tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights of one tower change queries, keys and values of its own positions alone; what follows attention, too."""
    it = mot(norm_placement=placement)
    batch = it.batch(sample, NO_IMAGE)
    x, ctx = context(it, batch)
    block = it.model.transformer.layers[0]
    parts = block if tower == "text" else block.get_submodule(tower)
    seen: list[tuple[Tensor, ...]] = []
    attend = block.attend
    monkeypatch.setattr(block, "attend", lambda q, k, v, c: (seen.append((q, k, v)), seen[0], attend(*seen[0], c))[-1])
    outputs = []
    with torch.no_grad():
        for change in (None, "attention_norm", "attention", "mlp_norm", "mlp"):
            if change:
                disturb(parts.get_submodule(change))
            outputs.append(by_position(block(x, ctx), ctx, batch))
    own = (batch.kinds == Kind.IMAGE)[batch.kinds != Kind.PAD] == (tower == "image")
    assert own.any() and not own.all()
    for tensors in zip(seen[0], seen[-1], strict=True):
        q, other = (by_position(t.transpose(1, 2).flatten(2), ctx, batch) for t in tensors)
        assert torch.equal((q != other).any(-1), own)
    for before, after in pairwise(outputs[1:]):  # attention itself sees the first queries, keys and values
        assert torch.equal((before != after).any(-1), own)


class Speakers(MoT):
    """Prompts are a modality of their own."""

    def modality_ids(self, batch: Batch) -> Tensor:
        ids = super().modality_ids(batch)
        return ids.masked_fill(batch.kinds == Kind.PROMPT, self.modalities.index("prompt"))

    def section_sizes(self, batch: Batch) -> tuple[int, ...]:
        sizes = dict(zip(self.modalities, super().section_sizes(batch), strict=True))
        prompts = int((batch.kinds == Kind.PROMPT).sum(1).max())
        answers = int((batch.kinds == Kind.ANSWER).sum(1).max())
        return tuple((sizes | {"prompt": prompts, "text": answers}).values())

    def is_sorted(self, batch: Batch) -> bool:
        return False


@pytest.mark.parametrize("mask", MASKS)
def test_a_subclass_may_add_a_modality(mask: str) -> None:
    """With equal towers it is the dense model again, whatever goes where."""
    joint = tiny("joint_decoder", mask)
    names = ["text", "prompt", "image"]
    it = mot(mask, mot_modalities=names, noise=0)
    model = Speakers(it.job)
    text = joint.model.state_dict()
    copied = {name: text[".".join(w for w in name.split(".") if w not in names[1:])] for name in model.state_dict()}
    model.load_state_dict(copied)
    batch = it.batch(*SAMPLES)
    words = batch.kinds != Kind.PAD
    assert relative(all_logits(model, batch)[words], all_logits(joint.model, batch)[words]) < 1e-6
    grads = gradients(model, batch)[1]
    assert all(grads[f"transformer.layers.0.{name}mlp.up_proj.weight"].any() for name in ("", "image.", "prompt."))


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("untie", [["ffn"], ["attn"], ["norm"], ["ffn", "attn"], ["norm", "ffn"], ["norm", "attn", "ffn"]], ids="-".join)
def test_towers_have_what_is_untied(untie: list[str]) -> None:
    model = replace(MODEL, qk_norm=True, qkv_bias=True)
    text, it = tiny(None, model=model), mot(untie=untie, model=model)
    names = {name for name, _ in text.model.named_parameters()}
    own = set().union(*(PARTS[part] for part in untie))
    expected = {f"transformer.layers.{n}.image.{rest}" for n in range(4) for rest in inside(names, f"transformer.layers.{n}.", own)}
    new = {name for name, _ in it.model.named_parameters() if not name.startswith(("vision_encoder.", "adapter."))} - names
    assert new == expected
    assert len(list(it.model.parameters())) == len({id(p) for p in it.model.parameters()})
    loss, grads = gradients(it.model, it.batch(*SAMPLES))
    assert loss.isfinite() and all(grads[name].any() for name in expected if "bias" not in name)


def inside(names: set[str], layer: str, parts: set[str]) -> list[str]:
    return [rest for name in names if name.startswith(layer) and (rest := name.removeprefix(layer)).split(".")[0] in parts]


@pytest.mark.parametrize("untie", [["ffn"], ["attn"], ["norm"]], ids="-".join)
def test_equal_towers_with_shared_parts_are_joint_decoder(untie: list[str]) -> None:
    joint, it = tiny("joint_decoder"), mot(warm=True, untie=untie)
    batch = joint.batch(ONE, THREE)
    assert torch.equal(all_logits(it.model, batch), all_logits(joint.model, batch))


def test_layers_have_twice_the_parameters() -> None:
    text, it = tiny(None).model.transformer, mot().model.transformer
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(it.layers) == 2 * count(text.layers)
    assert count(it) - count(it.layers) == count(text) - count(text.layers)


def test_the_order_of_modalities_makes_no_difference() -> None:
    for names in (["image", "text"], ["audio", "image", "text"]):
        one, other = (mot(mot_modalities=order, noise=0) for order in (names, names[::-1]))
        assert [name for name, _ in one.model.named_parameters()] == [name for name, _ in other.model.named_parameters()]
        assert differing(copies(one.model), copies(other.model)) == []
        batch = one.batch(*SAMPLES)
        assert differing(gradients(one.model, batch)[1], gradients(other.model, batch)[1]) == []


def test_towers_start_apart() -> None:
    layer = mot(mot_modalities=["image", "audio", "text"], noise=0).model.transformer.layers[0]
    weights = [layer.get_submodule(f"{name}mlp.up_proj").weight for name in ("", "image.", "audio.")]
    assert not any(torch.equal(a, b) for a, b in zip(weights, [*weights[1:], weights[0]], strict=True))


@pytest.mark.parametrize("samples", [(ONE, ONE), (ONE, INTERLEAVED)], ids=["usual", "sorted"])
def test_a_modality_without_positions_has_gradients_of_zero(samples: Sequence[Sample]) -> None:
    """Ranks that wait for each other's gradients need all of them."""
    it = mot(mot_modalities=["image", "audio", "text"])
    grads = gradients(it.model, it.batch(*samples))[1]
    assert grads.keys() == {name for name, _ in it.model.named_parameters()}
    assert {name for name in grads if ".audio." in name} and not any(grads[name].any() for name in grads if ".audio." in name)
    it.model.zero_grad()
    without = gradients(it.model, it.batch(NO_IMAGE))[1]
    assert grads.keys() == without.keys() and not any(without[name].any() for name in without if ".image." in name)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mot_modalities": ["text"]}, "at least 2 entries"),
        ({"mot_modalities": ["text", "image", "image"]}, "must not have duplicates"),
        ({"mot_modalities": ["text", "image", "mlp"]}, "'mlp' cannot name a tower"),
        ({"mot_modalities": ["text", "image", "no name"]}, "'no name' cannot name a tower"),
        ({"mot_modalities": ["text", "image", "class"]}, "'class' cannot name a tower"),
        ({"untie": []}, "one or more of 'ffn', 'attn', 'norm'"),
        ({"untie": ["ffn", "ffn"]}, "each once"),
        ({"untie": ["qkv"]}, r"untie = \['qkv'\]"),
        ({"norm_placement": "post"}, "norm_placement = 'post': allowed are 'pre', 'paper'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoTConfig(**knobs)


def test_a_name_that_a_module_has_already_is_refused() -> None:
    with pytest.raises(ValueError, match="mot_modalities: 'forward' cannot name a tower"):
        mot(mot_modalities=["image", "text", "forward"])


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_cached_generation_of_interleaved_prompts(mask: str) -> None:
    """None, one and three images, in front, between and after the words."""
    it = mot(mask, noise=0.3)
    images = [picture(k) for k in range(3)]
    rows = [
        ("what?", []),
        ("is <image> red?", [0]),
        ("<image>what <image> is it <image>", [0, 1, 2]),
        ("red?", [2]),
        ("is it <image>", [1]),
    ]
    prompts = it.prompts(rows, images)
    made = torch.tensor(generate(it.model, prompts, max_new_tokens=6, eos_id=-1))
    with torch.no_grad():
        for step in range(6):
            logits = it.model(with_answer(prompts, made[:, :step])).logits
            assert torch.equal(logits.argmax(-1), made[:, step])
        together = it.model(prompts, Cache()).logits
        for row, (prompt, which) in enumerate(rows):
            alone = it.prompts([(prompt, range(len(which)))], [images[k] for k in which])
            torch.testing.assert_close(it.model(alone, Cache()).logits[0], together[row], rtol=1e-4, atol=1e-5)
            assert generate(it.model, alone, max_new_tokens=6, eos_id=-1) == [made[row].tolist()]


# ---- warm start -----------------------------------------------------------------------------------------------------


def towers_equal(it: Tiny, names: Sequence[str] = ("image",)) -> bool:
    own = it.model.state_dict()
    pairs = [(name, name.replace(f".{tower}.", ".")) for tower in names for name in own if f".{tower}." in name]
    assert pairs
    return all(torch.equal(own[name], own[text]) for name, text in pairs)


def run_of(it: Tiny, folder: Path) -> Path:
    """A run directory with a checkpoint of the model."""
    save_training(folder / "checkpoints", 3, it.model, [], {}, {"config.toml": to_toml(it.job).encode()}, keep=1)
    return folder


def test_without_a_warm_start_nothing_is_copied() -> None:
    assert not towers_equal(mot(noise=0))
    assert towers_equal(mot(warm=True, mot_modalities=["image", "audio", "text"]), ["image", "audio"])


@pytest.mark.parametrize("arch", [None, "joint_decoder", "cross_attention"])
def test_warm_start_from_a_run(arch: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that the run's model has in common with this one: layers, embedding, final norm, and where there are, encoder and adapter."""
    source = tiny(arch, noise=0.3)
    with caplog.at_level(logging.INFO, "kempnerforge"):
        it = mot(warm=True, mot_warm_start_path=str(run_of(source, tmp_path)))
    own, theirs = it.model.state_dict(), source.model.state_dict()
    common = own.keys() & theirs.keys()
    assert {name for name in own if not name.startswith(("vision_encoder.", "adapter.")) and ".image." not in name} <= common
    assert all(torch.equal(own[name], theirs[name]) for name in common)
    assert towers_equal(it)
    assert f"{tmp_path}: {len(common)} tensors taken, {len(theirs) - len(common)} have no place here" in caplog.text


def test_towers_of_the_run_are_not_overwritten(tmp_path: Path) -> None:
    """What its towers lack is copied from the text tower all the same."""
    source = mot(noise=0.3, untie=["ffn"])
    it = mot(warm=True, mot_warm_start_path=str(run_of(source, tmp_path)))
    own, theirs = it.model.state_dict(), source.model.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    layer = it.model.transformer.layers[1]
    assert not torch.equal(layer.get_submodule("image.mlp.up_proj").weight, layer.mlp.up_proj.weight)
    assert torch.equal(layer.get_submodule("image.attention.q_proj").weight, layer.attention.q_proj.weight)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_warm_start_from_transformers(family: str, tmp_path: Path) -> None:
    """The model is then theirs, and equal towers are ``joint_decoder`` on these weights."""
    save(family, tmp_path)
    model = config_of(family, vocab_size=400, max_seq_len=128)
    with pytest.raises(ValueError, match="model.vocab_size must be the number of rows"):
        mot(warm=True, model=model, mot_warm_start_path=str(tmp_path))
    grow_vocabulary(tmp_path)
    it = mot(warm=True, model=model, mot_warm_start_path=str(tmp_path), noise=0)
    joint = tiny("joint_decoder", model=model, noise=0)
    joint.model.load_state_dict({name: value for name, value in it.model.state_dict().items() if ".image." not in name})
    assert towers_equal(it)
    batch = it.batch(ONE, THREE)
    assert torch.equal(all_logits(it.model, batch), all_logits(joint.model, batch))


def grow_vocabulary(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[name] = torch.randn(400, tensors[name].shape[1])
    save_file(tensors, path / "model.safetensors")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = run_of(tiny(None, model=replace(MODEL, vocab_size=320, new_tokens=[])), tmp_path / "vocabulary")
    with pytest.raises(
        ValueError, match=r"token_embedding.weight has shape \(320, 32\) there, .*model.vocab_size must be the number of rows"
    ):
        mot(warm=True, mot_warm_start_path=str(path))
    path = run_of(tiny(None, model=replace(MODEL, ffn_dim=64)), tmp_path / "width")
    with pytest.raises(ValueError, match=r"config.toml: .*ffn_dim = 64 there, model.ffn_dim = 96 here"):
        mot(warm=True, mot_warm_start_path=str(path))
    save_training(tmp_path / "other", 0, nn.Linear(2, 2), [], {}, {}, keep=1)
    with pytest.raises(ValueError, match="none of its 2 tensors has a place"):
        mot(warm=True, mot_warm_start_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="vlm.mot_warm_start_path: .*no such directory"):
        mot(warm=True, mot_warm_start_path=str(tmp_path / "none"))


def test_an_encoder_of_another_shape_is_left_as_it_is(tmp_path: Path) -> None:
    vision = replace(tiny_job("joint_decoder").vision_encoder, dim=32)
    path = run_of(tiny("joint_decoder", vision_encoder=vision), tmp_path)
    fresh, it = mot(noise=0.1), mot(warm=True, mot_warm_start_path=str(path))
    name = "vision_encoder.layers.0.attention.q_proj.weight"
    assert torch.equal(it.model.state_dict()[name], fresh.model.state_dict()[name])


# ---- pictures that are written -------------------------------------------------------------------------------------


DRAWN = replace(WRITTEN, images=())


@pytest.mark.parametrize("tower", ["image", "text"])
def test_codes_have_the_weights_of_images(tower: str) -> None:
    """Other weights of one tower change what the first layer makes of its own tokens alone, but for attention."""
    it = mot()
    batch = it.batch(WRITTEN, DRAWN, ONE)
    codes = it.model.is_code(batch)
    assert codes.sum(1).tolist() == [3, 3, 0] and (batch.row_codes, batch.row_images) == (3, 1)
    x, ctx = context(it, batch)
    block = it.model.transformer.layers[0]
    with torch.no_grad():
        before = by_position(block(x, ctx), ctx, batch)
        disturb((block if tower == "text" else block.get_submodule(tower)).get_submodule("mlp"))
        changed = (by_position(block(x, ctx), ctx, batch) != before).any(-1)
    assert torch.equal(changed, ((codes | (batch.kinds == Kind.IMAGE))[batch.kinds != Kind.PAD]) == (tower == "image"))


def test_rows_in_different_modalities_are_written_step_by_step() -> None:
    """Teacher forced: with a cache each step has the logits of the full forward pass."""
    it = mot()
    it.model.eval()
    prompts = it.prompts([("what?", [0]), ("<boi>", [1]), ("a <code_3> here", [])], [picture(0), picture(1)])
    code = it.encoder.layout.codes.start
    ids = torch.tensor([[70, code + 1, code + 2, 80], [code + 5, code + 6, 71, 72], [code, 73, code + 9, code + 9]])
    with torch.no_grad():
        cache, batch = Cache(), prompts
        for step in range(ids.shape[1] + 1):
            want = it.model(with_answer(prompts, ids[:, :step])).logits
            torch.testing.assert_close(it.model(batch, cache).logits, want, rtol=1e-4, atol=1e-5)
            batch = _following(batch, ids[:, min(step, 3)])


def test_flops_of_pictures_that_are_written_are_those_of_joint_decoder() -> None:
    counts = []
    for it in (tiny("joint_decoder"), mot()):
        with FlopCounterMode(display=False) as counter:
            it.model(everywhere(it.batch(DRAWN, DRAWN))).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
