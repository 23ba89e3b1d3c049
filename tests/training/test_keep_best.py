"""``checkpoint.keep_best``: which step is kept, that it is the same when a run is continued, and how it is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kempnerforge.checkpoint import CheckpointError, resolve, verify
from tests.training.tiny import call, checkpoint_steps, make_job

pytestmark = pytest.mark.usefixtures("plugins_are_forgotten")
PLUGIN = """
from dataclasses import dataclass

from kempnerforge.config import HookConfig, registry
from kempnerforge.eval.task import Found, Task
from kempnerforge.training.trainer import Hook

SCORES = {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.5, 5: 0.2, 6: 0.4}
NOW = {}


@registry.register_task("scripted")
@dataclass
class Scripted(Task):
    def measure(self, exam):
        return Found({"eval/scripted": SCORES[NOW["trainer"].step]})


@registry.register_hook_config
@dataclass
class FailsConfig(HookConfig):
    type: str = "fails"


@registry.register_hook("fails")
class Fails(Hook):
    def __init__(self, cfg, run_dir):
        self.once = run_dir.parent / "once"

    def start(self, trainer):
        NOW["trainer"] = trainer

    def step(self, trainer, result):
        if trainer.step == 5 and self.once.exists():
            self.once.unlink()
            raise OSError("pulled the plug")
"""
EXTRA = """keep_last_n = 1
keep_best = "eval/scripted"

[eval]
interval = 1
tasks = ["scripted"]
exact_match = false

[[hooks]]
type = "fails"
"""


def a_job(folder: Path, words: str = "") -> Path:
    """Six steps, saved at 2, 4 and 6."""
    job = make_job(folder)
    (folder / "plugin.py").write_text(PLUGIN)
    text = job.read_text().replace("[checkpoint]\n", "[checkpoint]\n" + words)
    checkpoint, metrics = text.index("interval = 2\n"), text.index("[metrics]")
    job.write_text('plugins = ["plugin.py"]\n' + text[:checkpoint] + "interval = 2\n" + EXTRA + "\n" + text[metrics:])
    return job


def manifest_of(run: Path, step: int) -> dict[str, object]:
    return verify(run / "checkpoints" / f"step-{step:08d}").state


def test_the_best_step_stays_and_is_named(tmp_path: Path) -> None:
    """The first of two equal scores; also when the run is continued after a fault between them and the end."""
    for name in ("whole", "broken"):
        job, run = a_job(tmp_path / name), tmp_path / name / "run"
        if name == "broken":
            (tmp_path / name / "once").touch()
            with pytest.raises(OSError, match="pulled the plug"):
                call("train", job)
            assert checkpoint_steps(run) == [2, 4]
        ended = call("train", job)
        assert ended.code == 0, ended
        assert checkpoint_steps(run) == [2, 6] and (run / "checkpoints" / "best").read_text() == "step-00000002\n"
        best = {"key": "eval/scripted", "best_is": "highest", "step": 2, "score": 0.5}
        assert manifest_of(run, 2)["best"] == manifest_of(run, 6)["best"] == best
        assert json.loads((run / "summary.json").read_text())["best_checkpoint"] == "step 2: eval/scripted = 0.5"
        assert "step 2: eval/scripted = 0.5" in (run / "report.html").read_text()
    ended = call("generate", run / "checkpoints" / "best", tmp_path / "whole" / "0.png", "--prompt", "what?", "--json", "--trust-plugins")
    assert ended.code == 0 and json.loads(ended.out)["checkpoint"].endswith("step-00000002"), ended
    assert resolve(run / "checkpoints" / "latest") == run / "checkpoints" / "step-00000006"
    (run / "checkpoints" / "best").write_text("../../elsewhere\n")
    with pytest.raises(CheckpointError, match="names no checkpoint: '../../elsewhere'"):
        resolve(run / "checkpoints" / "best")


def test_the_lowest_score_at_a_step_that_is_not_saved_otherwise(tmp_path: Path) -> None:
    """Steps are saved at 2, 4 and 6; the best is step 1."""
    job, run = a_job(tmp_path, words='best_is = "lowest"\n'), tmp_path / "run"
    assert call("train", job).code == 0
    assert checkpoint_steps(run) == [1, 6] and resolve(run / "checkpoints" / "best").name == "step-00000001"


def test_the_last_evaluation_counts(tmp_path: Path) -> None:
    """Without evaluations on the way the end is the best there is."""
    job, run = a_job(tmp_path), tmp_path / "run"
    assert call("train", job, "--eval.interval=0").code == 0
    assert checkpoint_steps(run) == [6] and resolve(run / "checkpoints" / "best").name == "step-00000006"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--checkpoint.keep_best=eval/scriptd"],
            "keep_best = 'eval/scriptd': must begin with the name of a score: eval/exact_match, eval/loss",
        ),
        (["--checkpoint.keep_best=eval/scriptedx"], "keep_best = 'eval/scriptedx': must begin with the name of a score"),
        (["--eval.interval=0", "--eval.at_end=false"], "keep_best = 'eval/scripted': nothing is evaluated; set eval.interval"),
        (["--checkpoint.keep_best=", "--checkpoint.best_is=lowest"], "best_is = 'lowest': only keep_best reads it"),
        (["--checkpoint.best_is=largest"], "best_is = 'largest': allowed are 'highest', 'lowest'"),
    ],
)
def test_what_cannot_be_kept_is_refused(words: list[str], says: str, tmp_path: Path) -> None:
    ended = call("check", a_job(tmp_path), *words)
    assert ended.code == 2 and says in ended.err, ended.err


def test_a_score_that_is_not_measured_ends_the_run(tmp_path: Path) -> None:
    ended = call("train", a_job(tmp_path), "--checkpoint.keep_best=eval/scripted_f1")
    assert ended.code == 2 and "keep_best = 'eval/scripted_f1': is no score of this evaluation; there are eval/scripted" in ended.err
