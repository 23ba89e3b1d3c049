"""Stopped, killed, continued: the same weights and the same metrics as a run that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from kempnerforge.training.hooks.metrics import keep_until
from tests.params import quick
from tests.processes import Forked
from tests.training.tiny import (
    assert_same_tensors,
    call,
    checkpoint_steps,
    make_job,
    metrics,
    rows_of,
    spawn,
    start,
    tensors,
    write_rows,
)

STAGES = """
[[stages]]
name = "captions"
steps = {first}
data.path = "{folder}/captions.jsonl"
data.prompt_column = ""
scheduler.warmup_steps = 2
freeze = [{ module = "transformer.layers.0.*" }]

[[stages]]
name = "questions"
steps = {second}
train.batch_size = 2
data.batching = "pad"
optimizer.lr = 1e-3
optimizer.lr_scale = { vision_encoder = 0.5 }
freeze = [{ module = "vision_encoder.layers.0.*" }]
"""
"""Different data, batch size, batching, learning rate and freezing."""


def staged(folder: Path, first: int, second: int) -> Path:
    text = STAGES.replace("{first}", str(first)).replace("{second}", str(second)).replace("{folder}", str(folder))
    job = make_job(folder, extra=text)
    write_rows(folder / "captions.jsonl", [row | {"answer": row["answer"] * (1 + k % 3)} for k, row in enumerate(rows_of(folder))])
    return job


def assert_same_run(run: Path, reference: Path) -> None:
    assert metrics(run) == metrics(reference)
    assert_same_tensors(tensors(run), tensors(reference))
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, reference))
    assert ours | {"train_s": 0} == theirs | {"train_s": 0}


def wait_for_lines(process: Forked, run: Path, count: int) -> None:
    """Until metrics.jsonl has ``count`` lines or the process has ended."""
    path, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and (not path.exists() or path.read_text().count("\n") < count):
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.005)


# ---- cut short, at every step ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 4 + 4 steps that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    ended = call("train", staged(folder, 4, 4), "--optimizer.name=muon", "--train.max_steps=0", "--eval.interval=3")
    assert ended.code == 0, ended
    return folder


@pytest.mark.parametrize("cut", quick(range(1, 8), 4))
def test_cut_short_and_continued_equals_never_cut(cut: int, whole: Path):
    """Before, at and after the change of stage; at a step with a checkpoint and between."""
    argv = ("train", whole / "job.toml", "--optimizer.name=muon", "--eval.interval=3", f"--run.dir={whole}/cut{cut}")
    assert call(*argv, f"--train.max_steps={cut}", "--eval.at_end=false").code == 0
    assert checkpoint_steps(whole / f"cut{cut}")[-1] == cut
    ended = call(*argv, "--train.max_steps=0")
    assert ended.code == 0, ended
    assert_same_tensors(tensors(whole / f"cut{cut}"), tensors(whole / "run"))
    shared = [row for row in metrics(whole / "run") if "train/loss" in row]
    assert [row for row in metrics(whole / f"cut{cut}") if "train/loss" in row] == shared


def test_workers_change_nothing(whole: Path):
    argv = ("train", whole / "job.toml", "--optimizer.name=muon", "--eval.interval=3", f"--run.dir={whole}/workers")
    assert call(*argv, "--train.max_steps=5", "--data.num_workers=2").code == 0
    (whole / "workers" / "report.html").unlink()
    assert call(*argv, "--train.max_steps=0", "--data.num_workers=1").code == 0
    assert_same_tensors(tensors(whole / "workers"), tensors(whole / "run"))


def test_a_complete_run_is_left_alone(whole: Path):
    def state() -> dict[str, tuple[bytes, int]]:
        files = [path for path in (whole / "run").rglob("*") if path.is_file() and path.name != "config.toml"]
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before, config = state(), (whole / "run" / "config.toml").read_bytes()
    ended = call("train", whole / "job.toml", "--optimizer.name=muon", "--train.max_steps=0", "--eval.interval=3")
    assert ended.code == 0 and state() == before and (whole / "run" / "config.toml").read_bytes() == config


# ---- signals and kills -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signals_save_and_the_same_command_continues(tmp_path: Path):
    argv = ("train", staged(tmp_path, 40, 40), "--train.max_steps=0", "--checkpoint.interval=0", "--eval.interval=50")
    assert call(*argv, f"--run.dir={tmp_path}/reference").code == 0
    for number, lines in ((signal.SIGTERM, 10), (signal.SIGINT, 50)):
        process = start(*argv)
        wait_for_lines(process, tmp_path / "run", lines)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == (-number if number == signal.SIGINT else 130), err  # a shell says 130 of both
        assert f"{number.name}: saving, then stopping; the run can be continued" in err and "Traceback" not in err
        done = metrics(tmp_path / "run")[-1]["step"]
        assert lines - 2 <= done < 80 and checkpoint_steps(tmp_path / "run")[-1] == done
        assert not (tmp_path / "run" / "report.html").exists()
    ended = spawn(*argv)
    assert ended.code == 0 and f"continuing at step {done} of 80" in ended.err
    assert_same_run(tmp_path / "run", tmp_path / "reference")


def kill_at_random(folder: Path, kills: int, seed: int, *more: str) -> None:
    """A run that is killed ``kills`` times equals one that is not."""
    rng = random.Random(seed)
    argv = ("train", staged(folder, 8 * kills, 10 * kills), "--train.max_steps=0", "--checkpoint.interval=2", "--eval.interval=12")
    assert call(*argv, f"--run.dir={folder}/reference").code == 0
    argv += more
    run = folder / "run"
    for _ in range(kills):
        lines = (run / "metrics.jsonl").read_text().count("\n") if (run / "metrics.jsonl").exists() else 0
        process = start(*argv)
        wait_for_lines(process, run, lines + rng.randint(0, 6))
        time.sleep(rng.random() * 0.06)  # in a step, in the middle of a checkpoint, in an evaluation
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the run was over too early: {err}"
    ended = spawn(*argv)
    assert ended.code == 0, ended.err
    assert_same_run(run, folder / "reference")
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".tmp")]


@pytest.mark.slow
def test_three_kills(tmp_path: Path):
    kill_at_random(tmp_path, 3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--checkpoint.in_background=true",)], ids=["", "in background"])
def test_ten_kills(more: tuple[str, ...], tmp_path: Path):
    kill_at_random(tmp_path, 10, 1 + len(more), *more)


def test_a_kill_after_the_last_step_repeats_the_evaluation_alone(tmp_path: Path):
    """What a kill between the last checkpoint and the report leaves."""
    job = make_job(tmp_path)
    assert call("train", job).code == 0
    run = tmp_path / "run"
    before, weights = metrics(run), tensors(run)
    for lines in (len(before), len(before) - 1):  # after the evaluation's line, and before it
        (run / "report.html").unlink()
        (run / "summary.json").unlink()
        whole = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(whole[:lines]))
        ended = call("train", job)
        assert ended.code == 0 and metrics(run) == before and (run / "report.html").exists()
        assert_same_tensors(tensors(run), weights)


def test_a_broken_checkpoint_is_named_and_passed_over(tmp_path: Path):
    argv = ("train", make_job(tmp_path), "--checkpoint.keep_last_n=3")
    assert call(*argv, f"--run.dir={tmp_path}/reference").code == 0
    assert call(*argv).code == 0
    run = tmp_path / "run"
    (run / "report.html").unlink()
    newest = next((run / "checkpoints" / "step-00000006").glob("*.distcp"))
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    ended = call(*argv)
    assert ended.code == 0, ended
    assert_same_run(run, tmp_path / "reference")


def test_when_all_checkpoints_are_broken_nothing_starts_over(tmp_path: Path):
    job = make_job(tmp_path)
    assert call("train", job).code == 0
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
        path.write_text("{}")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    ended = call("train", job)
    assert ended.code == 3 and "none of the 2 checkpoints" in ended.err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


# ---- the same run? ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--optimizer.lr=1e-4", "  optimizer.lr: 0.002 -> 0.0001"),
        ("--model.dim=64", "  model.dim: 32 -> 64"),
        ("--train.seed=1", "  train.seed: 0 -> 1"),
        ("--vlm.arch=mot", "  vlm.arch: 'joint_decoder' -> 'mot'"),
    ],
)
def test_another_config_is_refused_with_the_difference(override: str, line: str, tmp_path: Path):
    job = make_job(tmp_path)
    assert call("train", job, "--train.max_steps=2", "--eval.at_end=false").code == 0
    before = tensors(tmp_path / "run")
    ended = call("train", job, override)
    assert ended.code == 2 and line in ended.err.splitlines() and "--fresh" in ended.err, ended
    assert ended.err.startswith(f"error: run.dir = '{tmp_path}/run': holds a run with another config:")
    assert_same_tensors(tensors(tmp_path / "run"), before)


def test_edited_data_behind_the_same_path_are_noticed(tmp_path: Path):
    config, constant = make_job(tmp_path), "--scheduler.name=constant"
    assert call("train", config, constant, "--train.max_steps=2", "--eval.at_end=false").code == 0
    rows = rows_of(tmp_path)
    write_rows(tmp_path / "train.jsonl", [*rows[:5], rows[5] | {"answer": "purple"}, *rows[6:]])
    ended = call("train", config, constant)
    assert ended.code == 2 and "data are no longer those that the run was begun with (train)" in ended.err, ended
    assert call("train", config, constant, "--allow-change=data", "--train.max_steps=4", "--eval.at_end=false").code == 0
    write_rows(tmp_path / "train.jsonl", rows)
    assert "--allow-change=data" in call("train", config, constant).err, "the newest checkpoint counts"


@pytest.mark.parametrize("meant", quick(["data", "eval.text_path"], "eval.text_path"))
def test_an_edited_text_of_the_evaluation_is_noticed(meant: str, tmp_path: Path):
    """As edited data are. Another path is a change of the config, and one that may be made."""
    (text := tmp_path / "plain.txt").write_text(before := "which colour is it? it is red. " * 8)
    options = f"--eval.text_path={text}", "--eval.text_window=16", "--eval.at_end=false", "--scheduler.name=constant"
    argv = ("train", make_job(tmp_path), *options)
    assert call(*argv, "--train.max_steps=2").code == 0
    text.write_text(before.replace("red", "tan"))
    ended = call(*argv, "--train.max_steps=3")
    assert ended.code == 2 and f"(eval.text_path = '{text}')" in ended.err and "--allow-change=data" in ended.err, ended
    assert call(*argv, "--train.max_steps=3", "--allow-change=optimizer").code == 2
    assert call(*argv, "--train.max_steps=3", f"--allow-change={meant}").code == 0
    assert call(*argv, "--train.max_steps=4").code == 0
    text.write_text(before)
    (other := tmp_path / "other.txt").write_text(before)
    assert call(*argv, "--train.max_steps=5").code == 2
    assert call(*argv, "--train.max_steps=5", f"--eval.text_path={other}").code == 0


def test_what_does_not_touch_learning_may_change(tmp_path: Path):
    job = make_job(tmp_path)
    assert call("train", job, "--train.max_steps=2", "--eval.at_end=false", "--scheduler.name=constant").code == 0
    changed = (
        "--scheduler.name=constant",
        "--eval.interval=1",
        "--checkpoint.interval=1",
        "--metrics.interval=2",
        "--checkpoint.keep_last_n=9",
        "--train.grad_accum_steps=2",
    )
    ended = call("train", job, "--train.max_steps=4", *changed)
    assert ended.code == 0 and checkpoint_steps(tmp_path / "run") == [2, 3, 4]
    assert "interval = 1" in (tmp_path / "run" / "config.toml").read_text()


def test_a_run_directory_may_move(tmp_path: Path):
    argv = ("train", make_job(tmp_path), "--scheduler.name=constant")
    assert call(*argv, "--train.max_steps=2", "--eval.at_end=false").code == 0
    shutil.move(tmp_path / "run", tmp_path / "moved")
    ended = call(*argv, f"--run.dir={tmp_path}/moved", "--train.max_steps=4")
    assert ended.code == 0 and [row["step"] for row in metrics(tmp_path / "moved") if "train/loss" in row] == [1, 2, 3, 4]


def test_an_attempt_without_a_checkpoint_does_not_bind(tmp_path: Path):
    """Data that were mended after a failed start get a tokenizer of their own."""
    job = make_job(tmp_path)
    rows = rows_of(tmp_path)
    write_rows(tmp_path / "train.jsonl", [row | {"image": "gone.png"} for row in rows])
    assert call("train", job).code == 2
    write_rows(tmp_path / "train.jsonl", [row | {"prompt": "zebra zebra zebra?"} for row in rows])
    assert call("train", job, "--data.tokenizer_vocab_size=320").code == 0
    vocabulary = json.loads((tmp_path / "run" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("zebra" in token for token in vocabulary) and not any("what" in token for token in vocabulary)


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: Path):
    argv = ("train", make_job(tmp_path), "--train.max_steps=400", "--eval.at_end=false", "--checkpoint.interval=0")
    process = start(*argv)
    try:
        wait_for_lines(process, tmp_path / "run", 2)
        for extra in ((), ("--fresh",)):
            second = call(*argv, *extra)
            assert second.code == 3 and f"is in use by another job (pid {process.pid})" in second.err, second
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.communicate()
    assert call(*argv, "--train.max_steps=1").code in (0, 2)  # no one holds it any more


def test_fresh_moves_the_old_run_aside(tmp_path: Path):
    job = make_job(tmp_path)
    assert call("train", job, "--train.max_steps=2", "--eval.at_end=false", "--fresh").code == 0  # nothing to move
    before = tensors(tmp_path / "run")
    ended = call("train", job, "--fresh", "--model.dim=64", "--train.max_steps=2", "--eval.at_end=false")
    assert ended.code == 0, ended
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("run.")]
    assert len(aside) == 1
    assert_same_tensors(tensors(aside[0]), before)
    assert tensors(tmp_path / "run")["model.adapter.proj.bias"].shape == (64,)


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_keep_until(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    keep_until(path, 3)
    assert not path.exists()
    lines = [
        '{"step": 1, "train/loss": 1.0}',
        '{"step": 3, "train/loss": 2.0}',
        '{"step": 3, "eval/loss": 2.0}',
        '{"step": 4, "a": 1}',
        '{"step": 5, "tr',
    ]
    path.write_text("\n".join(lines))
    keep_until(path, 3)
    assert path.read_text().splitlines() == lines[:3] and path.read_text().endswith("\n")
    keep_until(path, 3, evaluates_again=True)
    assert path.read_text().splitlines() == lines[:2]
    keep_until(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    ("held_out", "named"), quick([(False, "images of train"), (True, "images of held-out data")], (True, "images of held-out data"))
)
def test_pictures_replaced_behind_an_unchanged_list_are_refused(held_out: bool, named: str, tmp_path: Path):
    """Those of the training data and those of the held-out ones; a copy of the data with other times is the same data."""
    job = make_job(tmp_path)
    if held_out:  # pictures of its own
        (tmp_path / "held.png").write_bytes((tmp_path / "3.png").read_bytes())
        write_rows(tmp_path / "test.jsonl", [{"image": "held.png", "prompt": "what?", "answer": "red"}])
    argv = ("train", job, "--scheduler.name=constant", "--eval.at_end=false")
    assert call(*argv, "--train.max_steps=2").code == 0
    changed = tmp_path / ("held.png" if held_out else "3.png")
    before = changed.read_bytes()
    os.utime(changed, ns=(1, 1))
    assert call(*argv, "--train.max_steps=3").code == 0
    changed.write_bytes((tmp_path / "4.png").read_bytes())
    os.utime(changed, ns=(1, 1))
    ended = call(*argv, "--train.max_steps=4")
    assert ended.code == 2 and f"({named})" in ended.err and "--allow-change=data" in ended.err, ended
    changed.write_bytes(before)
    assert call(*argv, "--train.max_steps=4").code == 0
    changed.write_bytes((tmp_path / "4.png").read_bytes())
    assert call(*argv, "--train.max_steps=5", "--allow-change=data").code == 0
