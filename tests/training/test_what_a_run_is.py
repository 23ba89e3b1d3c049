"""What a run may be continued with, what is refused, and that a refused command leaves everything as it was."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tomli_w
import torch
from hypothesis import given
from hypothesis import strategies as st

from kempnerforge.checkpoint import resolve
from kempnerforge.checkpoint.manifest import Manifest, verify
from kempnerforge.config import JobConfig, TrainConfig, VLMConfig, registry, to_dict
from kempnerforge.config.dump import FlatConfig
from kempnerforge.config.optimizer import OptimizerGroup
from kempnerforge.training.history import Span, StageRecord, changed_on_the_way, continued, trained_with
from kempnerforge.training.hooks.evaluation import Evaluation
from kempnerforge.training.run_state import RunState, SavedRun
from kempnerforge.training.same_run import check_same_run
from kempnerforge.util.errors import InputError
from tests.training.tiny import call, make_job, metrics, optimizer_config, scheduler_config, write_rows


def state(job: JobConfig, step: int) -> RunState:
    """Of a checkpoint that ``job`` has written."""
    return RunState(step, history=[Span(0, to_dict(job), [])])


def check(job: JobConfig, kept: RunState, *allow: str, path: Path = Path("run/checkpoints/step")) -> None:
    manifest = Manifest(1, kept.step, 1, "", kept.to_json(), {})
    check_same_run(job, FlatConfig.of(job), SavedRun(path, manifest, kept), Path("run"), allow)


def refused(new: JobConfig, old: JobConfig, step: int, *allow: str) -> str:
    """Why ``new`` does not go on where ``old`` is at ``step``; empty: it does."""
    try:
        check(new, state(old, step), *allow)
    except InputError as error:
        return str(error)
    return ""


# ---- the plan --------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(registry.schedules.names()), st.integers(0, 12), st.none() | st.integers(0, 12), st.floats(0, 1),
    st.integers(1, 40), st.integers(1, 40), st.data(),
)  # fmt: skip
def test_another_length_is_refused_where_it_would_have_changed_what_was_done(
    name: str, warmup: int, own: int | None, floor: float, before: int, after: int, data: st.DataObject
) -> None:
    """By comparing the rates of all steps that are done, of the section and of a group with a warm-up of its own."""
    step = data.draw(st.integers(0, min(before, after)))
    job = JobConfig(
        train=TrainConfig(max_steps=before),
        scheduler=scheduler_config(name, warmup_steps=warmup, min_lr_ratio=floor),
        optimizer=optimizer_config("adamw", groups=[] if own is None else [OptimizerGroup("adapter", warmup_steps=own)]),
    )
    rates = [[job.scheduler.factor(t, n, w) for w in (None, own) for t in range(step)] for n in (before, after)]
    found = refused(replace(job, train=TrainConfig(max_steps=after)), job, step)
    assert bool(found) == (rates[0] != rates[1])
    if found:
        assert f"train.max_steps: {before} -> {after}" in found and repr(name) in found
        for key in ("train.max_steps", "train", "scheduler"):
            assert not refused(replace(job, train=TrainConfig(max_steps=after)), job, step, key)


def test_the_rates_of_all_steps_count() -> None:
    """Of these two plans the rate of the last step that is done is the same, those before it are not."""
    scheduler = scheduler_config("cosine", min_lr_ratio=0.9999999999999999)
    job = JobConfig(train=TrainConfig(max_steps=4), scheduler=scheduler)
    assert scheduler.factor(3, 4) == scheduler.factor(3, 5) and scheduler.factor(2, 4) != scheduler.factor(2, 5)
    assert refused(replace(job, train=TrainConfig(max_steps=5)), job, 4)


@given(st.integers(1, 30), st.integers(1, 30))
def test_a_run_that_has_passed_the_end_is_refused(end: int, step: int) -> None:
    job = JobConfig(train=TrainConfig(max_steps=end), scheduler=scheduler_config("constant"))
    found = refused(job, job, step)
    assert bool(found) == (step > end)
    assert not found or (f"has done {step} steps already" in found and f"train.max_steps = {end}" in found)


def test_a_complete_run_takes_nothing_that_no_step_was_trained_with() -> None:
    old, steps = JobConfig(train=TrainConfig(max_steps=6), scheduler=scheduler_config("constant")), 6
    new = replace(old, optimizer=replace(old.optimizer, lr=2.0))
    assert "has done all of its 6 steps, none of them with\n  optimizer.lr" in refused(new, old, steps, "optimizer.lr")
    assert not refused(new, old, steps - 1, "optimizer.lr") and not refused(old, old, steps, "optimizer.lr")
    assert not refused(replace(new, train=TrainConfig(max_steps=7)), old, steps, "optimizer")


def test_the_new_plan_is_said_and_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = make_job(tmp_path)
    more = ("train", job, "--eval.at_end=false", "--train.max_steps=8")
    assert call(*more, "--train.max_steps=4").code == 0
    ended = call(*more)
    said = "train.max_steps: 4 -> 8: the schedule 'cosine' was planned for 4 steps; step 5 has the learning rate"
    assert ended.code == 2 and said in ended.err
    assert f"{said} 0.0009 (step 5 of 8 in stage 'train'), by the old plan 0.0002 (step 5 of 4 in stage 'train')" in ended.err
    with caplog.at_level(logging.WARNING, logger="kempnerforge"):
        assert call(*more, "--allow-change=train.max_steps").code == 0
    assert "the new plan: step 5 has the learning rate" in caplog.text
    rates = {row["step"]: row["train/lr"] for row in metrics(tmp_path / "run")}
    cosine = scheduler_config("cosine")
    expected = [*(cosine.factor(t, 4) for t in range(4)), *(cosine.factor(t, 8) for t in range(4, 8))]
    assert list(rates.values()) == pytest.approx([2e-3 * factor for factor in expected])


def test_stages_keep_their_plan_and_are_held_to_it() -> None:
    from kempnerforge.config import StageConfig

    def job(steps: int, cap: int) -> JobConfig:
        return JobConfig(train=TrainConfig(max_steps=cap), stages=[StageConfig("a", steps), StageConfig("b", 9)])

    assert not refused(job(10, 0), job(10, 7), 7), "cut short, then allowed to go on"
    for reached in (7, 12):  # in the stage, and after it
        assert "stages[0].steps: 10 -> 12" in refused(job(12, 0), job(10, 0), reached)
        assert not refused(job(12, 0), job(10, 0), reached, "stages")


def test_keys_that_the_run_did_not_know_yet_are_no_change() -> None:
    """A config that was written before a key existed; the key at its default, and at another value."""
    old, new = JobConfig(train=TrainConfig(max_steps=3)), JobConfig(train=TrainConfig(max_steps=3))
    kept = state(old, 2)
    del kept.history[0].config["optimizer"]["moments"]
    check(new, kept)
    new.optimizer.moments = "reset"
    with pytest.raises(InputError, match="optimizer.moments: unset -> 'reset'"):
        check(new, kept)


# ---- refused commands ------------------------------------------------------------------------------------------------


def test_aliases_without_the_own_name_of_a_module_are_no_change(tmp_path: Path) -> None:
    """A checkpoint without history has its config in ``config.toml``."""
    job = JobConfig(vlm=VLMConfig.for_arch("mot", max_text_len=64), train=TrainConfig(max_steps=4))
    table = to_dict(job)
    patterns = table["vlm"]["module_patterns"]
    for changed in ({}, {"adapter": ["adapter.mlp.*"]}):
        table["vlm"]["module_patterns"] = {name: own[1:] for name, own in patterns.items()} | changed
        (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
        if changed:
            with pytest.raises(InputError, match="holds a run with another config:\n  vlm.module_patterns.adapter.*\nchange it back"):
                check(job, RunState(2), path=tmp_path)
        else:
            check(job, RunState(2), path=tmp_path)


def test_an_alias_for_what_is_in_a_module_is_no_edit(tmp_path: Path) -> None:
    """The copy of the config beside the checkpoints is read as it is."""
    job = make_job(tmp_path, extra='\n[vlm.module_patterns]\nlast = ["transformer.norm.*"]\n')
    argv = ("train", job, "--scheduler.name=constant", "--eval.at_end=false")
    assert call(*argv, "--train.max_steps=1").code == 0
    ended = call(*argv, "--train.max_steps=2")
    assert ended.code == 0, ended.err


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a job and its run of 4 steps."""
    folder = tmp_path_factory.mktemp("begun")
    write_rows(folder / "unreadable.jsonl", [{"image": "none.png", "prompt": "what?", "answer": "red"}] * 4)
    assert call("train", make_job(folder), "--train.max_steps=4", "--eval.at_end=false").code == 0
    return folder


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


