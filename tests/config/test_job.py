"""Stages, freezing over time, and the checks between sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.config import (
    ConfigError,
    CrossAttentionConfig,
    FreezeSpec,
    FreezeStage,
    JobConfig,
    JointDecoderConfig,
    ModelConfig,
    MoTConfig,
    RunConfig,
    StageConfig,
    TrainConfig,
    VLMConfig,
    load_config,
)
from kempnerforge.config.adapter import PixelShuffleConfig
from kempnerforge.config.data import EasyVQAConfig, JsonlConfig, TextConfig
from kempnerforge.config.optimizer import OptimizerGroup
from kempnerforge.config.vision import SiglipConfig, ViTConfig
from tests.training.tiny import optimizer_config, scheduler_config

HEAD = '[vlm]\narch = "joint_decoder"\n'
VISION = FreezeSpec("vision_encoder")
WORDS = FreezeSpec("transformer")


def job(**sections: Any) -> JobConfig:
    return JobConfig(**({"vlm": JointDecoderConfig(), "train": TrainConfig(max_steps=10)} | sections))


def complaints(cfg: JobConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        cfg.validate()
    return caught.value.problems


def stages(*steps: int, **overrides: Any) -> list[StageConfig]:
    return [StageConfig(f"s{i}", n, **overrides) for i, n in enumerate(steps)]


def test_a_job_without_stages_has_one() -> None:
    cfg = job(vlm=JointDecoderConfig(freeze=[VISION]))
    cfg.validate()
    (stage,) = cfg.resolved_stages()
    assert (stage.name, stage.index, stage.start, stage.end, stage.steps) == ("train", 0, 0, 10, 10)
    assert (stage.data, stage.train, stage.optimizer, stage.scheduler) == (cfg.data, cfg.train, cfg.optimizer, cfg.scheduler)
    assert stage.freeze == (VISION,)
    assert cfg.warnings() == []


@given(steps=st.lists(st.integers(1, 20), min_size=1, max_size=6), cap=st.integers(0, 90))
def test_stages_cover_the_run_without_gaps(steps: list[int], cap: int) -> None:
    cfg = job(stages=stages(*steps), train=TrainConfig(max_steps=cap))
    total = min(sum(steps), cap or sum(steps))
    found = cfg.resolved_stages()
    assert [step for stage in found for step in range(stage.start, stage.end)] == list(range(total))
    assert all(stage.end - stage.start <= steps[stage.index] for stage in found)
    assert cfg.total_steps() == total
    silent = [f"s{i}" for i in range(len(steps)) if sum(steps[:i]) >= total]
    assert [line.split("'")[1] for line in cfg.warnings() if "never runs" in line] == silent


def test_overrides_of_a_stage(tmp_path: Path) -> None:
    text = """
