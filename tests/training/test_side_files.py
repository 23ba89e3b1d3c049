"""Files beside the checkpoints of a run that are damaged: they are named and mended, and the run goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kempnerforge.util.files import read_objects
from tests.training.test_resume import assert_same_run
from tests.training.tiny import call, make_job, metrics, rows_of, write_rows

COMMAND = ("train", "--data.max_bad_fraction=0.9", "--scheduler.name=constant")
NAMES = ("metrics.jsonl", "bad_samples.jsonl")
DAMAGE = {
    "not UTF-8": b"\xff\xfe\x00\n",
    "not JSON": b'{"step": 1, "id": "x", \n',
    "a brace alone": b"}\n",
    "nested deeply": b"[" * 100_000 + b"\n",
    "other JSON": b'["step", "id"]\n',
    "without what it needs": b'{"other": 1}\n',
    "of another type": b'{"step": "1", "id": null}\n',
    "zeros": bytes(4096) + b"\n",
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after two of six steps, with a bad sample, and of one that was not."""
    folder = tmp_path_factory.mktemp("side")
    make_job(folder)
    write_rows(folder / "train.jsonl", [*rows_of(folder, 3), {"image": "none.png", "prompt": "what?", "answer": "red"}])
    assert call(*COMMAND, folder / "job.toml").code == 0
    assert call(*COMMAND, folder / "job.toml", f"--run.dir={folder}/cut", "--train.max_steps=2", "--eval.at_end=false").code == 0
    assert (folder / "cut" / "bad_samples.jsonl").read_text().count("\n") == 1
    return folder


def goes_on(cut: Path, run: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the same command warns of in the damaged ``run``."""
    ended = call(*COMMAND, cut / "job.toml", f"--run.dir={run}")
    assert ended.code == 0, ended
    assert (run / "bad_samples.jsonl").read_text() == (cut / "run" / "bad_samples.jsonl").read_text()
    return [record.getMessage() for record in caplog.records if record.name == "kempnerforge" and record.levelname == "WARNING"]


def test_damaged_lines_are_named_and_left_out(cut: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was there is kept, and the run ends as if nothing had happened to it."""
    shutil.copytree(cut / "cut", run := tmp_path / "run")
    damaged = {name: b"".join(DAMAGE.values()) + (run / name).read_bytes() for name in NAMES}
    for name, content in damaged.items():
        (run / name).write_bytes(content)
    said = goes_on(cut, run, caplog)
    assert_same_run(run, cut / "run")
    for name, content in damaged.items():
        (kept,) = run.glob(f"{name}.2*")
        assert kept.read_bytes() == content
        assert f"{run / name}: line 1 and {len(DAMAGE) - 1} more cannot be read and are left out; the file as it was is {kept.name}" in said


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage(kind: str, tmp_path: Path) -> None:
    (path := tmp_path / "rows.jsonl").write_bytes(b'{"step": 1}\n' + DAMAGE[kind] + b'\n{"step": 2, "id": "x"}\n{"step": 3, "i')
    assert read_objects(path, "step", int) == ([{"step": 1}, {"step": 2, "id": "x"}], [2])


def test_edited_metrics_are_noticed(cut: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Lines that could be this run's, but are not."""
    for edit in ("changed", "left out", "as it was"):
        shutil.copytree(cut / "cut", run := tmp_path / edit)
        first, *rest = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        changed = json.dumps(json.loads(first) | {"train/loss": 0.5}) + "\n"
        lines = {"changed": [changed, *rest], "left out": rest, "as it was": [first, *rest]}[edit]
        (run / "metrics.jsonl").write_text("".join(lines))
        caplog.clear()
        said = f"{run}/metrics.jsonl: is not what this run had written by step 2; the report shows it as it is"
        assert (said in goes_on(cut, run, caplog)) == (edit != "as it was")


def test_an_evaluation_after_the_last_save_is_no_edit(cut: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that was cut short is evaluated after its last save, and goes on without a warning."""
    run = tmp_path / "run"
    assert call(*COMMAND, cut / "job.toml", f"--run.dir={run}", "--train.max_steps=2").code == 0
    assert "eval/exact_match" in metrics(run)[-1]
    caplog.clear()
    assert not goes_on(cut, run, caplog)


def test_a_line_that_a_kill_cut_off_is_none(cut: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(cut / "cut", run := tmp_path / "run")
    for name in NAMES:
        with (run / name).open("ab") as file:
            file.write(b'{"step": 2, "id": "x')
    assert not goes_on(cut, run, caplog) and not list(run.glob("*.jsonl.2*"))


def test_what_is_no_file_is_moved_aside(cut: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(cut / "cut", run := tmp_path / "run")
    for name in NAMES:
        (run / name).unlink()
        (run / name).mkdir()
    said = goes_on(cut, run, caplog)
    for name in NAMES:
        (aside,) = run.glob(f"{name}.2*")
        assert f"{run / name}: is a directory; only regular files are read; moved to {aside.name}" in said and aside.is_dir()
    assert metrics(run) == [row for row in metrics(cut / "run") if row["step"] > 2]
