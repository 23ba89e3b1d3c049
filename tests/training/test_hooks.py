"""What a run writes beside its checkpoints, and when it evaluates."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kempnerforge.config import load_config
from kempnerforge.training.hooks import evaluation
from kempnerforge.training.hooks.console import ConsoleProgress
from kempnerforge.training.hooks.evaluation import Evaluation, Voting
from kempnerforge.training.hooks.signals import Signals
from kempnerforge.training.trainer import Hook, StepResult, Trainer
from kempnerforge.util.process import STOPS
from tests.training.tiny import CONFIG, a_trainer, call, make_job, metrics, write_config

TRAIN_KEYS = {
    "step", "train/loss", "train/grad_norm", "train/lr", "train/tokens_per_s", "train/images_per_s", "train/step_s", "train/elapsed_s",
    "train/stage", "train/skipped_steps", "data/samples", "data/bad_samples", "data/texts_left_out",
}  # fmt: skip

EVAL_KEYS = {"step", "eval/exact_match", "eval/exact_match_blind", "eval/questions", "eval/unreadable", "eval/too_long", "eval/cut"}


@dataclass
class Line:
    """Steps of the two kinds of lines in metrics.jsonl."""

    train: list[int] = field(default_factory=list)
    evaluation: list[int] = field(default_factory=list)


def lines_of(run: Path) -> Line:
    found = Line()
    for row in metrics(run, timing=True):
        (found.train if "train/loss" in row else found.evaluation).append(int(row["step"]))
    return found


def test_lines_of_metrics_their_keys_and_when_they_come(tmp_path: Path):
    ended = call("train", make_job(tmp_path), "--metrics.interval=4", "--eval.interval=3", "--train.max_steps=10", "--eval.samples=3")
    assert ended.code == 0, ended
    rows = metrics(tmp_path / "run", timing=True)
    for row in rows:
        assert set(row) in (TRAIN_KEYS, EVAL_KEYS)
    assert lines_of(tmp_path / "run") == Line(train=[4, 8, 10], evaluation=[3, 6, 9, 10])
    assert [row["eval/questions"] for row in rows if "eval/questions" in row] == [3, 3, 3, 8]  # all of them at the end
    train = [row for row in rows if "train/loss" in row]
    assert [row["data/samples"] for row in train] == [16, 32, 40]
    elapsed = [row["train/elapsed_s"] for row in train]
    assert elapsed == sorted(elapsed) and elapsed[-1] == pytest.approx(
        4 * train[0]["train/step_s"] + 4 * train[1]["train/step_s"] + 2 * train[2]["train/step_s"]
    )


def test_the_rate_of_muon_is_recorded_beside_that_of_the_rest(tmp_path: Path):
    stages = '[[stages]]\nname = "a"\nsteps = 2\n[[stages]]\nname = "b"\nsteps = 2\noptimizer.lr = 1e-4\n'
    job = make_job(tmp_path, extra=stages)
    argv = ("--optimizer.name=muon", "--optimizer.muon_lr=0.03", "--train.max_steps=0", "--scheduler.name=constant", "--eval.at_end=false")
    assert call("train", job, *argv).code == 0
    rates = [(row["train/lr"], row["train/muon_lr"]) for row in metrics(tmp_path / "run")]
    assert rates == [(2e-3, 0.03)] * 2 + [(1e-4, 0.03)] * 2


def test_rates_count_useful_tokens_alone(tmp_path: Path):
    """With rows padded to their full length, padding is not throughput."""
    assert call("train", make_job(tmp_path), "--data.batching=pad", "--eval.at_end=false").code == 0
    for row in metrics(tmp_path / "run", timing=True):
        assert row["train/images_per_s"] * row["train/step_s"] == pytest.approx(4)
        tokens = row["train/tokens_per_s"] * row["train/step_s"]
        assert tokens == pytest.approx(round(tokens)) and 4 * 4 < tokens < 4 * 30  # of 4 x 52 positions


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (("--eval.interval=2", "--eval.at_end=false"), [2, 4, 6]),
        (("--eval.interval=0", "--eval.at_end=false"), []),
        (("--eval.interval=6",), [6]),
        (("--eval.interval=2", "--data.eval_path="), []),
    ],
)
def test_when_it_is_evaluated(overrides: tuple[str, ...], steps: list[int], tmp_path: Path):
    assert call("train", make_job(tmp_path), *overrides).code == 0
    assert lines_of(tmp_path / "run").evaluation == steps
    assert (tmp_path / "run" / "report.html").exists()


def test_without_blind_evaluation(tmp_path: Path):
    assert call("train", make_job(tmp_path), "--eval.blind=false").code == 0
    assert "eval/exact_match_blind" not in metrics(tmp_path / "run")[-1]
    assert "exact_match_blind" not in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_summary_and_report(tmp_path: Path):
    job = make_job(tmp_path)
    (tmp_path / "2.png").write_bytes(b"spoiled after it was listed")
    assert call("train", job, "--data.max_bad_fraction=0.5").code == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    last = [row for row in metrics(run, timing=True) if "train/loss" in row][-1]
    assert summary["arch"] == "joint_decoder" and summary["steps"] == 6 and summary["world_size"] == 1
    assert summary["train_s"] == pytest.approx(last["train/elapsed_s"]) and summary["samples"] == 24
    assert (summary["questions"], summary["unreadable"], summary["too_long"]) == (7, 1, 0)  # the spoiled one cannot be asked
    # of the questions about the left side most answers in training are one colour, of the right side likewise
    assert 0 < summary["question_only_prior"] < 1
    page = (run / "report.html").read_text()
    assert (
        page.count("data:image/") >= 7 and "what is on the left?" in page and "max_text_len = 48" in page and "1 could not be asked" in page
    )
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_held_out_loss_where_there_is_nothing_to_ask(tmp_path: Path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat.\n" * 30)
    (tmp_path / "held.txt").write_text("the mat sat on the cat.\n" * 5)
    config = CONFIG.split("[vision_encoder]")[0] + "[data]" + CONFIG.split("[data]")[1]
    config = config.replace('source = "jsonl"', 'source = "text"').replace('prompt_column = "prompt"\n', "")
    config = (
        config.replace("train.jsonl", "text.txt").replace("test.jsonl", "held.txt").replace("seq_len = 64\nmixed", "seq_len = 16\nmixed")
    )
    job = write_config(tmp_path, config=config)
    assert call("train", job, "--eval.interval=2", "--train.max_steps=5").code == 0
    rows = [row for row in metrics(tmp_path / "run") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 5] and rows[0]["eval/loss"] < math.log(300) + 0.2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["arch"] == "text_only" and summary["loss"] == rows[-1]["eval/loss"]
    found = json.loads(call("eval", tmp_path / "run", "--json").out)
    assert found["loss"] == pytest.approx(summary["loss"], rel=1e-6)


@pytest.mark.parametrize("held_out", [True, False])
def test_perplexity_of_plain_text(held_out: bool, tmp_path: Path):
    job = make_job(tmp_path)
    (text := tmp_path / "plain.txt").write_text("which colour is it? it is red. " * 8)
    more = [f"--eval.text_path={text}", "--eval.text_window=16", *([] if held_out else ["--data.eval_path="])]
    assert call("train", job, "--eval.interval=2", "--train.max_steps=3", *more).code == 0
    rows = [row for row in metrics(tmp_path / "run") if "eval/text_perplexity" in row]
    assert [row["step"] for row in rows] == [2, 3] and all(1 < row["eval/text_perplexity"] < 600 for row in rows)
    assert ("eval/exact_match" in rows[0]) is held_out
    ended = call("eval", tmp_path / "run", "--json", f"--eval.text_path={text}")
    assert json.loads(ended.out)["text_perplexity"] == pytest.approx(rows[-1]["eval/text_perplexity"], rel=1e-5)
    assert "Plain text" in (tmp_path / "run" / "report.html").read_text()


def test_plain_text_that_is_not_there(tmp_path: Path):
    job = make_job(tmp_path)
    ended = call("train", job, f"--eval.text_path={tmp_path / 'none.txt'}", "--eval.text_window=8")
    assert ended.code == 2 and "eval.text_path" in ended.err and "none.txt" in ended.err
    ended = call("train", job, "--eval.text_window=8")
    assert ended.code == 2 and "text_window = 8: only text_path reads it" in ended.err
    ended = call("train", job, "--eval.text_path=x", "--eval.text_window=65")
    assert ended.code == 2 and "text_window = 65: must be at most model.max_seq_len = 64" in ended.err


def test_console_time_left_after_a_restart_and_a_bad_loss(capsys: pytest.CaptureFixture[str]):
    """Rates come from this process's own steps, and one loss that is not a number does not stay."""
    console = ConsoleProgress()
    stage: Any = SimpleNamespace(name="train", index=0)
    trainer: Any = SimpleNamespace(world=SimpleNamespace(is_main=True), step=900, total_steps=1000, done=False, stage=stage)
    console.start(trainer)
    result: Any = SimpleNamespace(stage=stage, loss=2.0, counts=SimpleNamespace(tokens=100, images=10), seconds=0.5, skipped=False)
    console.step(trainer, result)
    console.step(trainer, SimpleNamespace(**{**vars(result), "loss": math.nan, "skipped": True}))  # type: ignore[arg-type]
    trainer.step, trainer.done = 1000, True
    console.step(trainer, result)
    first, bad, last = capsys.readouterr().err.splitlines()
    assert first == "train 900/1000  loss 2.0000  200 tokens/s  20 images/s  50 s left"
    assert "not finite" in bad and last == "train 1000/1000  loss 2.0000  200 tokens/s  20 images/s  0 s left"


