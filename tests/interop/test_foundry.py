"""VLA Foundry's ``vlm``, written out from what its code computes, with the weights of ours: the same logits. Its four compositions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor

from kempnerforge.config import ModelConfig, RunConfig
from kempnerforge.config.adapter import PixelShuffleConfig
from kempnerforge.config.vision import SiglipConfig, ViTConfig
from kempnerforge.interop.settings import complete, model_config
from kempnerforge.training.initial_weights import initialise
from kempnerforge.util.reading import read_object
from tests.interop.tiny_vlms import TEXT
from tests.model.test_hf_towers import SIGLIP
from tests.vlm.tiny import MODEL, ONE, all_logits, gradients, tiny, tokenizer

DECODER = ModelConfig(dim=32, n_layers=3, n_heads=4, ffn_dim=64, norm="layer_norm", norm_eps=1e-5, tie_embeddings=False)
VIT = ViTConfig(image_size=16, patch_size=4, dim=24, mlp_dim=40, n_layers=2, n_heads=2)


def theirs(p: Mapping[str, Tensor], words: Tensor, images: Tensor, embed_norm: bool) -> Tensor:
    """(B, S, V) of rows with one image in front of their words: (B, S) ids, the image's places among them; (B, 3, 16, 16) in [-1, 1]."""

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def attend(x: Tensor, name: str, heads: int, out: str, causal: bool) -> Tensor:
        q, k, v = (linear(x, f"{name}.{part}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv")
        if causal:
            angles = torch.arange(x.shape[1])[:, None] * 10_000 ** (-torch.arange(0, q.shape[-1], 2) / q.shape[-1])
            cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
            q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return linear(o.transpose(1, 2).flatten(2), f"{name}.{out}")

    # the vision transformer of SigLIP's form, and space-to-depth: n (w ws h hs) c -> n (w h) (ws hs c)
    x = F.conv2d(images, p["vision_encoder.patch_embedding.weight"], p["vision_encoder.patch_embedding.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2) + p["vision_encoder.position_embedding"]
    for k in range(VIT.n_layers):
        block = f"vision_encoder.layers.{k}"
        x = x + attend(norm(x, f"{block}.norm1", 1e-6), f"{block}.attention", VIT.n_heads, "out_proj", False)
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"), approximate="tanh"), f"{block}.mlp.fc2")
    x = norm(x, "vision_encoder.norm", 1e-6).view(len(x), 2, 2, 2, 2, -1)
    image = linear(x.permute(0, 1, 3, 2, 4, 5).reshape(len(x), 4, -1), "adapter.proj")

    # the decoder, whose norm after the embedding is of images as well
    x = torch.cat([image, F.embedding(words, p["transformer.token_embedding.weight"])[:, 4:]], dim=1)
    x = norm(x, "transformer.embed_norm", 1e-5) if embed_norm else x
    for k in range(DECODER.n_layers):
        layer = f"transformer.layers.{k}"
        x = x + attend(norm(x, f"{layer}.attention_norm", 1e-5), f"{layer}.attention", DECODER.n_heads, "o_proj", True)
        hidden = norm(x, f"{layer}.mlp_norm", 1e-5)
        x = x + linear(F.silu(linear(hidden, f"{layer}.mlp.gate_proj")) * linear(hidden, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return linear(norm(x, "transformer.norm", 1e-5), "transformer.output_head")


@pytest.mark.parametrize("embed_norm", [False, True])
def test_logits(embed_norm: bool) -> None:
    model = replace(DECODER, embed_norm=embed_norm, new_tokens=MODEL.new_tokens)
    it = tiny("joint_decoder", model=model, vision_encoder=VIT, adapter=PixelShuffleConfig(factor=2, bias=False), noise=0.2)
    batch = it.batch(ONE)
    assert batch.images is not None and batch.leading_images == 1
    p: dict[str, Tensor] = dict(it.model.named_parameters())
    new = [p.pop(f"transformer.new_tokens.{part}.weight") for part in ("embedding", "output_head")]
    for name, rows in zip(("token_embedding", "output_head"), new, strict=True):
        p[f"transformer.{name}.weight"] = torch.cat([p[f"transformer.{name}.weight"], rows])
    with torch.no_grad():
        want = theirs(p, batch.input_ids, batch.images.float() / 127.5 - 1, embed_norm)
    torch.testing.assert_close(all_logits(it.model.eval(), batch), want, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and a language model of transformers."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP)).save_pretrained(folder / "tower")
    text: dict[str, Any] = TEXT | {"vocab_size": tokenizer().vocab_size}
    hf.LlamaForCausalLM(hf.LlamaConfig(**text, tie_word_embeddings=False)).save_pretrained(folder / "text")
    return folder


@pytest.mark.parametrize("decoder", ["ours", "transformers"])
@pytest.mark.parametrize("tower", ["ours", "transformers"])
def test_compositions(files: Path, tower: str, decoder: str) -> None:
    """Weights that come from files are there, and with a frozen tower a step changes all but the tower."""
    foreign = {"vision_encoder": tower != "ours", "transformer": decoder != "ours"}
    vision = SiglipConfig(path=str(files / "tower"), image_size=32) if foreign["vision_encoder"] else VIT
    run, model = RunConfig(), DECODER
    if foreign["transformer"]:
        run = RunConfig(init_from=str(files / "text"), init_allow=["vision_encoder.*", "adapter.*"])
        model = model_config(complete(read_object(files / "text" / "config.json")), tokenizer().vocab_size)
    it = tiny("joint_decoder", model=model, vision_encoder=vision, adapter=PixelShuffleConfig(factor=2), run=run, noise=0)
    initialise(it.model)
    for part, from_files in foreign.items():
        names = {f"{part}.{name}" for name, _ in it.model.get_submodule(part).named_parameters()}
        assert names & it.model.loaded == (names if from_files else set())
    before = {name: p.detach().clone() for name, p in it.model.named_parameters()}
    it.model.vision_encoder.requires_grad_(False)
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.5)
    gradients(it.model, it.batch(ONE))
    optimizer.step()
    still = {name for name, p in it.model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if name.startswith("vision_encoder.")}
