"""A resolved config, written and read again, is the same config."""

from __future__ import annotations

import dataclasses
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kempnerforge.config import (
    FreezeSpec,
    FreezeStage,
    JobConfig,
    RopeScaling,
    StageConfig,
    VLMConfig,
    diff,
    load_config,
    registry,
    to_dict,
    to_toml,
)
from kempnerforge.config.data import DataConfig, EasyVQAConfig, JsonlConfig, TextConfig
from kempnerforge.config.images import ImagesConfig
from kempnerforge.config.template import TEMPLATES, TurnsConfig
from kempnerforge.util.errors import ConfigError
from tests.params import quick

registry.vlm_configs.import_all()
registry.data_configs.import_all()

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
number = st.floats(0, 1e12)
paths = text.filter(lambda path: "$" not in path and not path.startswith("~"))
"""As they are once loaded, with nothing left to expand."""
specs = st.builds(FreezeSpec, text, st.booleans())
patterns = st.dictionaries(text, st.lists(text, min_size=1, max_size=2), max_size=2)


@st.composite
def freeze_schedules(draw: st.DrawFn) -> list[FreezeStage]:
    starts = sorted(draw(st.sets(st.integers(0, 9), max_size=3)))
    return [FreezeStage(start, tuple(draw(st.lists(specs, max_size=2)))) for start in starts]


@st.composite
def vlms(draw: st.DrawFn) -> VLMConfig:
    arch = draw(st.sampled_from(["joint_decoder", "cross_attention", "mot"]))
    own: dict[str, Any] = {}
    if arch == "mot":
        own = {
            "mot_modalities": draw(st.permutations(["image", "text", "audio"]).map(tuple)),
            "mot_warm_start_from_text": draw(st.booleans()),
        }
    return VLMConfig.for_arch(
        arch,
        max_text_len=draw(st.integers(2, 400)),
        freeze=draw(st.lists(specs, max_size=3)),
        freeze_schedule=draw(freeze_schedules()),
        module_patterns=draw(patterns),
        **own,
    )


@st.composite
def stage_lists(draw: st.DrawFn, freezes: bool) -> list[StageConfig]:
    names = draw(st.lists(text.filter(str.strip), max_size=3, unique=True))
    return [
        StageConfig(
            name,
            draw(st.integers(10, 10**9)),
            freeze=draw(st.none() | st.lists(specs, max_size=2)) if freezes else None,
            train={"batch_size": draw(st.integers(1, 9))},
            optimizer=draw(st.fixed_dictionaries({}, optional={"lr": number, "lr_scale": st.dictionaries(text, number, max_size=2)})),
        )
        for name in names
    ]


@st.composite
def jobs(draw: st.DrawFn) -> JobConfig:
    job = JobConfig(vlm=draw(vlms()))
    assert job.vlm is not None
    job.stages = draw(stage_lists(freezes=not job.vlm.freeze_schedule))
    job.train.max_steps = 10
    job.run.dir = draw(paths)
    job.data = draw(st.builds(JsonlConfig, path=paths, root=paths) | st.builds(EasyVQAConfig, max_bad_fraction=st.floats(0, 1)))
    job.model.rope_scaling = draw(st.none() | st.builds(RopeScaling, factor=st.floats(1, 1e9)))
    job.optimizer.lr = draw(number)
    job.optimizer.betas = draw(st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)))
    job.optimizer.lr_scale = draw(st.dictionaries(text, number, max_size=3))
    return job


