"""nanoVLM's files as ours, against its arithmetic written down here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from kempnerforge import load_pretrained
from kempnerforge.convert.commands import import_model
from kempnerforge.convert.verify import make_probe, our_logits
from kempnerforge.data.batching.batch import Kind
from kempnerforge.interop import nanovlm
from kempnerforge.interop.external_tokenizer import read_tokenizer
from kempnerforge.interop.open_external import open_external
from kempnerforge.training.setup import assemble
from kempnerforge.util.errors import InputError
from tests.interop.tiny_vlms import write_tokenizer

VISION, TEXT, FFN, VOCAB, HEADS, GROUPS, PATCH, SIDE, FACTOR = 24, 32, 48, 340, 4, 2, 7, 4, 2
CONFIG: dict[str, Any] = {
    "vit_hidden_dim": VISION, "vit_inter_dim": 40, "vit_patch_size": PATCH, "vit_img_size": PATCH * SIDE, "vit_n_heads": 2,
    "vit_n_blocks": 2, "vit_ln_eps": 1e-6, "vit_cls_flag": False, "lm_hidden_dim": TEXT, "lm_inter_dim": FFN, "lm_rms_eps": 1e-5,
    "lm_re_base": 100000, "lm_max_position_embeddings": 128, "lm_vocab_size": VOCAB, "lm_n_heads": HEADS, "lm_n_kv_heads": GROUPS,
    "lm_n_blocks": 2, "lm_tie_weights": True, "mp_pixel_shuffle_factor": FACTOR, "lm_tokenizer": "HuggingFaceTB/SmolLM2-360M-Instruct",
}  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """Under the names that nanoVLM gives them."""
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "vision_encoder.patch_embedding.position_embedding": (1, SIDE**2, VISION),
        "vision_encoder.patch_embedding.conv.weight": (VISION, 3, PATCH, PATCH),
        "vision_encoder.patch_embedding.conv.bias": (VISION,),
        "MP.proj.weight": (TEXT, VISION * FACTOR**2),
        "decoder.token_embedding.weight": (VOCAB, TEXT),
        "decoder.norm.weight": (TEXT,),
        "vision_encoder.layer_norm.weight": (VISION,),
        "vision_encoder.layer_norm.bias": (VISION,),
    }
    for k in range(2):
        for part, rows, columns in (("attn.qkv_proj", 72, 24), ("attn.out_proj", 24, 24), ("mlp.fc1", 40, 24), ("mlp.fc2", 24, 40)):
            shapes |= {f"vision_encoder.blocks.{k}.{part}.weight": (rows, columns), f"vision_encoder.blocks.{k}.{part}.bias": (rows,)}
        shapes |= {f"vision_encoder.blocks.{k}.{norm}.{w}": (VISION,) for norm in ("ln1", "ln2") for w in ("weight", "bias")}
        kv = TEXT // HEADS * GROUPS
        for part, shape in {"attn.q_proj": (TEXT, TEXT), "attn.k_proj": (kv, TEXT), "attn.v_proj": (kv, TEXT), "attn.out_proj": (TEXT, TEXT),
                            "mlp.gate_proj": (FFN, TEXT), "mlp.up_proj": (FFN, TEXT), "mlp.down_proj": (TEXT, FFN)}.items():  # fmt: skip
            shapes[f"decoder.blocks.{k}.{part}.weight"] = shape
        shapes |= {f"decoder.blocks.{k}.{norm}.weight": (TEXT,) for norm in ("norm1", "norm2")}
    made = {name: torch.randn(shape, generator=draw) * 0.15 for name, shape in shapes.items()}
    made["decoder.head.weight"] = made["decoder.token_embedding.weight"].clone()
    return made


def save(path: Path, found: dict[str, Tensor]) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(found, path / "model.safetensors")
    write_tokenizer(path, prefix=False)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)  # (N, heads, S, E)


def image_tokens(w: dict[str, Tensor], images: Tensor) -> Tensor:
    """(N, 3, H, W) in [0, 1] -> (N, tokens, TEXT)."""
    p = "vision_encoder.patch_embedding."
    x = F.conv2d(images, w[p + "conv.weight"], w[p + "conv.bias"], stride=PATCH).flatten(2).transpose(1, 2) + w[p + "position_embedding"]
    for k in range(2):
        b = f"vision_encoder.blocks.{k}."
        h = F.layer_norm(x, (VISION,), w[b + "ln1.weight"], w[b + "ln1.bias"], 1e-6)
        q, key, v = (heads(t, 2) for t in F.linear(h, w[b + "attn.qkv_proj.weight"], w[b + "attn.qkv_proj.bias"]).split(VISION, dim=-1))
        o = F.scaled_dot_product_attention(q, key, v).transpose(1, 2).flatten(2)
        x = x + F.linear(o, w[b + "attn.out_proj.weight"], w[b + "attn.out_proj.bias"])
        h = F.layer_norm(x, (VISION,), w[b + "ln2.weight"], w[b + "ln2.bias"], 1e-6)
        h = F.gelu(F.linear(h, w[b + "mlp.fc1.weight"], w[b + "mlp.fc1.bias"]), approximate="tanh")
        x = x + F.linear(h, w[b + "mlp.fc2.weight"], w[b + "mlp.fc2.bias"])
    x = F.layer_norm(x, (VISION,), w["vision_encoder.layer_norm.weight"], w["vision_encoder.layer_norm.bias"], 1e-6)
    x = x.view(len(x), SIDE, SIDE, VISION)
    windows = [x[:, i : i + FACTOR, j : j + FACTOR].reshape(len(x), -1) for i in range(0, SIDE, FACTOR) for j in range(0, SIDE, FACTOR)]
    return F.linear(torch.stack(windows, dim=1), w["MP.proj.weight"])


def decode(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B, S, TEXT) -> (B, S, VOCAB) logits."""

    def norm(t: Tensor, name: str) -> Tensor:
        return t * torch.rsqrt(t.square().mean(-1, keepdim=True) + 1e-5) * w[name]

    width = TEXT // HEADS
    angles = torch.arange(x.shape[1])[:, None] * 100000.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = (torch.cat([t, t], dim=-1) for t in (angles.cos(), angles.sin()))

    def turned(t: Tensor) -> Tensor:
        return t * cos + torch.cat([-t[..., width // 2 :], t[..., : width // 2]], dim=-1) * sin

    for k in range(2):
        b = f"decoder.blocks.{k}."
        h = norm(x, b + "norm1.weight")
        q, key, v = (heads(F.linear(h, w[f"{b}attn.{n}_proj.weight"]), c) for n, c in (("q", HEADS), ("k", GROUPS), ("v", GROUPS)))
        key, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (turned(key), v))
        o = F.scaled_dot_product_attention(turned(q), key, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.linear(o, w[b + "attn.out_proj.weight"])
        h = norm(x, b + "norm2.weight")
        h = F.silu(F.linear(h, w[b + "mlp.gate_proj.weight"])) * F.linear(h, w[b + "mlp.up_proj.weight"])
        x = x + F.linear(h, w[b + "mlp.down_proj.weight"])
    return F.linear(norm(x, "decoder.norm.weight"), w["decoder.token_embedding.weight"])


def test_logits(tmp_path: Path) -> None:
    w = tensors()
    save(tmp_path, w)
    external = open_external(tmp_path)
    assembly = assemble(external.job, read_tokenizer(tmp_path, None), data=False)
    assembly.model.load_state_dict(external.read(), strict=True)
    probe = make_probe(replace(assembly, model=assembly.model.eval()), None, VOCAB)
    batch = probe.batch
    assert batch.images is not None
    x = w["decoder.token_embedding.weight"][batch.input_ids]
    tokens = image_tokens(w, batch.images / 255)
    for row, start in enumerate(batch.image_starts.tolist()):
        x[row, start : start + tokens.shape[1]] = tokens[row]
    assert (our_logits(assembly.model, batch) - decode(w, x)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["decoder.blocks.1.attn.q_proj.weight", "vision_encoder.blocks.0.attn.qkv_proj.bias", "MP.proj.weight"])
def test_a_renamed_key_is_named(name: str, tmp_path: Path) -> None:
    found = tensors()
    found[name + "_"] = found.pop(name)
    save(tmp_path, found)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        open_external(tmp_path)


def test_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tensors() | {"decoder.head.weight": torch.zeros(VOCAB, TEXT)})
    with pytest.raises(ValueError, match=r"decoder.head.weight is not decoder.token_embedding.weight"):
        open_external(tmp_path).read()


@pytest.mark.parametrize(("key", "value"), [("vit_cls_flag", True), ("lm_tie_weights", False)])
def test_settings_that_we_have_not_are_refused(key: str, value: bool, tmp_path: Path) -> None:
    save(tmp_path, load_file(tmp_path / "model.safetensors") if (tmp_path / "model.safetensors").exists() else tensors())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    with pytest.raises(ValueError, match=key):
        open_external(tmp_path)


# ---- files that it writes itself --------------------------------------------------------------------------------------

GRID = {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in range(1, 9) for c in range(1, 9)}
EXTRA = {"image_token": "<|image|>", "global_image_token": "<|global_image|>", **GRID}
LATER = {
    "lm_chat_template": nanovlm.CHATML,
    "vlm_extra_tokens": EXTRA,
    "max_img_size": 56,
    "resize_to_max_side_len": False,
    "lm_vocab_size": 420,
}


def saved_by_it(path: Path, **keys: Any) -> Path:
    """As safetensors writes a model with a tied pair: one name, the other noted."""
    path.mkdir()
    rows, found = keys.get("lm_vocab_size", VOCAB), tensors()
    found["decoder.head.weight"] = torch.randn(rows, TEXT, generator=torch.Generator().manual_seed(1))
    del found["decoder.token_embedding.weight"]
    save(path, found)
    save_file(found, path / "model.safetensors", metadata={"decoder.token_embedding.weight": "decoder.head.weight"})
    (path / "config.json").write_text(json.dumps(CONFIG | keys))
    return path


def test_one_name_of_the_tied_pair_is_enough(tmp_path: Path) -> None:
    source = saved_by_it(tmp_path / "own")
    weights = open_external(source).read()
    assert torch.equal(weights["transformer.token_embedding.weight"], load_file(source / "model.safetensors")["decoder.head.weight"])


def prompt_of(run: Path, picture: Image.Image) -> tuple[str, int]:
    """What is asked of an imported run, and how many views."""
    _, ours = load_pretrained(run, device="cpu")
    made = ours(images=picture, text="what?")
    ids = made["input_ids"][0][made.batch.kinds[0] != Kind.IMAGE].tolist()
    names = ours.tokenizer.special_names
    return "".join(names.get(i) or ours.tokenizer.decode([i]) for i in ids).replace("▁", " "), len(made["pixel_values"])


@pytest.mark.parametrize(
    ("keys", "asked", "views"),
    [
        ({}, "Question: what? Answer:", 1),
        (
            LATER | {"vlm_extra_tokens": {"image_token": "<|image|>"}},
            "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n",
            1,
        ),
        (
            LATER,
            "<|im_start|>user\n<|global_image|><row_1_col_1><row_1_col_2>what?<|im_end|>\n<|im_start|>assistant\n",
            3,
        ),
        (
            LATER | {"resize_to_max_side_len": True, "max_img_size": 84},
            "<|im_start|>user\n<|global_image|>"
            + "".join(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2, 3))
            + "what?<|im_end|>\n<|im_start|>assistant\n",
            7,
        ),
    ],
)
def test_each_generation_is_asked_as_it_was_trained(keys: dict[str, Any], asked: str, views: int, tmp_path: Path) -> None:
    done = import_model(saved_by_it(tmp_path / "own", **keys), tmp_path / "run")
    assert prompt_of(tmp_path / "run", Image.effect_noise((56, 28), 60)) == (asked, views)
    assert any("bilinear" in line for line in done.lines) == (views > 1), "what is otherwise is said"


def test_a_factor_of_the_attention_is_followed(tmp_path: Path) -> None:
    """Cosines and sines are multiplied by it there, so a product of query and key is by its square."""
    job = open_external(saved_by_it(tmp_path / "own", lm_attn_scaling=1.5)).job
    assert job.model.attention_scale == pytest.approx(1.5**2 * (TEXT // HEADS) ** -0.5)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"lm_attn_scaling": "x"}, "lm_attn_scaling"),
        ({"lm_chat_template": "{{ messages }}"}, "lm_chat_template"),
        (LATER | {"vlm_extra_tokens": {"image_token": "<img>"}}, "vlm_extra_tokens"),
        (LATER | {"vlm_extra_tokens": {**EXTRA, "r9c9": "<row_9_col_9>"}}, "vlm_extra_tokens"),
        (LATER | {"max_img_size": 57}, "max_img_size"),
        ({"mp_image_token_length": 9}, "mp_image_token_length"),
    ],
)
def test_what_cannot_be_followed_is_named(keys: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        import_model(saved_by_it(tmp_path / "own", **keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_embedding_without_room_for_its_tokens_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, prefix=False)
    there = read_tokenizer(tmp_path, None).vocab_size
    with pytest.raises(InputError, match=f"lm_vocab_size = {there + 3}: .* '<row_1_col_2>'"):
        import_model(saved_by_it(tmp_path / "own", **LATER | {"lm_vocab_size": there + 3}), tmp_path / "run")