REFUSED = {
    "another rate": ["--optimizer.lr=1"],
    "below what is done": ["--train.max_steps=2"],
    "a longer plan": ["--train.max_steps=9"],
    "no data": ["--data.path={folder}/none.jsonl", "--allow-change=data"],
    "no held-out data": ["--data.eval_path={folder}/none.jsonl", "--allow-change=data"],
    "other data": ["--data.path={folder}/test.jsonl", "--allow-change=data.path"],
    "a pattern without a hit": ["--vlm.freeze=[{module='x.*'}]", "--allow-change=vlm"],
    "a scale without a hit": ["--optimizer.lr_scale={x=2.0}", "--allow-change=optimizer"],
    "too short for a sample": ["--vlm.max_text_len=2", "--model.max_seq_len=4", "--allow-change=vlm", "--allow-change=model"],
    "another model": ["--model.dim=64", "--allow-change=model"],
    "no readable data": ["--data.path={folder}/unreadable.jsonl", "--allow-change=data"],
    "a plugin that is not there": ["--plugins=none.py"],
    "a change of a key that there is not": ["--allow-change=optimiser"],
    "a change of a key that a section has not": ["--allow-change=train.stepss"],
}
ON_ANY_DIRECTORY = [
    "no data",
    "no readable data",
    "no held-out data",
    "a pattern without a hit",
    "a scale without a hit",
    "too short for a sample",
]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_command_changes_nothing(name: str, begun: Path) -> None:
    before = everything(begun)
    argv = [word.replace("{folder}", str(begun)) for word in REFUSED[name]]
    ended = call("train", begun / "job.toml", "--train.max_steps=4", *argv)
    assert ended.code in (2, 3) and everything(begun) == before, ended


