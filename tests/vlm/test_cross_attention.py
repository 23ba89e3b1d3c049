"""Gated cross-attention: what the contract suite cannot know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kempnerforge.config import FreezeSpec, ModelConfig, load_config
from kempnerforge.config.adapter import PerceiverConfig
from kempnerforge.config.vlm import CrossAttentionConfig
from kempnerforge.data.batching.batch import IGNORE, Batch, Kind
from kempnerforge.distributed.world import World
from kempnerforge.eval.generate import generate
from kempnerforge.model.transformer import Cache
from kempnerforge.training.freeze import apply_freeze, trainable_names
from kempnerforge.training.optimizer import Optimizers
from kempnerforge.vlm.cross_attention import CrossAttentionBlock, GatedCrossAttention, Sight, gather_images, sight
from kempnerforge.vlm.placements import NOTHING, visible_images
from tests.dist import ROOT
from tests.vlm.tiny import (
    ANSWERED,
    INTERLEAVED,
    LATE,
    MODEL,
    NO_IMAGE,
    ONE,
    SIZE,
    THREE,
    TWICE,
    TWO_IMAGES,
    Tiny,
    all_logits,
    copies,
    differing,
    gradients,
    install,
    picture,
    tiny,
    with_answer,
)

both = pytest.mark.parametrize("media", ["all", "latest"])


def flamingo(media: str = "all", *, mask: str = "causal", noise: float = 0.3, **sections: Any) -> Tiny:
    """Gates are open, unless ``noise`` is 0."""
    vlm = CrossAttentionConfig(max_text_len=64, cross_attention_every_n_layers=2, cross_attention_media=media, attention_mask=mask)
    return tiny("cross_attention", noise=noise, **{"vlm": vlm, **sections})


# ---- rows by hand -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A row as a string: a letter is a word of one of the texts a, b, ... of the sample, ``i`` an image in front of the next word, ``|``
    starts the next sample, ``_`` is padding. An image belongs to the text of the next word if ``i`` follows a word of it, else to all.
    """

    text: str
    samples: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    images: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        sample, current = 0, 0
        for letter in self.text:
            if letter == "|":
                sample, current = sample + 1, 0
            elif letter == "i":
                self.images.append((len(self.texts), current, sample))
            else:
                current = 0 if letter == "_" else ord(letter) - ord("a") + 1
                self.samples.append(-1 if letter == "_" else sample)
                self.texts.append(current)


def by_hand(*texts: str) -> Batch:
    """A batch of such rows, the shorter ones padded."""
    length = max(len(Row(text).texts) for text in texts)
    rows = [Row(text + "_" * (length - len(Row(text).texts))) for text in texts]
    samples, ids = (torch.tensor([getattr(row, name) for row in rows]) for name in ("samples", "texts"))
    placed = [(r, slot, *image) for r, row in enumerate(rows) for slot, image in enumerate(row.images)]
    index, slot, start, text, sample = torch.tensor(placed, dtype=torch.int64).reshape(-1, 5).T
    return Batch(
        input_ids=torch.arange(samples.numel()).view_as(samples) % 50 + 5,
        labels=torch.full_like(samples, IGNORE),
        positions=torch.arange(samples.shape[1]).expand_as(samples),
        sample_ids=samples,
        text_ids=ids,
        kinds=torch.where(samples < 0, Kind.PAD, Kind.ANSWER).to(torch.uint8),
        targets=torch.arange(samples.numel()),
        images=torch.randint(0, 255, (len(placed), 3, SIZE, SIZE), dtype=torch.uint8),
        image_index=torch.arange(len(placed)),
        image_rows=index,
        image_starts=start,
        image_text_ids=text,
        image_sample_ids=sample,
        image_slots=slot,
        has_documents=True,
        row_images=max(len(row.images) for row in rows),
        row_words=samples.shape[1],
        leading_images=0,
    )


def matrix(text: str, latest: bool) -> list[str]:
    """For each image of the row: an x for each position that sees it."""
    seen = visible_images(by_hand(text), latest)[0]  # (S, K)
    return ["".join("x" if see else "." for see in column) for column in seen.T.tolist()]


