"""Weights and directories that a config names: ``check`` refuses what ``train`` refuses before its first step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.model.test_hf_towers import SIGLIP
from tests.training.tiny import CONFIG, call, make_job

SHORT = ("--train.max_steps=1", "--eval.at_end=false")
LLAMA = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
AS_LLAMA = (
    "--model.activation=swiglu",
    "--model.ffn_dim=64",
    "--model.norm_eps=1e-6",
    "--model.tie_embeddings=true",
    "--model.vocab_size=300",
)


def refused(config: Path, *overrides: str, said: str, as_train: bool = True) -> None:
    for command in ("check", "train") if as_train else ("check",):
        ended = call(command, config, *SHORT, *overrides)
        assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, (command, overrides, ended)


def replaced(section: str, text: str) -> str:
    """The usual config with another ``section``."""
    return re.sub(rf"\[{section}\].*?\n\n", f"[{section}]\n{text}\n\n", CONFIG, flags=re.S)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)).save_pretrained(path)
    return path


def test_a_text_model_is_compared_by_its_headers(llama: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    allow = '--run.init_allow=["vision_encoder.*", "adapter.*", "transformer.new_tokens.*", "transformer.token_embedding.*"]'
    given = (f"--run.init_from={llama}", allow, *AS_LLAMA)
    assert (ended := call("check", job, *SHORT, *given)).code == 0, ended.err
    refused(job, *given, "--model.n_layers=1", said="n_layers")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((llama / "config.json").read_text())
    weights = load_file(llama / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != key}, cut / "model.safetensors")
    refused(job, f"--run.init_from={cut}", allow, *AS_LLAMA, said=f"{cut}: lacks 1: {key}")
    save_file(weights | {key: torch.zeros(8, 32)}, cut / "model.safetensors")
    refused(job, f"--run.init_from={cut}", allow, *AS_LLAMA, said="has shape (8, 32)")
    save_file(weights | {key: torch.zeros(64, 32, dtype=torch.int8)}, cut / "model.safetensors")
    refused(job, f"--run.init_from={cut}", allow, *AS_LLAMA, said="quantised weights are not read")


def test_random_weights_that_would_stay_frozen_beside_others(llama: Path, tmp_path: Path) -> None:
    """Which weights are random is known from names."""
    allow = '--run.init_allow=["vision_encoder.*", "adapter.*", "transformer.new_tokens.*", "transformer.token_embedding.*"]'
    frozen = '--vlm.freeze=[{ module = "vision_encoder" }]'
    refused(make_job(tmp_path), f"--run.init_from={llama}", allow, *AS_LLAMA, frozen, said="random weights would stay frozen")


def test_the_content_of_a_checkpoint_is_not_read(tmp_path: Path) -> None:
    """Names and shapes are in its metadata; only training compares checksums."""
    job = make_job(tmp_path)
    assert call("train", job, *SHORT, f"--run.dir={tmp_path}/first").code == 0
    given = (f"--run.init_from={tmp_path}/first", f"--run.dir={tmp_path}/second")
    file = max((tmp_path / "first" / "checkpoints").glob("step-*/*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    assert call("check", job, *SHORT, *given).code == 0
    assert (ended := call("train", job, *SHORT, *given)).code != 0 and "corrupt" in ended.err
    file.write_bytes(content[:-1])
    refused(job, *given, said=f"has {len(content) - 1} bytes instead of {len(content)}")


def test_weights_of_an_arch(tmp_path: Path) -> None:
    mot = ("--vlm.arch=mot", "--vlm.mot_warm_start_from_text=true")
    refused(make_job(tmp_path), *mot, f"--vlm.mot_warm_start_path={tmp_path}/nowhere", said="vlm.mot_warm_start_path: ")
    flamingo = replaced(
        "vlm", f'arch = "cross_attention"\ncross_attention_block = "openflamingo"\nopenflamingo_path = "{tmp_path}/x"\nmax_text_len = 48'
    )
    refused(make_job(tmp_path, config=flamingo), "--vlm.freeze=[]", "--vlm.cross_attention_every_n_layers=1", said="no such file")


def test_weights_of_an_encoder(tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    torch.manual_seed(0)
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP)).save_pretrained(tower)
    one = f'type = "siglip"\npath = "{tower}"'
    siglip = make_job(tmp_path, config=replaced("vision_encoder", one).replace("max_text_len = 48", "max_text_len = 32"))
    assert (ended := call("check", siglip, *SHORT)).code == 0, ended.err
    weights = tower / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    assert (ended := call("check", siglip, *SHORT)).code == 2 and str(weights) in ended.err, ended
    weights.unlink()
    refused(siglip, said=f"path = '{tower}': its weights cannot be loaded")
    net = make_job(tmp_path, config=replaced("vision_encoder", f'type = "efficientnet_lite0"\npath = "{tmp_path}/net.safetensors"'))
    refused(net, "--vlm.max_text_len=15", said="kempnerforge data fetch efficientnet-lite0 makes it")


def test_directories_that_cannot_be(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (tmp_path / "file").write_text("")
    refused(job, f"--run.dir={tmp_path}/file", said=f"run.dir = '{tmp_path}/file': ")
    refused(job, f"--run.dir={tmp_path}/file/run", said=f"run.dir = '{tmp_path}/file/run': ")
    refused(
        job,
        f"--train.feature_cache={tmp_path}/file/x",
        said=f"train.feature_cache = '{tmp_path}/file/x': {tmp_path}/file is not a directory",
    )