@pytest.mark.parametrize("name", ON_ANY_DIRECTORY)
def test_a_refused_command_neither_moves_a_run_nor_makes_a_directory(name: str, begun: Path) -> None:
    before = everything(begun)
    argv = ["train", begun / "job.toml", *(word.replace("{folder}", str(begun)) for word in REFUSED[name])]
    fresh = call(*argv, "--fresh")
    assert fresh.code == 2 and everything(begun) == before, fresh
    new = call(*argv, f"--run.dir={begun}/deep/new/run")
    assert new.code == 2 and everything(begun) == before, new


def test_weights_that_do_not_fit_leave_no_directory(begun: Path) -> None:
    before = everything(begun)
    ended = call(
        "train", begun / "job.toml", f"--run.init_from={begun}/run", "--vision_encoder.dim=64", f"--run.dir={begun}/new", "--fresh"
    )
    assert ended.code == 2 and "run.init_from" in ended.err and everything(begun) == before


# ---- the record ------------------------------------------------------------------------------------------------------


def span(start: int, **facts: object) -> Span:
    return Span(**{"start": start, "config": {"train": {"batch_size": 4}}, "plugins": [], **facts})  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=8))
def test_every_step_belongs_to_the_span_that_trained_it(parts: list[tuple[int, int, int]]) -> None:
    """A run in parts, each of so many processes and steps, that loses up to some of its last steps when it stops."""
    history, truth, step = [], [], 0
    for steps, world, lost in parts:
        history = continued(history, step, span(0, world_size=world))
        truth = truth[:step] + [world] * steps
        step = max(len(truth) - lost, 0) if lost < steps else step
    kept = [entry for entry in history if entry.start < len(truth)]
    ends = [*(entry.start for entry in kept[1:]), len(truth)]
    assert [e.world_size for e, end in zip(kept, ends, strict=True) for _ in range(e.start, end)] == truth
    assert all(a.world_size != b.world_size for a, b in pairwise(kept)), "no span without a change"


def test_settings_beside_the_training_make_no_span() -> None:
    def config(**sections: object) -> dict:
        return {"train": {"batch_size": 4}, "metrics": {"interval": 1}, "run": {"dir": "a"}} | sections

    first = continued([], 0, span(0, config=config()))
    again = continued(first, 3, span(0, config=config(metrics={"interval": 5}, run={"dir": "b"})))
    assert [entry.start for entry in again] == [0] and again[0].config["metrics"] == {"interval": 5}, "the newest is kept"
    assert [entry.start for entry in continued(first, 3, span(0, config=config(train={"batch_size": 2})))] == [0, 3]


