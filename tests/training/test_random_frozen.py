"""Random weights that would never train are refused, whatever they are a part of; weights that come from somewhere, or train later, are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from torch import nn

from kempnerforge.config import JobConfig, RunConfig, StageConfig, VLMConfig, registry
from kempnerforge.config.freeze import FreezeSpec, FreezeStage
from kempnerforge.config.lora import LoRAConfig
from kempnerforge.config.vision import SiglipConfig, VisionEncoderConfig
from kempnerforge.model.vision import VisionEncoder
from kempnerforge.training.freeze import FreezePlan, match_names
from kempnerforge.training.initial_weights import initialise
from kempnerforge.training.setup import assemble
from kempnerforge.training.tokenizer import saved_tokenizer
from kempnerforge.vlm.base import VLM
from tests.training.tiny import call, make_job
from tests.vlm.tiny import FOREIGN, MODEL, tiny_job, tokenizer

ENCODER, WORDS, ALL = FreezeSpec("vision_encoder"), FreezeSpec("transformer"), FreezeSpec("*")
ARCHS = [name for name in registry.list_vlm_configs() if name in registry.archs]


def built(job: JobConfig) -> VLM:
    return assemble(job, tokenizer(*job.model.new_tokens), data=False, device="meta").model


def job_of(
    arch: str | None = "joint_decoder", *freeze: FreezeSpec, schedule: list[FreezeStage] | None = None, **sections: Any
) -> JobConfig:
    job = tiny_job(arch, **sections)
    return job if job.vlm is None else replace(job, vlm=replace(job.vlm, freeze=list(freeze), freeze_schedule=schedule or []))


def refuse_random(job: JobConfig, model: VLM) -> None:
    FreezePlan(job, [name for name, _ in model.named_parameters()]).refuse_random(model)


def refusal(job: JobConfig, model: VLM | None = None) -> str:
    """What is said of ``job``; nothing if it may train."""
    try:
        refuse_random(job, model or built(job))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("arch", ARCHS)
def test_every_alias_of_every_arch(arch: str) -> None:
    """A part is refused exactly if it holds random matrices, and all of them are named."""
    model = built(job_of(arch))
    assert refusal(job_of(arch), model) == ""
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    for alias in model.job.module_patterns():
        inside = match_names(list(shapes), alias, model.job.module_patterns(), "alias")
        said = refusal(job_of(arch, FreezeSpec(alias)), model)
        matrices = [name for name in inside if shapes[name] > 1]
        assert ("[vlm] freeze = []" in said) is bool(matrices), (alias, said)
        assert f"({len(matrices)} tensors" in said or len({n.split(".")[0] for n in matrices}) != 1


@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_of_every_arch_is_its_vision_encoder(arch: str) -> None:
    keys = FOREIGN[arch]() if arch in FOREIGN else {}
    job = replace(job_of(arch), vlm=VLMConfig.for_arch(arch, max_text_len=64, **keys))
    model = built(job)
    parts = [name for name, _ in model.named_parameters() if any(n in name for n in ("vision_encoder.", "vision_tower."))]
    assert ("vision" in refusal(job, model)) is bool(parts), "an arch without an encoder has none to freeze"


@pytest.mark.parametrize("module", ["transformer.layers.[0-1].*", "transformer.layers.2.mlp.up_proj.weight", "adapter", "*.attention.*"])
def test_parts_of_parts(module: str) -> None:
    assert "random weights would stay frozen" in refusal(job_of("joint_decoder", FreezeSpec(module)))


def test_vectors_are_no_random_weights() -> None:
    assert refusal(job_of("joint_decoder", FreezeSpec("*norm*"), FreezeSpec("*.bias"))) == ""


def test_text_runs() -> None:
    stage = StageConfig("all", 4, freeze=[FreezeSpec("transformer.layers.0.*")])
    assert refusal(job_of(None)) == ""
    assert "transformer (7 tensors" in refusal(job_of(None, stages=[stage]))


def test_over_time() -> None:
    """Refused is what trains at no planned step, whether or not this run goes as far."""
    thaw, back = FreezeStage(3, (FreezeSpec("vision_encoder", False),)), FreezeStage(3, (FreezeSpec("adapter"),))
    assert refusal(job_of("joint_decoder", ENCODER, schedule=[thaw])) == ""
    assert "vision_encoder (" in refusal(job_of("joint_decoder", ENCODER, schedule=[back]))
    assert refusal(job_of("joint_decoder", schedule=[back])) == "", "it has trained before"

    def stages(*freezes: list[FreezeSpec] | None, cap: int = 0) -> str:
        job = job_of("joint_decoder", ENCODER, stages=[StageConfig(f"s{k}", 5, freeze=freeze) for k, freeze in enumerate(freezes)])
        return refusal(replace(job, train=replace(job.train, max_steps=cap)))

    assert stages([], [ENCODER]) == stages([ENCODER, WORDS], []) == stages([ENCODER], [], cap=2) == ""
    assert stages(None, [WORDS, ENCODER]) and stages([WORDS, ENCODER], [FreezeSpec("adapter"), ENCODER])


def test_what_lies_under_an_adapter() -> None:
    lora = [LoRAConfig("transformer.layers.*.attention.q_proj")]
    assert "what lies under an adapter of [[lora]] is frozen" in refusal(job_of(lora=lora))
    assert refusal(job_of("joint_decoder", FreezeSpec("*.q_proj.weight", False), lora=lora)) == ""
    given = built(job_of(lora=lora))
    given.loaded |= {name for name, _ in given.named_parameters() if name.endswith("q_proj.weight")}
    assert refusal(given.job, given) == ""
    assert "lora_a" in refusal(job_of("joint_decoder", FreezeSpec("lora"), lora=lora), given)


# ---- where weights come from -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("siglip")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 16,
        "patch_size": 8,
    }
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**sizes)).save_pretrained(path)
    return str(path)


def test_an_encoder_with_weights(tower: str) -> None:
    assert refusal(job_of("joint_decoder", ENCODER, vision_encoder=SiglipConfig(path=tower))) == ""
    assert "vision_encoder (" in refusal(job_of("joint_decoder", ENCODER, vision_encoder=SiglipConfig(path=tower, pretrained=False)))


def test_the_rule_for_an_encoder_of_a_plugin() -> None:
    class Bare(VisionEncoderConfig):
        pass

    class Own(VisionEncoderConfig):
        def without_weights(self) -> VisionEncoderConfig:
            return VisionEncoderConfig()

    assert (Bare().has_weights, Own().has_weights) == (False, True)
    assert issubclass(VisionEncoder, nn.Module)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a language model as [model] of ``tests.vlm.tiny`` describes it."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("what colour is it? red. is there a circle? yes, a blue one. " * 60, encoding="utf-8")
    sizes = {key: getattr(MODEL, key) for key in ("dim", "n_layers", "n_heads", "max_seq_len")}
    argv = [f"--model.{key}={value}" for key, value in sizes.items()]
    config = folder / "a.toml"
    text = '[data]\nsource = "text"\npath = "{f}/a.txt"\n[train]\nmax_steps = 1\nbatch_size = 2\nseq_len = 16\n[run]\ndir = "{f}/run"\n'
    config.write_text(text.replace("{f}", str(folder)), encoding="utf-8")
    ended = call("train", config, *argv)
    assert ended.code == 0, ended.err
    return folder / "run"


def begun(job: JobConfig, text_run: Path) -> VLM:
    model = assemble(job, saved_tokenizer(text_run), data=False).model
    initialise(model)
    refuse_random(job, model)
    return model


@pytest.mark.parametrize("arch", ["joint_decoder", "cross_attention", "mot", "moma"])
def test_weights_of_another_run_cover_what_it_has(arch: str, text_run: Path) -> None:
    """All parameters of the backbone may stay frozen; what the arch adds is random and may not."""
    new = ["vision_encoder.*", "adapter.*", "*.cross_attention.*", "*.image.*", "*.experts.*", "*routers.*", "transformer.new_tokens.*"]
    run = RunConfig(init_from=str(text_run), init_allow=new)
    thawed = [WORDS, *(FreezeSpec(pattern, False) for pattern in new if "." in pattern[1:] or "*" in pattern)]
    model = assemble(job_of(arch, run=run), saved_tokenizer(text_run), data=False).model
    there = [name for name, _ in model.named_parameters()]
    thawed = [spec for spec in thawed if spec.frozen or match_or_nothing(there, spec.module)]
    assert begun(job_of(arch, *thawed, run=run), text_run).loaded == {n for n in there if not any(match_or_nothing([n], p) for p in new)}
    if arch == "joint_decoder":
        return
    with pytest.raises(ValueError, match="random weights would stay frozen for the whole run: transformer"):
        begun(job_of(arch, WORDS, run=run), text_run)


def match_or_nothing(names: list[str], pattern: str) -> list[str]:
    try:
        return match_names(names, pattern, {}, "pattern")
    except ValueError:
        return []


def test_tokens_of_ones_own_are_random(text_run: Path) -> None:
    run = RunConfig(init_from=str(text_run), init_allow=["vision_encoder.*", "adapter.*", "transformer.new_tokens.*"])
    with pytest.raises(ValueError, match=r"transformer \(1 tensors, as transformer.new_tokens"):
        begun(job_of("joint_decoder", WORDS, run=run), text_run)


@pytest.mark.parametrize("form", ["init_from", "path"])
def test_a_copy_of_random_weights_is_random(form: str, text_run: Path) -> None:
    allow = ["vision_encoder.*", "adapter.*", "transformer.new_tokens.*", "*.image.*"]
    path = {"mot_warm_start_path": str(text_run)} if form == "path" else {}
    run = RunConfig() if form == "path" else RunConfig(init_from=str(text_run), init_allow=allow)
    specs = [WORDS, FreezeSpec("transformer.new_tokens.*", False)]

    def job(**keys: Any) -> JobConfig:
        return replace(tiny_job("mot", run=run), vlm=VLMConfig.for_arch("mot", max_text_len=64, freeze=specs, **keys))

    assert any(".image." in name for name in begun(job(mot_warm_start_from_text=True, **path), text_run).loaded)
    with pytest.raises(ValueError, match="random weights would stay frozen"):
        begun(replace(job(mot_warm_start_from_text=True), run=RunConfig()), text_run)


# ---- commands --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "train", "train --dry-run"])
def test_commands_refuse_and_name_the_remedy(command: str, tmp_path: Path) -> None:
    config = make_job(tmp_path)
    config.write_text(config.read_text().replace("freeze = []\n", ""))
    ended = call(*command.split(), config)
    assert ended.code == 2 and "random weights would stay frozen for the whole run: vision_encoder" in ended.err, ended.err
    assert "[vlm] freeze = []" in ended.err and not (tmp_path / "run" / "checkpoints").exists()
    assert call(*command.split(), config, "--vlm.freeze=[]", "--train.max_steps=1", "--eval.at_end=false").code == 0
    if command == "train":  # what a checkpoint holds is no longer random
        assert call(command, config, "--train.max_steps=2", "--eval.at_end=false", "--allow-change=vlm.freeze").code == 0
        assert call("check", config).code == 0
