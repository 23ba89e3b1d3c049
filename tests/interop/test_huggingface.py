"""Weights that transformers wrote, in our backbone: the same logits, and nothing left over."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kempnerforge.interop import read_text_weights
from kempnerforge.interop.open_external import open_external
from tests.interop.families import FAMILIES, VOCAB, backbone, config_of, logits, save

by_family = pytest.mark.parametrize("family", FAMILIES)


def edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def edit_tensors(path: Path, rename: dict[str, str] | None = None, **tensors: Tensor) -> None:
    """Renames by prefix, and adds."""
    found = load_file(path / "model.safetensors")
    for old, new in (rename or {}).items():
        found = {new + name.removeprefix(old) if name.startswith(old) else name: value for name, value in found.items()}
    save_file(found | tensors, path / "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "llama"
    save("llama", path)
    return path


@pytest.fixture
def llama(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "llama"))


@by_family
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    theirs = save(family, tmp_path)
    ours = backbone(read_text_weights(tmp_path, config_of(family)), config_of(family))
    ids = torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = logits(ours, ids), theirs(input_ids=ids, use_cache=False).logits
    assert want.std() > 0.3
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_shards_are_one_model(saved: Path, tmp_path: Path) -> None:
    save("llama", tmp_path, shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    whole, sharded = (read_text_weights(path, config_of("llama")) for path in (saved, tmp_path))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_the_files_dtype_is_kept(tmp_path: Path) -> None:
    save("smollm2", tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in read_text_weights(tmp_path, config_of("smollm2")).values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "llama 3.1", "linear scaling", "gemma"])
def test_settings_of_older_files_mean_the_same(family: str, tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` stood on their own, and Gemma's tanh GELU was called "gelu"."""
    save(family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else {"type" if k == "rope_type" else k: v for k, v in rope.items()}
    if family == "gemma":
        config |= {"hidden_act": "gelu", "hidden_activation": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_text_weights(tmp_path, config_of(family))
    with pytest.raises(ValueError, match="rope_theta = .* there, model.rope_theta = 123"):
        read_text_weights(tmp_path, config_of(family, rope_theta=123.0))


# ---- heads ----------------------------------------------------------------------------------------------------------


def test_an_embedding_that_is_the_head_is_given_to_both(tmp_path: Path) -> None:
    save("smollm2", tmp_path)
    weights = read_text_weights(tmp_path, config_of("smollm2", tie_embeddings=False))
    assert torch.equal(weights["transformer.output_head.weight"], weights["transformer.token_embedding.weight"])


def test_a_head_of_its_own_is_not_dropped(llama: Path) -> None:
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding; set model.tie_embeddings = false"):
        read_text_weights(llama, config_of("llama", tie_embeddings=True))
    edit_tensors(llama, **{"lm_head.weight": load_file(llama / "model.safetensors")["model.embed_tokens.weight"].clone()})
    assert "transformer.output_head.weight" not in read_text_weights(llama, config_of("llama", tie_embeddings=True))


def test_an_untied_model_without_its_head_is_refused(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1: lm_head.weight"):
        read_text_weights(llama, config_of("llama"))


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        {"model.": "language_model.model.", "lm_head": "language_model.lm_head"},
        {"model.": "model.language_model."},
        {"model.": ""},
    ],
    ids=str,
)
def test_the_text_model_is_found_wherever_it_is(saved: Path, llama: Path, rename: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    vision = {"vision_tower.vision_model.a": torch.zeros(2), "multi_modal_projector.linear.weight": torch.zeros(2)}
    edit_tensors(llama, rename, **vision, **{"layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)})
    text = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    with caplog.at_level(logging.INFO, "kempnerforge"):
        got, want = (read_text_weights(path, config_of("llama")) for path in (llama, saved))
    assert all(torch.equal(got[name], want[name]) for name in want) and got.keys() == want.keys()
    assert "2 tensors that the model does not read are left aside" in caplog.text


def test_new_tokens_are_not_asked_for(llama: Path) -> None:
    cfg = replace(config_of("llama"), new_tokens=["<image>"])
    assert not [name for name in read_text_weights(llama, cfg) if "new_tokens" in name]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"rope_theta": 1e4}, "rope_theta = 500000.0 there, model.rope_theta = 10000.0 here"),
        ({"n_heads": 2}, "num_attention_heads = 4 there, model.n_heads = 2 here"),
        ({"n_kv_heads": 4}, "num_key_value_heads = 2 there, model.n_kv_heads = 4 here"),
        ({"norm_eps": 1e-6}, "rms_norm_eps = 1e-05 there, model.norm_eps = 1e-06 here"),
        ({"activation": "geglu"}, "activation = 'swiglu' there, model.activation = 'geglu' here"),
        ({"qk_norm": True}, "qk_norm = False there, model.qk_norm = True here"),
        ({"embed_scale": True}, "embed_scale = False there"),
        ({"logit_softcap": 30.0}, "logit_softcap = 0.0 there"),
        ({"n_layers": 3}, "num_hidden_layers = 2 there, model.n_layers = 3 here"),
        ({"ffn_dim": 96}, "intermediate_size = 80 there, model.ffn_dim = 96 here"),
        ({"vocab_size": 98}, r"embed_tokens.weight .*has shape \(97, 48\), the model's has \(98, 48\); model.vocab_size must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_model_is_refused(saved: Path, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_text_weights(saved, config_of("llama", **knobs))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "mamba"}, "model_type = 'mamba': text weights are read from gemma, gemma2, gemma3_text, llama,"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type = 'yarn'"),
        ({"model_type": "mistral", "sliding_window": 32}, "sliding_window = 32 there, model.sliding_window = 0 here"),
        ({"attention_bias": True}, "attention_bias = true: of a llama only null or false can be read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_backbone_cannot_be_is_refused(llama: Path, values: dict[str, Any], message: str) -> None:
    edit_config(llama, **values)
    with pytest.raises(ValueError, match=message):
        read_text_weights(llama, config_of("llama"))


def test_every_tensor_is_accounted_for(llama: Path) -> None:
    edit_tensors(llama, **{"model.layers.0.self_attn.o_proj.bias": torch.zeros(48)})
    with pytest.raises(ValueError, match=r"has no place for 1: model.layers.0.self_attn.o_proj.bias"):
        read_text_weights(llama, config_of("llama"))


def test_a_renamed_tensor_is_named(llama: Path) -> None:
    edit_tensors(llama, {"model.layers.1.mlp.up_proj": "model.layers.1.mlp.w1"})
    with pytest.raises(ValueError, match="lacks 1: model.layers.1.mlp.up_proj.weight"):
        read_text_weights(llama, config_of("llama"))


def test_quantised_weights_are_refused(llama: Path) -> None:
    edit_tensors(llama, **{"model.norm.weight": torch.ones(48, dtype=torch.int8)})
    with pytest.raises(ValueError, match="model.norm.weight .*torch.int8; quantised"):
        read_text_weights(llama, config_of("llama"))


def test_directories_that_hold_nothing_are_refused(llama: Path, tmp_path: Path) -> None:
    cfg = config_of("llama")
    with pytest.raises(ValueError, match=r"none/config.json: cannot be read"):
        read_text_weights(tmp_path / "none", cfg)
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors are read"):
        read_text_weights(llama, cfg)
    (llama / "model.safetensors").write_bytes(b"\x80\x04 not safe")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        read_text_weights(llama, cfg)
    (llama / "model.safetensors").unlink()
    index = llama / "model.safetensors.index.json"
    for content, message in [
        ("[]", "holds no JSON object"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its directory"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: cannot be read"),
    ]:
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_text_weights(llama, cfg)
    (llama / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_text_weights(llama, cfg)


# ---- two sets of weights --------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(llama: Path, tmp_path: Path) -> Path:
    """A directory with shards, their index, and a single file of other weights, which transformers would read."""
    save("llama", tmp_path / "shards", shard_size="30KB")
    edit_tensors(llama, **{"model.norm.weight": torch.full((48,), 7.0)})
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, llama / file.name)
    return llama


def test_two_sets_of_weights_are_refused_with_both_names(sharded: Path) -> None:
    with pytest.raises(ValueError, match=r"two sets of weights, model\.safetensors and the \d+ shards of model\.safetensors\.index\.json"):
        read_text_weights(sharded, config_of("llama"))
    next(sharded.glob("model-*")).unlink()
    with pytest.raises(ValueError, match="two sets of weights"):
        read_text_weights(sharded, config_of("llama"))


def test_an_index_of_shards_that_are_gone_hides_nothing(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard in sharded.glob("model-*"):
        shard.unlink()
    weights = read_text_weights(sharded, config_of("llama"))
    assert (weights["transformer.norm.weight"] == 7).all()
    assert "none of the shards that model.safetensors.index.json names is there" in caplog.text


@pytest.mark.parametrize("name", ["consolidated.safetensors", "pytorch_model.bin", "model.gguf", "model.fp16.safetensors"])
def test_what_transformers_does_not_read_is_not_read(name: str, saved: Path, llama: Path) -> None:
    (llama / name).write_bytes(b"other weights")
    got, want = (read_text_weights(path, config_of("llama")) for path in (llama, saved))
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_an_adapter_beside_the_weights_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has adapter_config\.json, so there is an adapter beside the weights"):
        read_text_weights(llama, config_of("llama"))


def test_a_head_that_should_be_tied_and_is_another_is_refused_by_every_door(llama: Path) -> None:
    edit_config(llama, tie_word_embeddings=True)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, but its config\.json says that they are tied"
    ):
        read_text_weights(llama, config_of("llama"))
    with pytest.raises(
        ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, but its config\.json says that they are tied"
    ):
        open_external(llama).read()


def test_the_text_of_a_paligemma_may_see_both_ways(tmp_path: Path) -> None:
    """Its class sets that itself; which of our positions do is ``vlm.attention_mask``."""
    save("gemma", tmp_path / "gemma")
    text = json.loads((tmp_path / "gemma" / "config.json").read_text()) | {"use_bidirectional_attention": True}
    (tmp_path / "gemma" / "config.json").write_text(json.dumps({"model_type": "paligemma", "text_config": text}))
    assert read_text_weights(tmp_path / "gemma", config_of("gemma"))


SETTINGS: dict[str, dict[str, Any]] = {
    "use_bidirectional_attention": {"use_bidirectional_attention": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "is_causal": {"is_causal": False},
    "rope_type": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}},
    "quantization_config": {"quantization_config": {"quant_method": "bitsandbytes"}},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_import_refuses_init_from_refuses(name: str, llama: Path) -> None:
    edit_config(llama, **SETTINGS[name])
    said = []
    for door in (lambda: open_external(llama), lambda: read_text_weights(llama, config_of("llama"))):
        with pytest.raises(ValueError, match=name) as caught:
            door()
        said.append(str(caught.value))
    assert said[0] == said[1]