[optimizer]
lr = 0.5
lr_scale = { adapter = 2 }
[data]
max_bad_fraction = 0.5
[[stages]]
name = "captions"
steps = 5
data.form = "captions"
[[stages]]
name = "questions"
steps = 6
train.batch_size = 12
train.grad_accum_steps = 3
optimizer.lr = 1
optimizer.lr_scale = {}
scheduler.name = "wsd"
scheduler.warmup_steps = 2
"""
    path = tmp_path / "a.toml"
    path.write_text(HEAD + text)
    cfg = load_config(path)
    first, second = cfg.resolved_stages()
    assert first.data == EasyVQAConfig(form="captions", max_bad_fraction=0.5)
    assert (first.train, first.optimizer, first.scheduler) == (cfg.train, cfg.optimizer, cfg.scheduler)
    assert second.data == EasyVQAConfig(form="questions", max_bad_fraction=0.5)
    assert second.train == TrainConfig(batch_size=12, grad_accum_steps=3)
    assert second.optimizer == optimizer_config("adamw", lr=1.0, lr_scale={})
    assert second.scheduler == scheduler_config("wsd", warmup_steps=2)
    assert cfg.data == EasyVQAConfig(max_bad_fraction=0.5), "the job itself stays as it is"


def test_a_stage_with_another_source() -> None:
    cfg = job(data=EasyVQAConfig(form="captions", num_workers=2), stages=stages(3, data={"source": "jsonl", "path": "x"}))
    assert cfg.resolved_stages()[0].data == JsonlConfig(path="x", num_workers=2)
    cfg = job(data=JsonlConfig(path="x"), stages=stages(3, data={"source": "jsonl", "prompt_column": "q"}))
    assert cfg.resolved_stages()[0].data == JsonlConfig(path="x", prompt_column="q")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data": {"fom": "captions"}}, "[[stages]] #1 data.fom = \"captions\": unknown key; did you mean 'form'?"),
        ({"data": {"form": "poems"}}, "[[stages]] #1 data.form = 'poems': allowed are 'captions', 'questions'"),
        ({"data": {"form": 3}}, "[[stages]] #1 data.form = 3: must be a string"),
        ({"data": {"source": "nowhere"}}, "[[stages]] #1 data.source = 'nowhere': Unknown data.source"),
        ({"data": {"source": 3}}, "[[stages]] #1 data.source = 3: must be a string"),
        ({"data": {"source": "jsonl"}}, "[[stages]] #1 data.path = '': source 'jsonl' needs one"),
        ({"data": {"source": "text", "path": "x", "form": "captions"}}, '[[stages]] #1 data.form = "captions": unknown key'),
        ({"data": {"tokenizer": "gpt2"}}, "[[stages]] #1 data.tokenizer: holds for the whole run"),
        ({"data": {"tokenizer_vocab_size": 600}}, "[[stages]] #1 data.tokenizer_vocab_size: holds for the whole run"),
        (
            {"train": {"seed": 3}},
            "[[stages]] #1 train.seed = 3: unknown key; allowed are batch_size, rows_per_step, grad_accum_steps, seq_len",
        ),
        ({"train": {"seq_len": 4096}}, "[[stages]] #1 train.seq_len = 4096: must be at most model.max_seq_len = 2048"),
        ({"train": {"seq_len": 99}}, "[vlm] max_text_len = 512: with 196 image tokens in the stream that is 708 positions, but model.max"),
        ({"train": {"batch_size": 0}}, "[[stages]] #1 train.batch_size = 0: must be >= 1"),
        ({"train": {"grad_accum_steps": 5}}, "[[stages]] #1 train.batch_size = 32: must be a multiple of grad_accum_steps = 5"),
        ({"optimizer": {"name": "muon"}}, "[[stages]] #1 optimizer.name: holds for the whole run"),
        ({"optimizer": {"lr": float("nan")}}, "[[stages]] #1 optimizer.lr = nan: must be a finite number"),
        ({"scheduler": {"warmup_steps": 2.0}}, "[[stages]] #1 scheduler.warmup_steps = 2.0: must be an integer"),
        ({"scheduler": {"warmup_steps": 6}}, "[[stages]] #1 scheduler.warmup_steps = 6: the stage has only 5 steps"),
    ],
)
def test_bad_overrides_of_a_stage(overrides: dict[str, Any], message: str) -> None:
    (line,) = complaints(job(stages=stages(5, **overrides)))
    assert line.startswith(message)


def test_stages_that_never_run_are_checked_too() -> None:
    cfg = job(stages=[*stages(5), StageConfig("late", 5, optimizer={"lrr": 1.0})], train=TrainConfig(max_steps=2))
    assert "[[stages]] #2 optimizer.lrr" in complaints(cfg)[0]
    with pytest.raises(ConfigError, match="lrr"):
        cfg.resolved_stages()


def test_names_are_unique() -> None:
    cfg = job(stages=[StageConfig("a", 1), StageConfig("b", 1), StageConfig("a", 1)])
    assert complaints(cfg) == ["[[stages]] #3 name = 'a': stage #1 has this name, too"]


def test_a_run_has_steps() -> None:
    assert "max_steps = 0" in complaints(job(train=TrainConfig()))[0]
    assert job(train=TrainConfig()).resolved_stages() == []
    job(train=TrainConfig(), stages=stages(1)).validate()


def test_warnings_of_short_and_long_runs() -> None:
    warm = scheduler_config("cosine", warmup_steps=8)
    cfg = job(stages=stages(10, 20), scheduler=warm, train=TrainConfig(max_steps=5))
    cfg.validate()
    assert cfg.warnings() == [
        "stage 's1' starts at step 10 and never runs, train.max_steps = 5",
        "stage 's0' ends after 5 of its 8 warm-up steps, train.max_steps = 5",
    ]
    assert job(scheduler=warm, train=TrainConfig(max_steps=5)).warnings() == [
        "stage 'train' ends after 5 of its 8 warm-up steps, train.max_steps = 5"
    ]
    assert job(stages=stages(10), train=TrainConfig(max_steps=50)).warnings() == ["train.max_steps = 50: the stages end at step 10"]


def test_a_learning_rate_that_muon_does_not_read() -> None:
    """Where ``lr`` changes for a stage or a group, and ``muon_lr`` stays."""

    def said(name: str, changes: dict[str, object], *groups: OptimizerGroup) -> list[str]:
        base = optimizer_config(name, muon_lr=0.03, groups=list(groups))
        return job(optimizer=base, stages=[StageConfig("a", 5), StageConfig("b", 5, optimizer=changes)]).warnings()

    (line,) = said("muon", {"lr": 1e-4})
    assert line == (
        "stage 'b': optimizer.lr is of what AdamW takes; the matrices stay at optimizer.muon_lr = 0.03 unless it is set beside it"
    )
    assert len(said("muon", {}, OptimizerGroup("adapter", lr=1e-4))) == 2, "a group of both stages"
    assert said("adamw", {"lr": 1e-4}) == said("muon", {"lr": 1e-4, "muon_lr": 1e-3}) == said("muon", {"muon_lr": 1e-3}) == []
    assert said("muon", {}, OptimizerGroup("adapter", lr=1e-4, muon_lr=1e-3)) == []


def test_closed_gates_that_stay_frozen() -> None:
    def warned(*freeze: FreezeSpec, run: RunConfig | None = None) -> list[str]:
        return job(vlm=CrossAttentionConfig(max_text_len=16, freeze=list(freeze)), run=run or RunConfig()).warnings()

    rest = FreezeSpec("transformer")
    assert warned(rest)[0].startswith("the gates of cross_attention start closed and frozen")
    assert warned(FreezeSpec("transformer.layers.3.*"))
    assert warned() == warned(rest, FreezeSpec("cross_attention", frozen=False)) == warned(rest, run=RunConfig(init_from="runs/a")) == []


# Freezing


def test_freeze_schedule_by_step() -> None:
    later, last = FreezeSpec("vision_encoder", False), FreezeSpec("transformer.layers.*")
    schedule = [FreezeStage(3, (later, WORDS)), FreezeStage(6, (last,))]
    cfg = job(vlm=JointDecoderConfig(freeze=[VISION], freeze_schedule=schedule))
    cfg.validate()
    expected = [(VISION,)] * 3 + [(VISION, later, WORDS)] * 3 + [(VISION, later, WORDS, last)] * 5
    assert [cfg.freeze_at(step) for step in range(11)] == expected
    cfg.stages = stages(5, 5)
    assert [cfg.freeze_at(step) for step in range(11)] == expected, "stages without freeze change nothing"


def test_freeze_of_stages_replaces() -> None:
    cfg = job(
        vlm=JointDecoderConfig(freeze=[VISION]),
        stages=[StageConfig("a", 2), StageConfig("b", 2, freeze=[WORDS]), StageConfig("c", 2, freeze=[]), StageConfig("d", 1)],
    )
    cfg.validate()
    assert [cfg.freeze_at(step) for step in range(9)] == [(VISION,)] * 2 + [(WORDS,)] * 2 + [()] * 2 + [(VISION,)] * 3
    for stage in cfg.resolved_stages():
        assert {cfg.freeze_at(step) for step in range(stage.start, stage.end)} == {stage.freeze}


def test_one_form_of_freezing_at_a_time() -> None:
    schedule = [FreezeStage(1, (WORDS,))]
    cfg = job(vlm=JointDecoderConfig(freeze_schedule=schedule), stages=[StageConfig("a", 2), StageConfig("b", 2, freeze=[])])
    assert complaints(cfg) == ["[vlm] freeze_schedule: stage 'b' has its own freeze; use one of the two forms"]


@pytest.mark.parametrize(("start", "ok"), [(9, True), (10, False), (99, False)])
@pytest.mark.parametrize("staged", [True, False])
def test_freeze_schedule_within_the_run(start: int, ok: bool, staged: bool) -> None:
    cfg = job(vlm=JointDecoderConfig(freeze_schedule=[FreezeStage(start, (WORDS,))]), stages=stages(4, 6) if staged else [])
    if ok:
        cfg.validate()
    else:
        assert complaints(cfg) == [f"[vlm] freeze_schedule[0].start_step = {start}: the last step is 9, counted from 0"]


def test_a_short_run_of_stages_may_miss_the_freeze_schedule() -> None:
    cfg = job(vlm=JointDecoderConfig(freeze_schedule=[FreezeStage(9, (WORDS,))]), stages=stages(10), train=TrainConfig(max_steps=5))
    cfg.validate()
    assert cfg.warnings() == ["the freeze schedule's start_step = 9 is never reached, train.max_steps = 5"]


def test_text_only_stages_may_freeze_by_pattern() -> None:
    cfg = job(vlm=None, data=TextConfig(path="x"), stages=stages(2, freeze=[FreezeSpec("*.embed.*")]))
    cfg.validate()
    assert cfg.freeze_at(0) == (FreezeSpec("*.embed.*"),)


# Lengths


@pytest.mark.parametrize(
    ("vlm", "text_len", "seq_len", "max_seq_len", "ok"),
    [
        (JointDecoderConfig, 44, 300, 300, True),
        (JointDecoderConfig, 45, 300, 300, False),
        (JointDecoderConfig, 45, 300, 400, False),
        (JointDecoderConfig, 45, 301, 301, True),
        (MoTConfig, 44, 300, 300, True),
        (MoTConfig, 45, 300, 300, False),
        (CrossAttentionConfig, 300, 300, 300, True),
        (CrossAttentionConfig, 301, 300, 300, False),
    ],
)
def test_image_and_text_fit(vlm: type[VLMConfig], text_len: int, seq_len: int, max_seq_len: int, ok: bool) -> None:
    cfg = job(
        vlm=vlm(max_text_len=text_len),
        vision_encoder=ViTConfig(image_size=512, patch_size=16),
        adapter=PixelShuffleConfig(factor=2),
        train=TrainConfig(max_steps=1, seq_len=seq_len),
        model=ModelConfig(max_seq_len=max_seq_len),
    )
    assert cfg.image_tokens() == 256
    if ok:
        cfg.validate()
        return
    (line,) = complaints(cfg)
    image = 0 if vlm is CrossAttentionConfig else 256
    for piece in (f"[vlm] max_text_len = {text_len}", f"{image} image", str(image + text_len), str(seq_len), str(max_seq_len)):
        assert piece in line


def test_check_sequence_with_the_built_encoders_count() -> None:
    cfg = job(vision_encoder=SiglipConfig(path="x"), train=TrainConfig(max_steps=1, seq_len=600))
    assert cfg.image_tokens() is None
    cfg.validate()
    cfg.check_sequence(88)
    with pytest.raises(ValueError, match="601 positions"):
        cfg.check_sequence(89)


def test_adapter_that_does_not_fit_the_encoder() -> None:
    cfg = job(adapter=PixelShuffleConfig(factor=2), vision_encoder=ViTConfig(image_size=48))
    assert complaints(cfg) == ["[adapter] factor = 2: does not divide the grid of 3 x 3 vision features"]
    cfg = job(adapter=PixelShuffleConfig(), vision_encoder=ViTConfig(cls_token=True))
    assert "square grid" in complaints(cfg)[0]


def test_rows_longer_than_the_model_reads() -> None:
    cfg = job(vlm=None, data=TextConfig(path="x"), model=ModelConfig(max_seq_len=512))
    assert complaints(cfg) == ["[train] seq_len = 1024: must be at most model.max_seq_len = 512"]


# Archs and sources


def test_text_only_jobs() -> None:
    cfg = job(vlm=None, data=TextConfig(path="x"))
    cfg.validate()
    cfg.check_sequence(10**9)
    assert (cfg.image_tokens(), cfg.freeze_at(0)) == (0, ())
    assert "[data] source = 'easy_vqa': is about images" in complaints(job(vlm=None))[0]
    mixed = job(vlm=None, stages=[StageConfig("a", 1, data={"source": "text", "path": "x"}), StageConfig("b", 1)])
    (line,) = complaints(mixed)
    assert line.startswith("[[stages]] #2 data.source = 'easy_vqa': is about images")


@pytest.mark.parametrize(
    ("vlm", "model", "message"),
    [
        (CrossAttentionConfig(cross_attention_every_n_layers=5), {}, "[vlm] cross_attention_every_n_layers = 5: gives no block"),
        (CrossAttentionConfig(cross_attention_n_heads=6), {}, "[vlm] cross_attention_n_heads = 6: must divide model.dim = 256"),
        (CrossAttentionConfig(cross_attention_n_kv_heads=3), {}, "[vlm] cross_attention_n_kv_heads = 3: must divide the 4 heads"),
        (CrossAttentionConfig(cross_attention_n_heads=6), {"head_dim": 64}, None),
        (CrossAttentionConfig(cross_attention_every_n_layers=4), {}, None),
        (MoTConfig(mot_image_n_heads=8), {}, "[vlm] mot_image_n_heads = 8"),
        (MoTConfig(mot_image_n_kv_heads=2), {}, "mot_image_n_kv_heads = 2"),
        (MoTConfig(mot_image_n_heads=4), {"n_kv_heads": 2}, None),
    ],
)
def test_what_an_arch_demands(vlm: VLMConfig, model: dict[str, Any], message: str | None) -> None:
    cfg = job(vlm=vlm, model=ModelConfig(**model))
    if message is None:
        cfg.validate()
    else:
        (line,) = complaints(cfg)
        assert message in line


def test_checks_between_sections_run_at_load_all_of_them(tmp_path: Path) -> None:
    text = 'arch = "cross_attention"\ncross_attention_every_n_layers = 9\n[model]\nmax_seq_len = 100\n[adapter]\ntype = "avg_pool"\nfactor = 5\n'
    path = tmp_path / "a.toml"
    path.write_text("[vlm]\n" + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    keys = {line.removeprefix(f"{path}: ").split(" = ")[0] for line in caught.value.problems}
    assert keys == {"[vlm] cross_attention_every_n_layers", "[train] seq_len", "[train] max_steps", "[adapter] factor"}


def test_a_budget_in_samples() -> None:
    """Whole batches of it are the steps; the resolved config says both, and is read again."""
    assert TrainConfig(total_samples=1000, batch_size=32).max_steps == 31
    assert TrainConfig(total_samples=1000, batch_size=32, max_steps=31).max_steps == 31
    with pytest.raises(ValueError, match="max_steps = 20: total_samples = 1000 makes 31 steps of 32; leave one of the two out"):
        TrainConfig(total_samples=1000, batch_size=32, max_steps=20)
    with pytest.raises(ValueError, match="total_samples = 31: must be at least one batch, batch_size = 32"):
        TrainConfig(total_samples=31, batch_size=32)
    assert complaints(job(train=TrainConfig(total_samples=640), stages=stages(5))) == [
        "[train] total_samples = 640: [[stages]] have their steps; leave it out"
    ]
