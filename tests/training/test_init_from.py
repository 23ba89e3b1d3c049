"""Two stages in one run, or in two of which the second begins with the weights of the first."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf

from kempnerforge.checkpoint.state import MODEL
from kempnerforge.config import load_config
from kempnerforge.training.setup import assemble
from tests.model.test_hf_towers import SIGLIP
from tests.params import quick
from tests.training.test_resume_stages import EVERY_STEP, four_stages
from tests.training.tiny import CONFIG, assert_same_tensors, call, losses, make_job, tensors, write_config

pytestmark = pytest.mark.usefixtures("random_may_stay_frozen")

ALIGN = """
[[stages]]
name = "align"
steps = 4
data.path = "{folder}/captions.jsonl"
data.prompt_column = ""
optimizer.lr = 4e-3
scheduler.warmup_steps = 2
freeze = [{ module = "*" }{thaw}]
"""
FINETUNE = """
[[stages]]
name = "finetune"
steps = 5
train.batch_size = 2
optimizer.lr = 1e-3
optimizer.moments = "reset"
scheduler.name = "wsd"
freeze = [{ module = "vision_encoder" }]
"""
WITH_ENCODER = ["joint_decoder", "cross_attention", "mot", "moma"]


def hashes(weights: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name.removeprefix(MODEL): hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, value in weights.items()
        if name.startswith(MODEL)
    }


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def two_configs(folder: Path, aligned: Sequence[str] = ("adapter",)) -> tuple[Path, Path, Path]:
    """Both stages in one config, and each in one of its own; the second begins with what the first run leaves.

    Args:
        aligned: aliases of what trains in the first stage.
    """
    four_stages(folder)
    thaw = "".join(f', {{ module = "{alias}", frozen = false }}' for alias in aligned)
    align, finetune = (text.replace("{folder}", str(folder)).replace("{thaw}", thaw) for text in (ALIGN, FINETUNE))
    return tuple(
        write_config(folder, f"{name}.toml", extra=text) for name, text in (("both", align + finetune), ("one", align), ("two", finetune))
    )


@pytest.mark.parametrize("arch", quick(WITH_ENCODER, "joint_decoder"))
def test_two_stages_equal_two_runs(arch: str, tmp_path: Path) -> None:
    """LLaVA's two stages, with dropout: weights, optimizer state and losses of both ways are the same, bitwise; and only what should changes.

    The tokenizer must be the same: a run with both stages would train it on the texts of both. The second of two runs takes the first's.
    NOTE: cross-attention starts with closed gates; while they are frozen, no gradient reaches the adapter, so they train with it.
    """
    both, one, two_ = two_configs(tmp_path, ["adapter", "cross_attention"] if arch == "cross_attention" else ["adapter"])
    common = ("--train.max_steps=0", "--model.dropout=0.1", f"--vlm.arch={arch}", "--eval.at_end=false", *EVERY_STEP)
    common = (*common, "--vlm.cross_attention_every_n_layers=1") if arch == "cross_attention" else common
    for config, name, extra in (
        (one, "first", ()),
        (two_, "second", (f"--run.init_from={tmp_path}/first",)),
        (both, "both", (f"--data.tokenizer={tmp_path}/first/tokenizer",)),
    ):
        ended = call("train", config, *common, *extra, f"--run.dir={tmp_path}/{name}")
        assert ended.code == 0, ended
    assert_same_tensors(tensors(tmp_path / "second"), tensors(tmp_path / "both"))
    assert losses(tmp_path / "first") + losses(tmp_path / "second") == losses(tmp_path / "both")

    job = load_config(one, [*common, f"--data.tokenizer={tmp_path}/first/tokenizer"])
    fresh = hashes({f"{MODEL}{name}": value for name, value in assemble(job).model.named_parameters()})
    for step in range(1, 5):
        aligned = hashes(tensors(tmp_path / "both" / f"checkpoints/step-{step:08d}"))
        assert all(name.startswith("adapter.") or ".cross_attention." in name for name in changed(fresh, aligned))
    assert changed(fresh, aligned) >= {name for name in fresh if name.startswith("adapter.")}
    assert arch == "cross_attention" or not any(".cross_attention." in name for name in fresh)
    for step in range(5, 10):
        moved = changed(aligned, hashes(tensors(tmp_path / "both" / f"checkpoints/step-{step:08d}")))
        assert not any(name.startswith("vision_encoder.") for name in moved)
        assert moved >= {name for name in fresh if name.startswith(("adapter.", "transformer.layers.0.mlp."))}


def assert_refused(_: str, config: Path, *overrides: str, said: str) -> None:
    """``check``, ``train`` and ``train --dry-run`` say the same, and end alike."""
    for command in (["check"], ["train", "--dry-run"], ["train"]):
        ended = call(*command, config, *overrides)
        assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err, (command, overrides, ended)


def test_names_that_differ_are_listed_and_can_be_allowed(tmp_path: Path) -> None:
    _, one, two_ = two_configs(tmp_path)
    assert call("train", one, "--train.max_steps=2", "--eval.at_end=false", f"--run.dir={tmp_path}/first").code == 0
    argv = ("train", two_, "--train.max_steps=1", "--eval.at_end=false", "--checkpoint.interval=1", f"--run.init_from={tmp_path}/first")
    other = (*argv, "--adapter.type=mlp_2layer", f"--run.dir={tmp_path}/other")
    ended = call(*other)
    assert ended.code == 2 and f"run.init_from = '{tmp_path}/first'" in ended.err, ended
    assert "it lacks 4: adapter.proj.fc1.bias, adapter.proj.fc1.weight, adapter.proj.fc2.bias, adapter.proj.fc2.weight" in ended.err
    assert "it has in excess 2: adapter.proj.bias, adapter.proj.weight" in ended.err and "run.init_allow" in ended.err
    assert not (tmp_path / "other" / "checkpoints").exists()
    partly = call(*other, '--run.init_allow=["adapter.proj.fc*"]')
    assert partly.code == 2 and "lacks" not in partly.err and "it has in excess 2: adapter.proj.bias" in partly.err
    assert call(*other, '--run.init_allow=["adapter.*"]').code == 0
    before, after = hashes(tensors(tmp_path / "first")), hashes(tensors(tmp_path / "other"))
    taken = [name for name in before if name.startswith("vision_encoder.")]  # frozen, so one step later they are still what was taken
    assert len(taken) > 20 and [name for name in taken if before[name] != after[name]] == []


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    _, one, two_ = two_configs(tmp_path)
    assert call("train", one, "--train.max_steps=1", "--eval.at_end=false", f"--run.dir={tmp_path}/first").code == 0
    argv = ("train", two_, "--train.max_steps=1", f"--run.init_from={tmp_path}/first", f"--run.dir={tmp_path}/other")
    for extra, said in (
        (("--vlm.arch=mot",), "it lacks"),
        (("--vision_encoder.dim=64",), "it has in another shape 38: adapter.proj.weight, vision_encoder."),
        (("--model.activation=swiglu",), "activation = 'gelu' there, model.activation = 'swiglu' here"),
        ((f"--run.init_from={tmp_path}/nowhere",), "nowhere: no such directory"),
    ):
        assert_refused(*argv, *extra, said=said)
    for number, extra in enumerate(
        (
            ("--vlm.arch=mot", '--run.init_allow=["transformer.layers.*.image.*"]'),
            ("--vision_encoder.dim=64", '--run.init_allow=["vision_encoder.*", "adapter.*"]'),
        )
    ):
        for command in ("check", "train"):
            ended = call(command, *argv[1:], *extra, "--eval.at_end=false", f"--run.dir={tmp_path}/allowed-{number}")
            assert ended.code == 0, ended


def test_a_run_that_has_begun_needs_its_origin_no_more(tmp_path: Path) -> None:
    """Continued, it takes its own weights and tokenizer."""
    _, one, two_ = two_configs(tmp_path)
    assert call("train", one, "--train.max_steps=0", "--eval.at_end=false", f"--run.dir={tmp_path}/first").code == 0
    argv = ("train", two_, "--train.max_steps=0", "--eval.at_end=false", f"--run.init_from={tmp_path}/first")
    assert call(*argv, f"--run.dir={tmp_path}/reference").code == 0
    assert call(*argv, "--train.max_steps=2", f"--run.dir={tmp_path}/cut").code == 0
    shutil.rmtree(tmp_path / "first")
    for command in ("check", "train"):
        ended = call(command, *argv[1:], f"--run.dir={tmp_path}/cut")
        assert ended.code == 0, ended
    assert_same_tensors(tensors(tmp_path / "cut"), tensors(tmp_path / "reference"))


def test_a_part_comes_from_another_model(tmp_path: Path) -> None:
    """The encoder of a model of another width, beside a text model from elsewhere; the part must be built alike."""
    _, one, two_ = two_configs(tmp_path)
    short = ("train", one, "--train.max_steps=1", "--eval.at_end=false")
    assert call(*short, f"--run.dir={tmp_path}/text").code == 0
    assert call(*short, "--model.dim=48", "--train.seed=7", f"--run.dir={tmp_path}/seeing").code == 0
    part = f'--run.init_parts={{ vision_encoder = "{tmp_path}/seeing" }}'
    argv = (
        "train",
        two_,
        "--train.max_steps=1",
        "--eval.at_end=false",
        "--checkpoint.interval=1",
        f"--run.init_from={tmp_path}/text",
        part,
    )
    for command in (["check"], ["train", "--dry-run"], ["train"]):
        assert call(*command, *argv[1:], f"--run.dir={tmp_path}/both").code == 0  # its encoder is frozen
    seeing, text, both = (hashes(tensors(tmp_path / name)) for name in ("seeing", "text", "both"))
    encoder = [name for name in both if name.startswith("vision_encoder.")]
    assert len(encoder) > 20 and all(both[name] == seeing[name] for name in encoder)
    assert any(both[name] != text[name] for name in encoder)
    lora = (
        '--lora=[{ module = "vision_encoder.layers.*" }]',
        '--vlm.freeze=[{ module = "vision_encoder" }, { module = "lora", frozen = false }]',
    )
    ended = call(*argv, *lora, f"--run.dir={tmp_path}/lora")
    assert ended.code == 2 and "lora_a" in ended.err and "only there or only here" in ended.err, ended
    allowed = '--run.init_allow=["*.lora_a", "*.lora_b"]'
    assert call(*argv, *lora, allowed, f"--run.dir={tmp_path}/lora").code == 0

    for extra, said in (
        (("--vision_encoder.mean=[0.4, 0.5, 0.5]",), "is another one there: vision_encoder.mean differ"),
        (("--vision_encoder.n_heads=4",), "is another one there: vision_encoder.n_heads differ"),
        (
            (f'--run.init_parts={{ vision = "{tmp_path}/seeing" }}',),
            "the model has no such part; it has adapter, transformer, vision_encoder",
        ),
        ((f'--run.init_parts={{ transformer = "{tmp_path}/seeing" }}',), "transformer: the text model comes from init_from"),
        ((f'--run.init_parts={{ vision_encoder = "{tmp_path}/nowhere" }}',), "nowhere: no such directory"),
    ):
        assert_refused(*argv, *extra, f"--run.dir={tmp_path}/other", said=said)


def test_a_second_run_sees_larger_images(tmp_path: Path) -> None:
    """PaliGemma's stages: a tower of transformers interpolates its positions, so the weights are taken as they are, and train on."""
    torch.manual_seed(0)
    hf.SiglipVisionModel(hf.SiglipVisionConfig(**SIGLIP)).save_pretrained(tmp_path / "tower")
    tower = f'[vision_encoder]\ntype = "siglip"\npath = "{tmp_path}/tower"\n\n'
    config = re.sub(r"\[vision_encoder\].*?\n\n", tower, CONFIG.replace("max_text_len = 48", "max_text_len = 32"), flags=re.S)
    argv = ("train", make_job(tmp_path, config=config), "--eval.at_end=false", "--train.max_steps=2")
    assert call(*argv, f"--run.dir={tmp_path}/small").code == 0
    larger = ("--vision_encoder.image_size=40", f"--run.init_from={tmp_path}/small", f"--run.dir={tmp_path}/large")
    ended = call(*argv, *larger)
    assert ended.code == 0, ended.err
    small, large = (tensors(tmp_path / name) for name in ("small", "large"))
    assert small.keys() == large.keys()
    name = f"{MODEL}vision_encoder.embeddings.position_embedding.weight"
    assert large[name].shape == (9, 32) and not torch.equal(small[name], large[name])