def test_a_run_continued_with_another_batch_size_says_so(tmp_path: Path) -> None:
    argv = ("train", make_job(tmp_path), "--scheduler.name=constant", "--train.max_steps=6")
    assert call(*argv, "--train.max_steps=4", "--eval.at_end=false").code == 0
    assert call(*argv, "--train.batch_size=2", "--allow-change=train.batch_size").code == 0
    run = tmp_path / "run"
    history = RunState.of(verify(resolve(run))).history
    assert [(entry.start, entry.config["train"]["batch_size"]) for entry in history] == [(0, 4), (4, 2)]
    assert "batch_size = 2" in (run / "config.toml").read_text()
    change = "train.batch_size: 4 -> 2"
    assert change in (run / "report.html").read_text().replace("&gt;", ">")
    ended = call("export", run, tmp_path / "out", "--format", "kempnerforge")
    assert ended.code == 0 and "not all of its steps were trained with one config" in ended.out + ended.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"* `train`, steps 0 to 4: 4 steps of 4 samples; `jsonl` ({tmp_path}/train.jsonl)" in card
    assert "* `train`, steps 4 to 6: 2 steps of 2 samples;" in card and change in card and "## Config of the steps from 4 on" in card


def test_lines_of_the_record() -> None:
    stages = [
        StageRecord("a", start=0, end=6, samples=4, data=["`x`"]),
        StageRecord("b", start=6, end=9, samples=2, data=["`y`"]),
    ]
    one = [span(0, stages=stages)]
    assert trained_with(one, 8) == ["`a`: 6 steps of 4 samples; `x`", "`b`: 2 steps of 2 samples; `y`"] and changed_on_the_way(one, 8) == []
    two = [*one, span(4, stages=stages, world_size=2, data={"a": "1"})]
    assert changed_on_the_way(two, 8) == ["from step 4 on: processes: 1 -> 2"] and changed_on_the_way(two, 4) == []
    assert trained_with([span(3, stages=stages)], 6) == ["steps 0 to 3: not recorded", "`a`: 3 steps of 4 samples; `x`"]


# ---- plugins ---------------------------------------------------------------------------------------------------------

ARCH = """
from dataclasses import dataclass
from kempnerforge.config import registry
from kempnerforge.config.vlm import VLMConfig
from kempnerforge.vlm.joint_decoder import JointDecoder
@registry.register_vlm_config
@dataclass
class LabConfig(VLMConfig):
    arch: str = "lab_{name}"
@registry.register_arch("lab_{name}")
class Lab(JointDecoder):
    sign = +1
"""


@pytest.fixture
def lab(tmp_path: Path) -> Callable[..., object]:
    """The command on a job whose arch is in ``lab/arch.py``."""
    job = make_job(tmp_path)
    job.write_text(f'plugins = ["lab/arch.py"]\n{job.read_text()}'.replace('"joint_decoder"', f'"lab_{tmp_path.name}"'))
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "arch.py").write_text(ARCH.replace("{name}", tmp_path.name))

    def train(steps: int, *more: object) -> object:
        return call("train", job, "--scheduler.name=constant", f"--train.max_steps={steps}", "--eval.at_end=false", *more)

    return train


