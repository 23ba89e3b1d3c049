"""Every text family in both directions, against transformers' own classes. Run as a script, it prints the table family x direction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from kempnerforge.config import ModelConfig, RopeScaling
from kempnerforge.interop import read_text_weights
from kempnerforge.interop.families import FAMILIES as TABLE
from kempnerforge.interop.families import hf_name
from kempnerforge.interop.settings import complete, facts, hf_config, hf_facts, model_config
from kempnerforge.interop.write import plain_embedding, save_tensors, write_language_model
from kempnerforge.model.transformer import Cache, Transformer
from tests.interop.families import FAMILIES, VOCAB, backbone, config_of, logits, save

by_family = pytest.mark.parametrize("family", FAMILIES)
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Pair(NamedTuple):
    """A model of transformers, ours with its weights, and what it was written as again."""

    theirs: Any
    ours: Transformer
    cfg: ModelConfig
    back: Any
    left_over: dict[str, list[str]]
    path: Path


def pair(family: str, tmp_path: Path) -> Pair:
    theirs = save(family, tmp_path / "theirs")
    cfg = model_config(complete(json.loads((tmp_path / "theirs" / "config.json").read_text())), VOCAB)
    weights = read_text_weights(tmp_path / "theirs", cfg)
    ours = backbone(weights, cfg)
    state = {f"transformer.{name}": value for name, value in ours.state_dict().items()}
    write_language_model(tmp_path / "back", cfg, state, IDS)
    back, info = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True, dtype=torch.float32)
    left_over = {kind: sorted(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    return Pair(theirs, ours, cfg, back.eval(), left_over, tmp_path / "theirs")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {family: pair(family, tmp_path_factory.mktemp("pair")) for family in FAMILIES}


def prompt() -> Tensor:
    return torch.randint(3, VOCAB, (2, 60), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def import_error(p: Pair) -> float:
    """max|d| of logits, theirs and ours."""
    return (logits(p.ours, prompt()) - p.theirs(input_ids=prompt(), use_cache=False).logits).abs().max().item()


@torch.no_grad()
def export_error(p: Pair) -> float:
    """max|d| of logits, ours and the written model's."""
    return (logits(p.ours, prompt()) - p.back(input_ids=prompt(), use_cache=False).logits).abs().max().item()


@torch.no_grad()
def greedy(model: Transformer, ids: Tensor, steps: int) -> Tensor:
    cache, made = Cache(), []
    out = logits(model, ids, cache=cache)
    for step in range(steps):
        made.append(out[:, -1].argmax(-1))
        out = logits(model, made[-1][:, None], ids.shape[1] + step, cache)
    return torch.stack(made, dim=1)


@by_family
def test_import_gives_the_same_logits(family: str, pairs: dict[str, Pair]) -> None:
    assert pairs[family].theirs(input_ids=prompt()).logits.std() > 0.3
    assert import_error(pairs[family]) <= 1e-5


@by_family
def test_the_config_found_is_the_config_written_by_hand(family: str, pairs: dict[str, Pair]) -> None:
    assert facts(pairs[family].cfg) == pytest.approx(facts(config_of(family)))
    assert pairs[family].cfg.tie_embeddings == config_of(family).tie_embeddings


@by_family
def test_greedy_tokens_are_equal(family: str, pairs: dict[str, Pair]) -> None:
    start = prompt()[:, :20]
    want = pairs[family].theirs.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=VOCAB + 1
    )
    assert torch.equal(greedy(pairs[family].ours, start, 12), want[:, 20:])


@by_family
def test_gradients_are_equal(family: str, pairs: dict[str, Pair]) -> None:
    theirs, ours = pairs[family].theirs, pairs[family].ours
    labels = prompt()[:, 1:].flatten()
    for model, out in ((theirs, theirs(input_ids=prompt()).logits), (ours, logits(ours, prompt()))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), labels).backward()
    name = next(key for key, value in TABLE.items() if value.architecture == type(theirs).__name__)
    want = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        grad = want["lm_head.weight" if key.startswith("output_head") else f"model.{hf_name(key, name)}"].grad
        assert (parameter.grad - grad).abs().max() <= 1e-5 * max(1.0, grad.abs().max().item()), key


@by_family
def test_export_leaves_no_key_over_and_gives_the_same_logits(family: str, pairs: dict[str, Pair]) -> None:
    assert pairs[family].left_over == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert export_error(pairs[family]) <= 1e-5
    for key, value in pairs[family].theirs.state_dict().items():
        assert torch.equal(value, pairs[family].back.state_dict()[key]), key