def test_an_image_some_words_an_image_some_words() -> None:
    """The matrix of the paper's figure 7, and that of all preceding images."""
    assert matrix("iaaiaa", latest=True) == ["xx..", "..xx"]
    assert matrix("iaaiaa", latest=False) == ["xxxx", "..xx"]


@pytest.mark.parametrize(
    ("text", "every", "latest"),
    [
        ("aai", [".."], [".."]),  # nothing behind it
        ("aaia_", ["..x."], ["..x."]),
        ("iiaa", ["xx", "xx"], ["..", "xx"]),  # no one ever sees the first
        ("iaabb", ["xxxx"], ["xxxx"]),  # two texts share it
        ("iaiabbib_", ["xxxxx.", ".x....", "....x."], ["x.xx..", ".x....", "....x."]),  # each has one of its own
        ("ia|ia|b", ["x..", ".x."], ["x..", ".x."]),  # samples are apart
        ("a|iia_", [".x.", ".x."], ["...", ".x."]),
    ],
)
def test_who_sees_what(text: str, every: list[str], latest: list[str]) -> None:
    assert matrix(text, latest=False) == every
    assert matrix(text, latest=True) == latest


@pytest.mark.parametrize(
    ("text", "together"),
    [
        ("iiaaiaa", ["xx..", "xx..", "..xx"]),  # two in front of the same word
        ("iaiaaiaa", ["xxx..", ".xx..", "...xx"]),  # one token is the image's own, two are not
        ("aia|iiaib", [".x..", "..xx", "..xx", "...."]),  # the last belongs to text a, which is over
    ],
)
def test_neighbours_are_seen_together(text: str, together: list[str]) -> None:
    seen = visible_images(by_hand(text), latest=True, group=True)[0].T.tolist()
    assert ["".join("x" if see else "." for see in column) for column in seen] == together


def naive(batch: Batch, latest: bool) -> Tensor:
    """One position and image at a time."""
    seen = torch.zeros(*batch.input_ids.shape, batch.row_images, dtype=torch.bool)
    for row in range(len(seen)):
        for q in range(seen.shape[1]):
            last = None
            for m in range(len(batch.image_rows)):
                if batch.image_rows[m] != row or batch.image_starts[m] > q or batch.image_sample_ids[m] != batch.sample_ids[row, q]:
                    continue
                if batch.image_text_ids[m] in (0, batch.text_ids[row, q]):
                    seen[row, q, batch.image_slots[m]] = not latest
                    last = batch.image_slots[m]
            if latest and last is not None:
                seen[row, q, last] = True
    return seen


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text("aabbi|", max_size=12), min_size=1, max_size=3), st.booleans())
def test_the_mask_is_the_loop(texts: list[str], latest: bool) -> None:
    batch = by_hand(*texts, "_")
    got = visible_images(batch, latest)
    assert got.shape[-1] == max(1, batch.row_images)
    assert torch.equal(got[..., : batch.row_images], naive(batch, latest))
    assert not got[..., batch.row_images :].any()
    assert not got[batch.sample_ids < 0].any()


def test_media_are_laid_out_by_row() -> None:
    batch = by_hand("iaiai", "", "aia")
    batch = replace(batch, image_index=torch.tensor([2, 0, 2, 1]))  # one image stands twice
    features, words = torch.randn(3, 4, 8), torch.randn(*batch.input_ids.shape, 8)
    media = gather_images(features, words, batch, words.shape[-1])  # (B, K, F, D)
    nothing = torch.zeros(4, 8)
    want = [[features[2], features[0], features[2]], [nothing] * 3, [features[1], nothing, nothing]]
    assert torch.equal(media, torch.stack([torch.stack(row) for row in want]))
    assert (gather_images(None, words, by_hand("aa", "aa"), words.shape[-1]) == 0).all()
    assert NOTHING < -1, "padding must not match an empty slot"


# ---- the block ----------------------------------------------------------------------------------------------------------