def test_a_plugin_is_known_by_its_source(lab: Callable[..., object], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, run = tmp_path / "lab" / "arch.py", tmp_path / "run"
    assert lab(2).code == 0
    (tmp_path / "other").mkdir()
    moved = file.rename(tmp_path / "other" / "renamed.py")
    assert lab(3).code == 2, "it is not where the config says"
    ended = lab(3, f"--plugins={moved}")
    assert ended.code == 0, "the same source under another name is the same plugin"
    moved.write_text(moved.read_text().replace("+1", "-1"))
    before = everything(run)
    ended = lab(4, f"--plugins={moved}")
    assert ended.code == 2 and "its source changed" in ended.err and everything(run) == before
    lines = [line.strip() for line in ended.err.splitlines()]
    assert "-    sign = +1" in lines and "+    sign = -1" in lines
    assert lab(4, f"--plugins={moved}", "--allow-change=plugins").code == 0
    history = RunState.of(verify(resolve(run))).history
    assert history[-1].start == 3 and len({entry.plugins[0].sha256 for entry in history}) == 2
    (line,) = [line for line in changed_on_the_way(history, 4) if "plugins: " in line]
    assert line.startswith("from step 3 on: ")


def test_a_run_whose_plugin_has_moved_is_loaded_with_it(
    lab: Callable[..., object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from kempnerforge.inference.model import load_pretrained

    assert lab(1).code == 0
    moved = (tmp_path / "lab" / "arch.py").rename(tmp_path / "elsewhere.py")
    with pytest.raises(InputError, match="arch.py' cannot be imported") as caught:
        load_pretrained(tmp_path / "run")
    assert "--plugins=FILE" in str(caught.value) and "load_pretrained(..., plugins=[FILE])" in str(caught.value)
    model, _ = load_pretrained(tmp_path / "run", plugins=[moved])
    assert type(model).__name__ == "Lab" and "not what it was trained with" not in caplog.text
    asked = call("generate", tmp_path / "run", tmp_path / "0.png", "--prompt", "what?", "--max-new-tokens", "2", f"--plugins={moved}")
    assert asked.code == 0, asked
    out = tmp_path / "out"
    assert call("export", tmp_path / "run", out, "--format", "kempnerforge", "--no-verify", f"--plugins={moved}").code == 0
    assert str(moved) in (out / "config.toml").read_text()
    moved.write_text(moved.read_text().replace("+1", "-1"))
    with caplog.at_level(logging.WARNING, logger="kempnerforge"):
        load_pretrained(tmp_path / "run", plugins=[moved])
    assert "this is not what it was trained with: plugins: " in caplog.text


def test_an_attempt_with_other_rows_is_refused_before_anything_is_written(lab: Callable[..., object], tmp_path: Path) -> None:
    assert lab(2).code == 0
    before = everything(tmp_path / "run")
    write_rows(tmp_path / "train.jsonl", [{"image": "1.png", "prompt": "what?", "answer": "red"}] * 8)
    assert lab(3).code == 2 and everything(tmp_path / "run") == before


# ---- complete, or not ------------------------------------------------------------------------------------------------


def results(run: Path) -> tuple[bytes, ...]:
    return tuple((run / name).read_bytes() for name in ("summary.json", "report.html", "complete.json"))


def test_complete_is_what_a_record_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is lengthened has no results until it has its own; those of another evaluation, or edited, are made again."""
    argv = ("train", make_job(tmp_path), "--scheduler.name=constant", "--eval.max_new_tokens=2")
    run = tmp_path / "run"
    assert call(*argv, "--train.max_steps=2").code == 0
    two = results(run)

    def again(*more: object) -> bool:
        """Whether the command does anything."""
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="kempnerforge"):
            assert call(*argv, "--train.max_steps=2", *more).code == 0
        return not any("complete, 2 steps" in line for line in caplog.messages)

    assert not again() and not again("--checkpoint.keep_last_n=7", f"--run.dir={run}/../run") and results(run) == two
    for name in ("summary.json", "report.html", "complete.json"):
        (run / name).write_text((run / name).read_text().replace("2", "3"))
        assert again() and not again(), name
        assert (run / "summary.json").read_bytes() == two[0], "evaluated anew, to the same result"
    assert again("--eval.max_new_tokens=3") and not again("--eval.max_new_tokens=3")
    with monkeypatched(Evaluation, "finish", KeyboardInterrupt):
        assert call(*argv, "--train.max_steps=4").code == 130
    assert not any((run / name).exists() for name in ("summary.json", "report.html", "complete.json")), "those of two steps are gone"
    assert call(*argv, "--train.max_steps=4").code == 0 and json.loads((run / "summary.json").read_text())["steps"] == 4
    shutil.rmtree(run / "checkpoints")
    before = everything(run)
    ended = call(*argv, "--train.max_steps=4")
    assert ended.code == 2 and "holds a complete run, whose checkpoints are gone" in ended.err and everything(run) == before


@contextmanager
def monkeypatched(owner: type, name: str, error: type[BaseException]) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        yield


# ---- copies that anybody may edit ------------------------------------------------------------------------------------


def plan(text: str) -> list[str]:
    """Without what a test changes: where the run is and how long."""
    return [line for line in text.splitlines() if not line.startswith(("dir = ", "max_steps = "))]


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("config.toml", "lr = 0.002", "lr = 0.02", "optimizer.lr: 0.02 -> 0.002"),
        ("config.toml", "seed = 0", "seed = 7", "train.seed: 7 -> 0"),
        ("tokenizer/tokenizer.json", '"content": "<eos>"', '"content": "<end>"', "+"),
    ],
)
def test_an_edited_copy_is_shown_and_refused(file: str, old: str, new: str, told: str, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun / "run", run := tmp_path / "run")
    text = (run / file).read_text()
    assert old in text
    (run / file).write_text(text.replace(old, new, 1))
    before = everything(run)
    argv = ("train", begun / "job.toml", f"--run.dir={run}", "--train.max_steps=5", "--eval.at_end=false", "--allow-change=train.max_steps")
    ended = call(*argv)
    assert ended.code == 2 and everything(run) == before, ended
    assert f"{run / Path(file).parts[0]}: is not the one of the run, by its checkpoint step-00000004" in ended.err and told in ended.err
    shutil.rmtree(run / "tokenizer")
    (run / "config.toml").unlink()
    assert call(*argv).code == 0 and plan((run / file).read_text()) == plan(text), "written again"


@pytest.mark.parametrize("file", ["config.toml", "tokenizer/tokenizer.json"])
def test_a_damaged_copy_is_moved_aside_and_written_again(file: str, begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(begun / "run", run := tmp_path / "run")
    text = (run / file).read_text()
    (run / file).write_bytes(b"\xff\0{")
    argv = ("train", begun / "job.toml", f"--run.dir={run}", "--train.max_steps=5", "--eval.at_end=false", "--allow-change=train.max_steps")
    assert call(*argv).code == 0 and plan((run / file).read_text()) == plan(text)
    (aside,) = run.glob(f"{Path(file).parts[0]}.2*")
    assert f"moved to {aside}" in caplog.text
    assert ((aside / Path(file).name) if aside.is_dir() else aside).read_bytes() == b"\xff\0{"


# ---- what a checkpoint says of itself --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": 3}, "step = 3 in a checkpoint of step 4"),
        ({"step": "4"}, 'step = "4": must be an integer'),
        ({"step": True}, "step = true: must be an integer"),
        ({"seconds": -1.0}, "seconds = -1.0: must be at least 0"),
        ({"samples_seen": -1}, "samples_seen = -1"),
        ({"samples_bad": 99}, "samples_bad = 99: of 16 samples"),
        ({"samples_of": {"a": "x"}}, 'samples_of.a = "x": must be an integer'),
        ({"frozen": "all"}, 'frozen = "all": must be an array'),
        ({"data": {"train": 3}}, "data.train = 3: must be a string"),
        ({"asked": {"place": "nowhere"}}, "place = 'nowhere': allowed are front, head, tail"),
        ({"history": [{"start": 9, "config": {}, "plugins": []}]}, "history: spans that start at [9] in a run of 4 steps"),
        ({"history": [{"start": 0, "plugins": []}]}, "history[0].config: missing"),
        ({"more": 1}, "more = 1: unknown key"),
    ],
)
def test_the_state_of_a_manifest_is_checked(change: dict, told: str, begun: Path, tmp_path: Path) -> None:
    """With checksums that are right."""
    shutil.copytree(begun / "run", run := tmp_path / "run")
    (path,) = (p for p in (run / "checkpoints").glob("step-*") if p.name == "step-00000004")
    for other in (run / "checkpoints").glob("step-*"):
        if other != path:
            shutil.rmtree(other)
    kept = verify(path)
    (path / "manifest.json").write_bytes(replace(kept, state=kept.state | change).encode())
    before = everything(run)
    for argv in (
        ("train", begun / "job.toml", f"--run.dir={run}", "--train.max_steps=4"),
        ("generate", run, begun / "0.png", "--prompt", "what?"),
    ):
        ended = call(*argv)
        assert ended.code == (3 if argv[0] == "train" else 2) and told in ended.err and str(path) in ended.err, ended
    assert everything(run) == before


def test_what_a_machine_changes_is_said(begun: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    shutil.copytree(begun / "run", run := tmp_path / "run")
    argv = ("train", begun / "job.toml", f"--run.dir={run}", "--scheduler.name=constant", "--eval.at_end=false", "--allow-change=scheduler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert call(*argv, "--train.max_steps=5").code == 0
    assert "-> 77; bitwise the same as without the break is not promised" in caplog.text
    caplog.clear()
    assert call(*argv, "--train.max_steps=6").code == 0 and "not as before" not in caplog.text, "from here on that is how it was"
    history = RunState.of(verify(resolve(run))).history
    assert [entry.machine["threads"] == "77" for entry in history] == [False, True, True] and history[0].machine[
        "compute dtype"
    ] == "float32"
    assert {"torch", "python", "numpy", "pillow", "tokenizers"} <= history[0].versions.keys()
