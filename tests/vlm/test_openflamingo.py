"""OpenFlamingo's resampler and gated block: a small model written from its equations, with the names of its checkpoints, and ours."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kempnerforge.config.adapter import PerceiverConfig
from kempnerforge.config.vision import ViTConfig
from kempnerforge.config.vlm import CrossAttentionConfig, JointDecoderConfig
from kempnerforge.eval.generate import generate
from kempnerforge.training.initial_weights import initialise
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.cross_attention import CrossAttentionBlock
from tests.vlm.tiny import INTERLEAVED, LATE, MODEL, NO_IMAGE, ONE, Tiny, all_logits, gradients, picture, shake, tiny, with_answer

WIDE, HEADS, HEAD_DIM, LATENTS, EVERY = 24, 3, 8, 5, 2
"""Width of the vision features, not ``model.dim``; the heads are wider than either over their number."""


def feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))


class Reads(nn.Module):
    """Attention from ``x`` to ``media``: softmax(Q K^T / sqrt(E)) V, where ``sees`` says; 0 where it says nothing."""

    def __init__(self, dim: int, media: int, **norms: int) -> None:
        super().__init__()
        for name, width in norms.items():
            self.add_module(name, nn.LayerNorm(width))
        self.to_q, self.to_out = nn.Linear(dim, HEADS * HEAD_DIM, bias=False), nn.Linear(HEADS * HEAD_DIM, dim, bias=False)
        self.to_kv = nn.Linear(media, 2 * HEADS * HEAD_DIM, bias=False)

    def forward(self, x: Tensor, media: Tensor, sees: Tensor | None = None) -> Tensor:
        keys, values = self.to_kv(media).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in (self.to_q(x), keys, values))
        scores = torch.einsum("bihd,bjhd->bhij", q / HEAD_DIM**0.5, k)
        if sees is not None:
            scores = scores.masked_fill(~sees[:, None], float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)
        return self.to_out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(-2))


class Resampler(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(LATENTS, WIDE)), nn.LayerNorm(WIDE)
        layer = lambda: nn.ModuleList([Reads(WIDE, WIDE, norm_media=WIDE, norm_latents=WIDE), feed_forward(WIDE)])
        self.layers = nn.ModuleList(layer() for _ in range(depth))

    def forward(self, features: Tensor) -> Tensor:
        x = self.latents.expand(len(features), -1, -1)
        for attention, mlp in self.layers:  # type: ignore[misc]
            latents = attention.norm_latents(x)
            x = x + attention(latents, torch.cat([attention.norm_media(features), latents], 1))
            x = x + mlp(x)
        return self.norm(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ff = Reads(MODEL.dim, WIDE, norm=MODEL.dim), feed_forward(MODEL.dim)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.tensor([-0.4]))

    def forward(self, x: Tensor, media: Tensor, at: Tensor, immediate: bool) -> Tensor:
        """``media`` (B, K, F, WIDE); ``at`` (B, S), whether a word is an "<image>"."""
        time, of_media = at.cumsum(1)[..., None], 1 + torch.arange(media.shape[1]).repeat_interleave(media.shape[2])
        sees = time == of_media if immediate else time >= of_media  # (B, S, K * F)
        x = x + self.attn_gate.tanh() * self.attn(self.attn.norm(x), media.flatten(1, 2), sees)
        return x + self.ff_gate.tanh() * self.ff(x)


def shaken(module: nn.Module) -> Any:
    """Norms that are not 1 and 0."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter += 0 if name.endswith("gate") else 0.2 * torch.randn_like(parameter)
    return module


