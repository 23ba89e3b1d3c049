"""Adapters in whole runs: what trains, resume, weights of a run without adapters, generation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kempnerforge.config import load_config
from kempnerforge.config.lora import is_adapter
from kempnerforge.model.lora import LoRALinear
from kempnerforge.training.freeze import trainable_names
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.setup import assemble
from tests.params import quick
from tests.training.tiny import CONFIG, assert_same_tensors, call, losses, make_job, metrics, tensors, two_ranks, write_config

pytestmark = pytest.mark.usefixtures("random_may_stay_frozen")

LORA = """
[[lora]]
module = "transformer.layers.*"
rank = 3
alpha = 12.0
dropout = 0.1

[[lora]]
module = "*.layers.1.mlp.*"
rank = 2
dora = true
"""
"""The layers of the backbone; the second feed-forward part of it and of the encoder with DoRA."""
ALONE = '--vlm.freeze=[{module = "*"}, {module = "lora", frozen = false}]'
FROM = ("--run.init_allow=['*.lora_*', '*.magnitude']",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, random_may_stay_frozen: None) -> Path:
    """With ``job.toml`` (adapters), ``plain.toml`` (none) and finished runs ``all``, ``alone`` and ``base`` of 6 steps."""
    folder = tmp_path_factory.mktemp("lora")
    job = make_job(folder, extra=LORA)
    plain = write_config(folder, "plain.toml")
    for name, config, extra in (("all", job, ()), ("alone", job, (ALONE,)), ("base", plain, ())):
        ended = call("train", config, *extra, f"--run.dir={folder}/{name}")
        assert ended.code == 0, ended
    return folder


def model_tensors(run: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in tensors(run).items() if name.startswith("model.")}


def fresh(config: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The weights that a run begins with."""
    job = load_config(config, overrides)
    model = assemble(job).model
    initialise(model)
    return {name: p.detach() for name, p in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---- what trains -----------------------------------------------------------------------------------------------------


def test_weights_under_adapters_are_frozen_and_nothing_else(folder: Path) -> None:
    before, plain = fresh(folder / "job.toml"), fresh(folder / "plain.toml")
    assert all(torch.equal(before[name], value) for name, value in plain.items()), "adapters change no weight at the start"
    layers = {name.removesuffix(".lora_a") for name in before if name.endswith(".lora_a")}
    assert "transformer.layers.0.attention.q_proj" in layers and "vision_encoder.layers.1.mlp.fc1" in layers
    under = {name for name in before if name.rpartition(".")[0] in layers and not is_adapter(name)}
    assert moved(before, model_tensors(folder / "all")) == set(before) - under
    assert {name for name in before if name.endswith("magnitude")} == {
        f"{layer}.magnitude" for layer in layers if ".layers.1.mlp." in layer
    }


def test_adapters_alone(folder: Path) -> None:
    before = fresh(folder / "job.toml")
    assert moved(before, model_tensors(folder / "alone")) == {name for name in before if is_adapter(name)}
    state = {name for name in tensors(folder / "alone") if name.startswith("optim.")}
    assert state and all(is_adapter(name.removeprefix("optim.").rpartition("|")[0]) for name in state)
    curve = losses(folder / "alone")
    assert curve[-1] < curve[0]


def test_a_freeze_spec_thaws_and_the_last_one_counts(folder: Path) -> None:
    job = load_config(folder / "job.toml", ['--vlm.freeze=[{module = "transformer"}, {module = "*.layers.0.*.q_proj.*", frozen = false}]'])
    names = list(fresh(folder / "job.toml"))
    trainable = trainable_names(names, job.freeze_at(0), job.module_patterns())
    q_proj = {f"transformer.layers.0.attention.q_proj.{part}" for part in ("weight", "lora_a", "lora_b")}
    assert {name for name in trainable if name.startswith("transformer")} == q_proj
    assert "vision_encoder.layers.1.mlp.fc1.weight" not in trainable and "vision_encoder.layers.1.mlp.fc1.magnitude" in trainable


def test_what_trains_beside_adapters_is_remarked_until_a_freeze_spec_names_it(folder: Path) -> None:
    def said(*overrides: str) -> list[str]:
        return [line for line in assemble(load_config(folder / "job.toml", overrides)).warnings() if "LoRA" in line]

    (line,) = said("--vlm.freeze=[]")
    parts = "transformer.token_embedding, transformer.layers, transformer.norm, vision_encoder, adapter"
    assert line.startswith("stage 'train': beside the LoRA adapters there train") and all(part in line for part in parts.split(", "))
    (line,) = said('--vlm.freeze=[{module = "transformer"}, {module = "vision_encoder"}, {module = "lora", frozen = false}]')
    assert "there train adapter, as" in line and '{ module = "adapter.*" }' in line
    assert said(ALONE) == []
    named = '{module = "transformer"}, {module = "vision_encoder"}, {module = "adapter", frozen = false}, {module = "lora", frozen = false}'
    assert said(f"--vlm.freeze=[{named}]") == []
    plain = assemble(load_config(folder / "plain.toml", ["--vlm.freeze=[]"])).warnings()
    assert not any("LoRA" in line for line in plain)
    assert "beside the LoRA adapters" in call("check", folder / "job.toml", "--vlm.freeze=[]").err


STAGES = """
[[stages]]
name = "align"
steps = 3
freeze = [{ module = "transformer" }, { module = "vision_encoder" }]

[[stages]]
name = "adapters"
steps = 3
freeze = [{ module = "*" }, { module = "lora", frozen = false }]
optimizer.lr_scale = { lora = 2.0 }
"""


@pytest.mark.parametrize(("optimizer", "cuts"), quick([("adamw", (2, 3, 5)), ("muon", (4,))], ("muon", (4,))))
def test_stages_and_resume(optimizer: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    """Cut at, before and after the change of stage."""
    argv = ("train", make_job(tmp_path, extra=LORA + STAGES), f"--optimizer.name={optimizer}", "--checkpoint.interval=3")
    assert call(*argv, "--train.max_steps=0").code == 0
    before, whole = fresh(tmp_path / "job.toml"), tensors(tmp_path / "run")
    kept = {name for name in before if not is_adapter(name) and not name.startswith("adapter.")}
    assert moved(before, model_tensors(tmp_path / "run")) == set(before) - kept
    for cut in cuts:
        run = f"--run.dir={tmp_path}/cut{cut}"
        assert call(*argv, f"--train.max_steps={cut}", "--eval.at_end=false", run).code == 0
        assert call(*argv, "--train.max_steps=0", run).code == 0
        assert_same_tensors(tensors(tmp_path / f"cut{cut}"), whole)
        shared = [[row for row in metrics(tmp_path / name) if "train/loss" in row] for name in ("run", f"cut{cut}")]
        assert shared[0] == shared[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [("--train.activation_checkpointing=true",), ("--train.mixed_precision=bf16",)], ids=["recompute", "bf16"]
)
def test_recomputed_and_in_half_precision(extra: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    """Dropout is drawn again as it was, so recomputation is bitwise the same."""
    assert call("train", folder / "job.toml", f"--run.dir={tmp_path}/run", *extra).code == 0
    if "bf16" in extra[0]:
        assert losses(tmp_path / "run") == pytest.approx(losses(folder / "all"), rel=0.05)
        assert all(value.dtype == torch.float32 for value in model_tensors(tmp_path / "run").values())
    else:
        assert_same_tensors(tensors(tmp_path / "run"), tensors(folder / "all"))


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_equal_one_process_that_accumulates(folder: Path, tmp_path: Path) -> None:
    """Adapters of rank 3 and 2 lie unevenly on two ranks, beside frozen weights. Without dropout, which each rank draws for itself."""
    plain = write_config(tmp_path, config=CONFIG.replace("{folder}", str(folder)), extra=LORA.replace("dropout = 0.1", ""))
    begin = (f"--run.init_from={folder}/base", *FROM)
    argv = ("train", plain, *begin, "--train.grad_clip_norm=0", "--train.max_steps=3", "--eval.at_end=false")
    assert call(*argv, "--train.grad_accum_steps=2", f"--run.dir={tmp_path}/one").code == 0
    ended = two_ranks(*argv, f"--run.dir={tmp_path}/two")
    assert ended.code == 0, ended
    assert_same_tensors(tensors(tmp_path / "two"), tensors(tmp_path / "one"))


# ---- weights of a run without adapters -------------------------------------------------------------------------------


def test_a_run_without_adapters_is_where_one_with_them_begins(folder: Path, tmp_path: Path) -> None:
    start = (f"--run.init_from={folder}/base", "--train.max_steps=1")
    assert call("train", folder / "plain.toml", *start, f"--run.dir={tmp_path}/plain").code == 0
    ended = call("train", folder / "job.toml", *start, *FROM, f"--run.dir={tmp_path}/lora")
    assert ended.code == 0, ended
    assert losses(tmp_path / "lora")[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=1e-5)
    weights, base = fresh(folder / "job.toml", *start, *FROM), model_tensors(folder / "base")
    assert all(torch.equal(weights[name], value) for name, value in base.items())
    rows = [name for name in weights if name.endswith("magnitude")]
    for name in rows:
        torch.testing.assert_close(weights[name], base[name.replace("magnitude", "weight")].norm(dim=1))
    assert rows and any(not torch.equal(weights[name], fresh(folder / "job.toml")[name]) for name in rows)


def test_what_differs_must_be_allowed(folder: Path, tmp_path: Path) -> None:
    ended = call("train", folder / "job.toml", f"--run.init_from={folder}/base", f"--run.dir={tmp_path}/run")
    assert ended.code == 2 and "run.init_from" in ended.err and "lora_a" in ended.err
    ended = call("train", folder / "plain.toml", f"--run.init_from={folder}/all", f"--run.dir={tmp_path}/run")
    assert ended.code == 2 and "has in excess" in ended.err and "lora_a" in ended.err


def test_trained_adapters_are_taken_over_as_they_are(folder: Path) -> None:
    start, trained = fresh(folder / "job.toml", f"--run.init_from={folder}/all"), model_tensors(folder / "all")
    assert not moved(start, trained)


def test_towers_that_start_from_text_leave_adapters_alone(folder: Path, tmp_path: Path) -> None:
    """The image tower has an adapter of another rank, which cannot be a copy, and DoRA, whose magnitude must fit the copied weight."""
    tables = LORA + '\n[[lora]]\nmodule = "transformer.layers.0.image.*"\nrank = 5\ndora = true\n'
    config = CONFIG.replace("{folder}", str(folder)).replace('"joint_decoder"', '"mot"\nmot_warm_start_from_text = true')
    weights = fresh(write_config(tmp_path, config=config, extra=tables))
    q_proj = "transformer.layers.0.{}attention.q_proj."
    text, image = q_proj.format(""), q_proj.format("image.")
    assert torch.equal(weights[text + "weight"], weights[image + "weight"])
    assert len(weights[text + "lora_a"]) == 3 and len(weights[image + "lora_a"]) == 5
    torch.testing.assert_close(weights[image + "magnitude"], weights[image + "weight"].norm(dim=1))


# ---- everything else -------------------------------------------------------------------------------------------------


def test_check_dry_run_evaluate_and_generate(folder: Path) -> None:
    checked = call("check", folder / "job.toml")
    assert checked.code == 0, checked
    assert call("eval", folder / "all").code == 0
    asked = call("generate", folder / "all", folder / "0.png", "--prompt", "what is on the left?", "--max-new-tokens", "2")
    assert asked.code == 0, asked


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_table_that_matches_nothing(command: str, folder: Path, tmp_path: Path) -> None:
    ended = call(command, folder / "job.toml", "--lora.0.module=transformer.layers.*.attention.qproj", f"--run.dir={tmp_path}/run")
    assert ended.code == 2 and "matches no linear layer" in ended.err and "attention.q_proj" in ended.err


@pytest.mark.parametrize("value", ["--lora.0.rank=0", "--lora.0.alpha=0", "--lora.0.dropout=1", "--lora.0.module=", "--lora.0.rnk=2"])
def test_values_that_cannot_be(value: str, folder: Path) -> None:
    ended = call("check", folder / "job.toml", value)
    assert ended.code == 2 and "lora" in ended.err


def test_a_text_run_has_the_alias_too(tmp_path: Path) -> None:
    text = "".join(f"a line of text, number {k}\n\n" for k in range(200))
    (tmp_path / "t.txt").write_text(text)
    parts = [part for part in CONFIG.split("\n[") if not part.startswith(("vlm", "vision_encoder", "adapter", "data"))]
    config = "\n[".join(parts) + f'\n[data]\nsource = "text"\npath = "{tmp_path}/t.txt"\ntokenizer_vocab_size = 300\n'
    job = write_config(tmp_path, config=config, extra='[[lora]]\nmodule = "*"\n')
    ended = call("train", job, "--optimizer.lr_scale={lora = 0.5}", "--train.max_steps=2")
    assert ended.code == 0, ended
    before = fresh(job)
    still = set(before) - moved(before, model_tensors(tmp_path / "run"))
    assert still == {name.replace("lora_a", "weight") for name in before if name.endswith("lora_a")}
    assert any(isinstance(layer, LoRALinear) for layer in assemble(load_config(job)).model.modules())