def reload(job: JobConfig) -> JobConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text(to_toml(job), encoding="utf-8", newline="")
        return load_config(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(job=jobs())
def test_round_trip(job: JobConfig) -> None:
    job.validate()
    again = reload(job)
    assert again == job
    assert diff(job, again) == []
    assert to_toml(again) == to_toml(job)


def test_round_trip_of_a_text_job() -> None:
    job = JobConfig(data=TextConfig(path="x"))
    job.train.max_steps = 1
    assert reload(job) == job


def test_defaults_are_written_and_none_is_left_out() -> None:
    table = tomllib.loads(to_toml(JobConfig()))
    assert set(table) == {f.name for f in dataclasses.fields(JobConfig)} - {"vlm", "origins"}
    assert "rope_scaling" not in table["model"]
    assert set(table["train"]) == {f.name for f in dataclasses.fields(JobConfig().train)}


def test_to_dict_of_a_section() -> None:
    assert to_dict(FreezeStage(3, (FreezeSpec("a"),))) == {"start_step": 3, "specs": [{"module": "a", "frozen": True}]}
    for arch in registry.vlm_configs:
        assert to_dict(VLMConfig.for_arch(arch))["arch"] == arch


def test_diff() -> None:
    old, new = JobConfig(), JobConfig(vlm=VLMConfig.for_arch("mot"))
    new.vlm = None
    new.train.batch_size = 64
    new.optimizer.betas = (0.9, 0.99)
    new.model.rope_scaling = RopeScaling(factor=2.0)
    new.stages = [StageConfig("a", 3)]
    lines = diff(old, new)
    assert lines == sorted(lines)
    assert [line for line in lines if not line.startswith(("stages", "model.rope_scaling"))] == [
        "optimizer.betas: [0.9, 0.95] -> [0.9, 0.99]",
        "train.batch_size: 32 -> 64",
    ]
    assert "model.rope_scaling.factor: unset -> 2.0" in lines
    assert "stages[0].name: unset -> 'a'" in lines
    assert diff(old, old) == []
    assert diff(new, old)[0] == "model.rope_scaling.factor: 2.0 -> unset"


# a resolved job under another layer


OTHERS = {
    "vlm.arch": [*registry.vlm_configs],
    "vision_encoder.type": [*registry.vision_configs],
    "adapter.type": [*registry.adapter_configs],
    "data.source": [*registry.data_configs],
    "data.template": TEMPLATES,
    "data.batching": ("group", "pad", "pack"),
    "data.images.fit": ("squash", "crop", "letterbox", "tiles"),
    "data.images.tiling": ("grid", "anyres", "overlap"),
    "data.form": ("captions", "questions"),
    "optimizer.name": ("adamw", "muon", "lion", "schedule_free_adamw"),
    "scheduler.name": ("cosine", "linear", "wsd", "constant"),
}
CHOSEN = {
    "vlm": [VLMConfig.for_arch(arch) for arch in registry.vlm_configs if arch != "hf"],
    "data": [
        EasyVQAConfig(with_captions=True, image_placeholder="<i>"),
        JsonlConfig(path="a.jsonl", prompt_template="Q {prompt}", answer_template="A {answer}"),
        JsonlConfig(path="a.jsonl", template="turns", system="Be brief.", turns=TurnsConfig(user="U {prompt}")),
        JsonlConfig(path="a.jsonl", batching="pack", max_images_per_row=2, images=ImagesConfig(fit="tiles", max_side=64, marker_grid=4)),
        TextConfig(path="a.txt", prompt_template="{prompt}"),
    ],
}
NEEDED = ("missing", "needs one", "path", "parts = []", "parts: has 0 encoders")


@pytest.mark.parametrize("data", CHOSEN["data"], ids=lambda data: f"{data.source}-{data.template}-{data.batching}")
@pytest.mark.parametrize("key", quick(OTHERS, *list(OTHERS)[::3]))
def test_nothing_in_a_resolved_job_stands_against_another_choice(key: str, data: DataConfig, tmp_path: Path) -> None:
    """By an argument and by a file that extends it: refused is the new choice itself, or for the lack of what it needs."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    job = JobConfig(vlm=CHOSEN["vlm"][len(key) % len(CHOSEN["vlm"])], data=data)
    job.train.max_steps, job.model.max_seq_len, job.train.seq_len = 10, 4096, 4096
    job.validate()
    (tmp_path / "config.toml").write_text(to_toml(job))
    *tables, name = key.split(".")
    for value in OTHERS[key]:
        above = tmp_path / "above.toml"
        above.write_text(f'extends = "config.toml"\n[{".".join(tables)}]\n{name} = "{value}"\n')
        for path, arguments in ((tmp_path / "config.toml", [f"--{key}={value}"]), (above, [])):
            try:
                made = load_config(path, arguments)
            except ConfigError as error:
                meant = (
                    *NEEDED,
                    f"{name} = {value!r}: ",
                    f'{name} = "{value}": unknown key',
                    f"{tables[-1]}: only",
                    "template = 'turns': a document has no turns",
                )
                assert all(any(word in line for word in meant) for line in error.problems), error.problems
                continue
            found = to_dict(made)
            for table in tables:
                found = found[table]
            assert found[name] == value