RESAMPLER, BLOCKS = shaken(Resampler()), [shaken(Gated()) for _ in range(MODEL.n_layers // EVERY)]


def checkpoint(twice: bool = False) -> dict[str, Tensor]:
    """As it is published; ``twice`` under both names that a block has in a model."""
    found = {f"perceiver.{name}": tensor for name, tensor in RESAMPLER.state_dict().items()}
    for number, block in enumerate(BLOCKS):
        layer = number * EVERY + EVERY - 1
        names = [f"lang_encoder.transformer.blocks.{layer}.gated_cross_attn_layer"]
        for place in [*names, f"lang_encoder.gated_cross_attn_layers.{layer}"] if twice else names:
            found |= {f"{place}.{name}": tensor for name, tensor in block.state_dict().items()}
    return found | {"lang_encoder.transformer.wte.weight": torch.zeros(3, 2)}


def vlm(path: Path | str = "", media: str = "latest", **keys: Any) -> CrossAttentionConfig:
    how = {"cross_attention_block": "openflamingo", "cross_attention_head_dim": HEAD_DIM, "openflamingo_path": str(path)}
    sizes = {"cross_attention_n_heads": HEADS, "cross_attention_every_n_layers": EVERY, "max_text_len": 64, "freeze": []}
    return CrossAttentionConfig(cross_attention_media=media, **{**how, **sizes, **keys})


def ours(path: Path | str = "", media: str = "latest", **keys: Any) -> Tiny:
    adapter = PerceiverConfig(latents=LATENTS, depth=2, heads=HEADS, head_dim=HEAD_DIM, project=False)
    encoder = ViTConfig(image_size=16, patch_size=8, dim=WIDE, n_layers=1, n_heads=2)
    return tiny("cross_attention", noise=0, vision_encoder=encoder, **{"vlm": vlm(path, media), "adapter": adapter, **keys})


@pytest.mark.parametrize("media", ["latest", "all"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "training run"])
def test_resampler_and_blocks_are_those_of_the_equations(media: str, twice: bool, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file({"module." * twice + name: tensor.clone() for name, tensor in checkpoint(twice=twice).items()}, path)
    it = ours(path, media)
    initialise(it.model)
    assert {name for name, _ in it.model.named_parameters() if name.startswith("adapter.") or "cross_attention" in name} <= it.model.loaded
    it.model.double()
    resampler, gated = deepcopy(RESAMPLER).double(), deepcopy(nn.ModuleList(BLOCKS)).double()
    features = torch.randn(3, 4, WIDE, dtype=torch.float64)
    torch.testing.assert_close(it.model.adapter(features), resampler(features), rtol=0, atol=1e-12)

    batch = it.batch(INTERLEAVED, LATE, ONE, NO_IMAGE)
    seen: list[tuple[Tensor, Tensor]] = []
    blocks = [layer for layer in it.model.transformer.layers if isinstance(layer, CrossAttentionBlock)]
    for block in blocks:
        block.cross_attention.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        all_logits(it.model, batch)
        assert batch.images is not None
        images = resampler(it.model.vision_encoder(batch.images))
        tokens = torch.zeros(len(batch.input_ids), batch.row_images, LATENTS, WIDE, dtype=torch.float64)
        tokens[batch.image_rows, batch.image_slots] = images[batch.image_index]
        at = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        at[batch.image_rows, batch.image_starts] = True
        assert torch.equal(at[:2], batch.input_ids[:2] == it.encoder.tokenizer.token_id("<image>")), "an image is where its token is"
        real = batch.sample_ids >= 0
        for (x, out), theirs in zip(seen, gated, strict=True):
            torch.testing.assert_close(out[real], theirs(x, tokens, at, media == "latest")[real], rtol=0, atol=1e-12)
            nothing = (at.cumsum(1) == 0) & real
            assert nothing.any()
            torch.testing.assert_close(out[nothing], (x + theirs.ff_gate.tanh() * theirs.ff(x))[nothing], rtol=0, atol=1e-12)


def test_the_language_model_is_unchanged_until_gates_open() -> None:
    it, text = ours(), tiny("cross_attention", noise=0)
    names = dict(it.model.named_parameters())
    assert all(torch.equal(names[name], p) for name, p in text.model.named_parameters() if "cross" not in name and "transformer" in name)
    batch = it.batch(INTERLEAVED, ONE)
    assert torch.equal(all_logits(it.model, batch), all_logits(text.model, text.batch(INTERLEAVED, ONE)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"perceiver.frame_embs": torch.zeros(2, WIDE)}, "has adapter.frame_embs, .* max_num_frames and max_num_media"),
        ({"perceiver.layers.0.0.to_x.weight": torch.zeros(2)}, "to_x.weight is no tensor of OpenFlamingo"),
        (
            {"lang_encoder.model.layers.0.gated_cross_attn_layer.attn_gate": torch.zeros(1)},
            "has transformer.layers.0.cross_attention.attention_g",
        ),
        ({"perceiver.layers.0.0.to_kv.weight": torch.zeros(3)}, "to_kv.weight is no tensor of OpenFlamingo"),
        ({"perceiver.layers.first": torch.zeros(3)}, "has adapter.layers.first"),
        ({"perceiver.norm.bias": None}, "lacks adapter.norm.bias"),
        ({"perceiver.norm.bias": torch.zeros(2)}, "adapter.norm.bias has shape"),
    ],
)
def test_a_checkpoint_that_does_not_fit(changed: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in {**checkpoint(), **changed}.items() if tensor is not None}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "c.safetensors")
    with pytest.raises(InputError, match=message):
        initialise(ours(tmp_path / "c.safetensors").model)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", {"a": torch.zeros(1)}])
def test_files_that_are_no_checkpoint(content: bytes | dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(InputError, match="c.safetensors: (cannot be read as tensors|has neither perceiver)"):
        initialise(ours(path).model)
    with pytest.raises(InputError, match=r"vlm.openflamingo_path = '.*/missing.pt': no such file"):
        initialise(ours(tmp_path / "missing.pt").model)
    torch.save(checkpoint(), tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"c.pt: a checkpoint of OpenFlamingo is read from safetensors alone, no pickle is"):
        initialise(ours(tmp_path / "c.pt").model)


def test_keys_that_do_not_go_together() -> None:
    with pytest.raises(InputError, match="adapter.type = 'perceiver': gives tokens 24 wide, and vlm.arch = 'joint_decoder'"):
        ours(vlm=JointDecoderConfig(max_text_len=64, freeze=[]))
    for keys, message in (
        ({"cross_attention_block": "llama"}, "cross_attention_block = 'llama'"),
        ({"cross_attention_block": "backbone"}, "openflamingo_path = 'a.pt': only cross_attention_block = 'openflamingo' reads it"),
        ({"cross_attention_qk_norm": True}, "cross_attention_qk_norm = True: only cross_attention_block = 'backbone' reads it"),
    ):
        with pytest.raises(InputError, match=message):
            vlm("a.pt", **keys)
    with pytest.raises(InputError, match="bias = False: only project = true reads it"):
        PerceiverConfig(project=False, bias=False)


def test_words_after_a_prompt_read_media_of_their_own_width() -> None:
    """With a cache as in a full pass; a batch without any image calls the same modules."""
    it = ours()
    shake(it.model, 0.3)
    it.model.eval()
    prompts = it.prompts([("is <image> like <image>?", [0, 1]), ("what?", [])], [picture(0), picture(1)])
    made = torch.tensor(generate(it.model, prompts, max_new_tokens=4, eos_id=-1))
    with torch.no_grad():
        for step in range(4):
            assert torch.equal(it.model(with_answer(prompts, made[:, :step])).logits.argmax(-1), made[:, step])
    _, grads = gradients(it.model, it.batch(NO_IMAGE))
    assert grads.keys() == {name for name, _ in it.model.named_parameters()}