def test_handlers_are_given_back_after_an_interrupted_run(tmp_path: Path):
    class Interrupt(Hook):
        def step(self, trainer: Trainer, result: StepResult) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    def run(ends_process: bool) -> list[bool]:
        before = {number: signal.getsignal(number) for number in STOPS}
        with a_trainer(load_config(make_job(tmp_path)), [Signals(tmp_path / "run", ends_process), Interrupt()]) as trainer:
            trainer.fit()
            assert trainer.stopping and trainer.step == 2  # the vote of step 2 hears of it
        return [signal.signal(number, handler) is handler for number, handler in before.items()]

    assert all(run(ends_process=False)) and not any(run(ends_process=True))


@pytest.mark.parametrize(
    ("options", "asked"),
    [((), 1), (("--eval.exact_match=false",), 2), (("--data.eval_path=", "--eval.text_path={text}", "--eval.text_window=16"), 3)],
)
def test_every_kind_of_evaluation_is_broken_off(options: tuple[str, ...], asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Answers, losses and plain text, after a few of their tokens or batches."""
    (tmp_path / "text.txt").write_text("which colour is it? it is red. " * 800)
    votes: list[int] = []

    class Stopped(Voting):
        def sum(self, values: Sequence[float]) -> list[float]:
            votes.append(self.trainer.step)
            self.trainer.stop_requested = len(votes) > asked
            return super().sum(values)

    monkeypatch.setattr(evaluation, "Voting", Stopped)
    job = load_config(make_job(tmp_path), [option.format(text=tmp_path / "text.txt") for option in options])
    job.eval.interval = 2
    recorded: list[dict[str, float]] = []

    class Records(Hook):
        def record(self, trainer: Trainer, values: dict[str, float]) -> None:
            recorded.append(values)

    with a_trainer(job, [Evaluation(job.eval), Records()]) as trainer:
        trainer.fit()
        assert votes == [2] * (asked + 1) and trainer.stopping and trainer.unevaluated and trainer.step == 2
    assert not recorded


def test_checkpoints_that_stay(tmp_path: Path):
    assert call("train", make_job(tmp_path), "--checkpoint.keep_last_n=2", "--checkpoint.interval=1", "--eval.at_end=false").code == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-00000005", "step-00000006"]
    found = {path.name for path in (tmp_path / "run" / "checkpoints" / "step-00000006").iterdir()}
    assert {"manifest.json", "config.toml", "tokenizer"} <= found