@by_family
def test_a_renamed_key_is_named(family: str, pairs: dict[str, Pair], tmp_path: Path) -> None:
    tensors = load_file(pairs[family].path / "model.safetensors")
    chosen = sorted(name for name in tensors if "layers.1." in name)[len(family) % 5]
    tensors[chosen + "_"] = tensors.pop(chosen)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((pairs[family].path / "config.json").read_text())
    with pytest.raises(ValueError, match=chosen.replace(".", r"\.")):
        read_text_weights(tmp_path, pairs[family].cfg)


@pytest.mark.parametrize("family", ["mistral", "llama"])
def test_a_family_can_be_asked_for(family: str, pairs: dict[str, Pair]) -> None:
    assert hf_config(pairs["smollm2"].cfg, family)["model_type"] == family


def test_what_no_family_can_say_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no language model of transformers .*activation = 'gelu'"):
        hf_config(config_of("llama", activation="gelu"))
    with pytest.raises(ValueError, match="llama: another model .*qk_norm = False there"):
        hf_config(config_of("llama", qk_norm=True), "llama")
    with pytest.raises(ValueError, match="llama: another model .*sliding_window = 0 there, model.sliding_window = 8 here"):
        hf_config(config_of("mistral"), "llama")
    with pytest.raises(ValueError, match="mistral: another model .*window_pattern = 'S' there, model.window_pattern = 'SF' here"):
        hf_config(config_of("mistral", window_pattern="SF"), "mistral")
    with pytest.raises(ValueError, match="family 'gpt2': allowed are llama"):
        hf_config(config_of("llama"), "gpt2")
    with pytest.raises(ValueError, match="no language model"):
        hf_config(config_of("qwen2", rope_scaling=RopeScaling("linear", 2.0), logit_softcap=1.0))


def test_a_window_that_no_row_is_longer_than_does_not_matter(pairs: dict[str, Pair]) -> None:
    """It is neither asked for when weights are read, nor a reason not to write a model that has none."""
    cfg = config_of("gemma2", sliding_window=0, window_pattern="S", max_seq_len=8)
    assert read_text_weights(pairs["gemma2"].path, cfg)
    with pytest.raises(ValueError, match="sliding_window = 8 there, model.sliding_window = 0 here"):
        read_text_weights(pairs["gemma2"].path, config_of("gemma2", sliding_window=0, window_pattern="S", max_seq_len=9))
    assert hf_config(cfg)["sliding_window"] == 8
    assert hf_config(config_of("gemma2", max_seq_len=6))["sliding_window"] == 8
    assert hf_config(config_of("mistral", max_seq_len=8))["model_type"] == "llama"


def test_layers_in_another_order_are_refused() -> None:
    for values in (
        {"model_type": "gemma3_text", "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {"model_type": "smollm3", "no_rope_layers": [0, 1, 1]},
    ):
        with pytest.raises(ValueError, match="every n-th layer"):
            hf_facts(values)


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_become_rows(tied: bool, tmp_path: Path) -> None:
    cfg = config_of("llama", new_tokens=["<a>", "<b>"], tie_embeddings=tied)
    ours = Transformer(cfg).eval()
    state = {f"transformer.{name}": value for name, value in ours.state_dict().items()}
    plain, tensors = plain_embedding(cfg, state, rows=1)
    write_language_model(tmp_path, plain, tensors, IDS)
    back = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = prompt()
    ids[:, 5:7] = torch.tensor([VOCAB, VOCAB + 1])
    with torch.no_grad():
        got, want = back(input_ids=ids).logits, logits(ours, ids)
    assert back.config.vocab_size == VOCAB + 3
    assert (got[..., : VOCAB + 2] - want).abs().max() < 1e-5
    assert torch.allclose(back.model.embed_tokens.weight[-1], ours.token_embedding.weight.mean(0))


def test_shards_have_an_index(pairs: dict[str, Pair], tmp_path: Path) -> None:
    p = pairs["llama"]
    state = {f"transformer.{name}": value for name, value in p.ours.state_dict().items()}
    save_tensors(tmp_path, {"stale": torch.zeros(1)})
    seen: list[int] = []
    write_language_model(tmp_path, p.cfg, state, IDS, shard_bytes=40_000, progress=lambda what, done, total: seen.append(total - done))
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) == len(seen) > 3
    assert seen == sorted(seen, reverse=True) and seen[-1] == 0
    assert not (tmp_path / "model.safetensors").exists()
    again = read_text_weights(tmp_path, p.cfg)
    assert all(torch.equal(again[name], value) for name, value in state.items())


if __name__ == "__main__":
    import tempfile

    print(f"{'family':16}{'import max|d|':>16}{'export max|d|':>16}{'keys left over':>16}")
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            found = pair(family, Path(folder))
            print(f"{family:16}{import_error(found):16.1e}{export_error(found):16.1e}{sum(map(len, found.left_over.values())):16d}")