def open_block(cfg: ModelConfig, heads: tuple[int, int]) -> GatedCrossAttention:
    block = GatedCrossAttention(cfg, *heads)
    nn.init.constant_(block.attention_gate, 0.7)
    nn.init.constant_(block.mlp_gate, -0.4)
    return block


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (2, 1)])
@both
def test_the_block_is_attention_over_what_each_word_sees(heads: tuple[int, int], media: str) -> None:
    """Each position alone, over the tokens of its images alone, with the attention of torch."""
    torch.manual_seed(0)
    cfg = replace(MODEL, head_dim=12)
    block = open_block(cfg, heads)
    batch = by_hand("iaiaib", "aabab", "iabiab", "_i|iaaa")
    x, features = torch.randn(4, batch.input_ids.shape[1], 32), torch.randn(len(batch.image_rows), 3, 32)
    seen = visible_images(batch, media == "latest")
    laid_out = gather_images(features, x, batch, x.shape[-1])
    got = block(x, *block.keys_values(laid_out.flatten(1, 2)), sight(seen, 3, x.dtype))
    for row in range(4):
        for q in range(x.shape[1]):
            here, want = laid_out[row, seen[row, q]].flatten(0, 1), x[row, q]
            if len(here):
                k, v = block.keys_values(here[None])
                one = block.heads(block.q_proj(block.norm(want[None, None])))
                o = nn.functional.scaled_dot_product_attention(one, k, v, enable_gqa=True)
                want = want + torch.tanh(torch.tensor(0.7)) * block.o_proj(o.flatten())
            want = want + torch.tanh(torch.tensor(-0.4)) * block.mlp(block.mlp_norm(want))
            torch.testing.assert_close(got[row, q], want, rtol=1e-4, atol=1e-5)


@both
def test_who_sees_nothing_reads_exactly_nothing(media: str) -> None:
    """Words before any image, rows without one and padding; forward, and backward without a NaN."""
    block = open_block(MODEL, (2, 2))
    nn.init.zeros_(block.mlp_gate)
    batch = by_hand("aiaiab", "aaabb", "iabib", "")
    x = torch.randn(*batch.input_ids.shape, 32, requires_grad=True)
    features = torch.randn(len(batch.image_rows), 3, 32, requires_grad=True)
    seen = visible_images(batch, media == "latest")
    media_tokens = gather_images(features, x, batch, x.shape[-1]).flatten(1, 2)
    out = block(x, *block.keys_values(media_tokens), sight(seen, 3, x.dtype))
    blind = ~seen.any(-1)
    assert 0 < int(blind.sum()) < blind.numel()
    assert torch.equal(out[blind], x[blind])
    assert (out[~blind] != x[~blind]).any(-1).all()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, features, *block.parameters()))
    block.zero_grad()
    again = block(x, *block.keys_values(media_tokens.detach()), sight(seen, 3, x.dtype))
    again[blind].square().sum().backward()
    reading = ("q_proj", "k_proj", "v_proj", "o_proj", "norm", "media_norm", "attention_gate")
    assert [name for name, p in block.named_parameters() if name.startswith(reading) and (p.grad is None or p.grad.any())] == []


def test_one_image_a_row_needs_no_mask() -> None:
    batch = by_hand("aiaab", "iab__", "aab_")
    seen = visible_images(batch, latest=False)
    cheap = sight(seen, 3, torch.float32)
    assert cheap.mask is None
    block, x = open_block(MODEL, (2, 2)), torch.randn(*batch.input_ids.shape, 32)
    heads = block.keys_values(torch.randn(3, 3, 32))
    bias = torch.zeros(3, 1, x.shape[1], 3).masked_fill(~seen.any(-1)[:, None, :, None], -1e4)
    torch.testing.assert_close(block(x, *heads, cheap), block(x, *heads, Sight(bias, cheap.seeing)))


def test_parts() -> None:
    block = GatedCrossAttention(replace(MODEL, n_heads=4, head_dim=10), 6, 2)
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    assert shapes["q_proj.weight"] == (60, 32) and shapes["o_proj.weight"] == (32, 60)
    assert shapes["k_proj.weight"] == shapes["v_proj.weight"] == (20, 32)
    assert shapes["attention_gate"] == shapes["mlp_gate"] == (1,), "sharding cannot split a scalar"
    assert not block.attention_gate.any() and not block.mlp_gate.any()
    gemma = GatedCrossAttention(replace(MODEL, norm_plus_one=True), 2, 2)
    assert not any(norm.weight.any() for norm in (gemma.norm, gemma.media_norm, gemma.mlp_norm)), "norms are those of the backbone"


@pytest.mark.parametrize(("every", "layers"), [(1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2]), (4, [3])])
def test_every_nth_layer_has_one(every: int, layers: list[int]) -> None:
    model = flamingo(vlm=CrossAttentionConfig(max_text_len=64, cross_attention_every_n_layers=every)).model
    assert [i for i, layer in enumerate(model.transformer.layers) if isinstance(layer, CrossAttentionBlock)] == layers
    found = {name.split(".")[2] for name, _ in model.named_parameters() if ".cross_attention." in name}
    assert found == {str(layer) for layer in layers}


def test_heads_follow_the_config() -> None:
    vlm = CrossAttentionConfig(max_text_len=64, cross_attention_n_heads=4, cross_attention_n_kv_heads=2)
    layer = flamingo(vlm=vlm).model.transformer.layers[3]
    assert isinstance(layer, CrossAttentionBlock)
    width = MODEL.head_width
    assert layer.cross_attention.q_proj.out_features == 4 * width and layer.cross_attention.k_proj.out_features == 2 * width


def test_init_std_reaches_the_new_layers() -> None:
    model = flamingo(noise=0.0, model=replace(MODEL, init_std=1e-4)).model
    linears = [m for m in model.transformer.layers.modules() if isinstance(m, nn.Linear)]
    assert max(float(m.weight.detach().abs().max()) for m in linears) < 1e-3


# ---- the model ----------------------------------------------------------------------------------------------------------

ROWS: list[Sequence[str]] = [["iaaa"], ["aaaa"], ["iaaiaa", "aaa"], ["iaaabb", "a|iaba", "ib"], ["aiiaia__"]]


@both
@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("rows", ROWS, ids=" ".join)
def test_closed_gates_are_the_text_model_bitwise(media: str, mask: str, rows: Sequence[str]) -> None:
    it, batch = flamingo(media, mask=mask, noise=0.0), by_hand(*rows)
    text = tiny(None, noise=0.0).model
    if mask == "prefix":  # without prompts it is a causal mask, written out
        batch = replace(batch, kinds=torch.where(batch.kinds > 0, Kind.ANSWER, Kind.PAD).to(torch.uint8))
    assert torch.equal(it.model(batch).logits, text(batch).logits)


def test_gates_open_with_the_first_step(world: World) -> None:
    it = flamingo(noise=0.0)
    install(it, world)
    optimizers = Optimizers(it.model, it.stages, it.patterns)
    optimizers.set_step(it.stages[0], 0)
    gradients(it.model, it.batch(ONE, TWO_IMAGES))
    before = copies(it.model)
    optimizers.step()
    gates = [name for name in before if name.endswith("_gate")]
    assert len(gates) == 4 and not any(before[name].any() for name in gates)
    assert set(gates) <= set(differing(before, copies(it.model)))


def moved(it: Tiny, batch: Batch, image: int) -> str:
    """An x for each position of row 0 whose logits change when image ``image`` of the batch does."""
    assert batch.images is not None
    images = batch.images.clone()
    images[image] = 255 - images[image]
    a, b = all_logits(it.model, batch), all_logits(it.model, replace(batch, images=images))
    changed = (a - b).abs().amax(-1)[0]
    return "".join("x" if c > 1e-5 else "." if c == 0 else "?" for c in changed.tolist())


@both
def test_a_sample_in_a_pack_reads_its_own_images(media: str) -> None:
    it = flamingo(media)
    rows = ((LATE, ONE, TWICE), (ANSWERED, INTERLEAVED, NO_IMAGE))
    together, alone = it.pack(*rows), it.batch(*(sample for row in rows for sample in row))
    torch.testing.assert_close(it.model(together).logits, it.model(alone).logits, rtol=1e-5, atol=1e-5)


def test_the_latest_image_alone() -> None:
    batch = by_hand("aiiaa")
    assert moved(flamingo("latest"), batch, 0) == "..."
    assert moved(flamingo("all"), batch, 0) == moved(flamingo("all"), batch, 1) == moved(flamingo("latest"), batch, 1) == ".xx"


def test_an_earlier_image_reaches_words_behind_the_latest_through_text_alone() -> None:
    """Words between the two have seen it, and text attention carries that on; without text attention it stays with them."""
    batch = by_hand("aiaaiaa")
    silent = {media: flamingo(media) for media in ("all", "latest")}
    for it in silent.values():
        for layer in it.model.transformer.layers:
            nn.init.zeros_(layer.attention.o_proj.weight)  # type: ignore[union-attr]
    assert moved(silent["latest"], batch, 0) == ".xx.."
    assert moved(silent["all"], batch, 0) == moved(flamingo("latest"), batch, 0) == ".xxxx"
    assert moved(silent["all"], batch, 1) == moved(silent["latest"], batch, 1) == "...xx"


@both
def test_texts_of_one_image_do_not_see_the_images_of_each_other(media: str) -> None:
    it, batch = flamingo(media), by_hand("iaaiabbibb|ia_")
    assert moved(it, batch, 0) == "xxxxxxx.."
    assert moved(it, batch, 1) == "..x......"
    assert moved(it, batch, 2) == ".....xx.."
    assert moved(it, batch, 3) == ".......x."


def test_a_batch_without_images_keeps_the_blocks_in_step() -> None:
    """Reading parts have gradients of zero, so that ranks agree on which there are; the feed-forward of the blocks goes on."""
    it = flamingo()
    _, grads = gradients(it.model, it.batch(NO_IMAGE))
    names = [name for name, _ in it.model.named_parameters() if ".cross_attention." in name]
    assert set(names) <= grads.keys()
    learning = {name for name in names if grads[name].any()}
    assert learning == {name for name in names if ".mlp" in name}
    assert all(grads[name].isfinite().all() for name in names)


# ---- generation ---------------------------------------------------------------------------------------------------------

ASKED = [("what colour is it?", []), ("red?", [0]), ("is there a circle? is it red?", [2, 0, 1]), ("", [1])]


@both
def test_generation_is_the_full_pass_with_none_one_and_three_images(media: str) -> None:
    it = flamingo(media)
    prompts = it.prompts(ASKED, [picture(k) for k in range(3)])
    made = torch.tensor(generate(it.model, prompts, max_new_tokens=5, eos_id=-1))
    with torch.no_grad():
        for step in range(5):
            assert torch.equal(it.model(with_answer(prompts, made[:, :step])).logits.argmax(-1), made[:, step])
    assert len(made.unique(dim=0)) == len(ASKED)


@pytest.mark.parametrize("asked", [ASKED, ASKED[:1]], ids=["images", "none"])
def test_media_are_projected_once_for_a_prompt(asked: list[tuple[str, list[int]]]) -> None:
    it, calls = flamingo(), [0]
    for layer in it.model.transformer.layers:
        if isinstance(layer, CrossAttentionBlock):
            layer.cross_attention.k_proj.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    generate(it.model, it.prompts(asked, [picture(k) for k in range(3)]), max_new_tokens=5, eos_id=-1)
    assert calls == [2]


def one_more(row: Batch, word: int) -> Batch:
    """What follows a prompt: one word of the same text, no image."""
    last = {name: getattr(row, name)[:, -1:] for name in ("sample_ids", "text_ids")}
    none = {
        f: getattr(row, f)[:0] for f in ("image_index", "image_rows", "image_starts", "image_text_ids", "image_sample_ids", "image_slots")
    }
    new = {"input_ids": torch.full((len(row.input_ids), 1), word), "positions": row.positions[:, -1:] + 1, "kinds": row.kinds[:, -1:]}
    return replace(row, **last, **none, **new, images=None, row_images=0, row_words=1, targets=row.targets[:0])


@both
@pytest.mark.parametrize("text", ["iaaai", "aaiai", "aai", "ia|iaai", "iaibbi"])
def test_an_image_at_the_end_of_a_prompt_is_seen_by_what_follows(text: str, media: str) -> None:
    it, cache = flamingo(media), Cache()
    prompt, whole = by_hand(text), by_hand(text + text.replace("i", "")[-1] * 2)
    whole = replace(whole, images=prompt.images, input_ids=torch.cat([prompt.input_ids, torch.tensor([[7, 9]])], dim=1))
    whole = replace(whole, image_text_ids=prompt.image_text_ids)
    with torch.no_grad():
        want = all_logits(it.model, whole)[0, -3:]
        got = [it.model(prompt, cache).logits[0]]
        row = prompt
        for word in (7, 9):
            row = one_more(row, word)
            got.append(it.model(row, cache).logits[0])
    torch.testing.assert_close(torch.stack(got), want, rtol=1e-4, atol=1e-5)


# ---- with other parts ---------------------------------------------------------------------------------------------------


def test_a_resampler_in_front() -> None:
    """Flamingo as it is: features through the Perceiver, latents as media."""
    it = flamingo(adapter=PerceiverConfig(latents=3, depth=2, heads=2, head_dim=8))
    assert it.model.num_image_tokens == 3
    _, grads = gradients(it.model, it.batch(ONE, TWO_IMAGES))
    names = {name for name, _ in it.model.named_parameters() if name.startswith("adapter.")}
    assert {name for name in names if name in grads and grads[name].any()} == names


def test_flamingos_freezing(world: World) -> None:
    """The language model and the encoder are frozen; resampler, gated blocks and the embeddings of the new tokens train, nothing else."""
    model = replace(MODEL, new_tokens=["<image>", "<|endofchunk|>"])
    it = flamingo(model=model, adapter=PerceiverConfig(latents=3, depth=1, heads=2, head_dim=8))
    frozen, thawed = ["vision_encoder", "transformer"], ["transformer.new_tokens.*", "cross_attention"]
    specs = [FreezeSpec(name) for name in frozen] + [FreezeSpec(name, frozen=False) for name in thawed]
    names = [name for name, _ in it.model.named_parameters()]
    install(it, world)
    trainable = trainable_names(names, specs, it.patterns)
    assert trainable == {n for n in names if n.startswith(("adapter.", "transformer.new_tokens.")) or ".cross_attention." in n}
    apply_freeze(it.model, trainable)
    optimizers = Optimizers(it.model, it.stages, it.patterns)
    optimizers.set_step(it.stages[0], 0)
    before = copies(it.model)
    for _ in range(2):
        gradients(it.model, it.batch(THREE, TWO_IMAGES))
        optimizers.step()
        optimizers.zero_grad()
    assert {name.removeprefix("model.") for name in differing(before, copies(it.model))} == trainable


# ---- config -------------------------------------------------------------------------------------------------------------


def test_the_shipped_config_is_the_quickstart_with_another_arch() -> None:
    base, job = (load_config(ROOT / "configs" / name) for name in ("quickstart.toml", "quickstart-cross_attention.toml"))
    assert job.vlm == CrossAttentionConfig(max_text_len=base.vlm.max_text_len, freeze=[], cross_attention_every_n_layers=2)  # type: ignore[union-attr]
    assert job.run.dir != base.run.dir
    assert replace(job, vlm=base.vlm, run=base.run) == base


@pytest.mark.parametrize(
    ("vlm", "model", "message"),
    [
        ("cross_attention_every_n_layers = 5", "n_layers = 4", "cross_attention_every_n_layers = 5: gives no block in model.n_layers = 4"),
        ("cross_attention_n_kv_heads = 3", "n_heads = 8", "n_kv_heads = 3: must divide the 8 heads of cross-attention (model.n_heads, as"),
        ("cross_attention_n_heads = 3", "n_heads = 8", "cross_attention_n_heads = 3: must divide model.dim = 256"),
        ("cross_attention_n_heads = 8\ncross_attention_n_kv_heads = 5", "n_heads = 4", "= 5: must divide cross_attention_n_heads = 8"),
        ('cross_attention_media = "last"', "n_heads = 4", "cross_attention_media = 'last': allowed are 'all', 'latest'"),
    ],
)
def test_what_cannot_be_built(vlm: str, model: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(f'[vlm]\narch = "cross_attention"\n{vlm}\n[model]\n{model}\n[train]\nmax_steps = 1\nseq_len = 600\n')
    with pytest.raises(ValueError, match="cross_attention") as error:
        load_config(path)
    assert message in str(error.value) and "\n" not in str(error.value)
