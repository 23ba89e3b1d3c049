"""Studies that are run: killed, stopped, with cells that fail, continued and enlarged."""

from __future__ import annotations

import csv
import json
import random
import re
import signal
import time
from pathlib import Path

import pytest

from kempnerforge.checkpoint.lock import RunLock
from kempnerforge.cli.main import run as command
from tests.dist import ROOT
from tests.processes import Forked
from tests.study.quick import drive
from tests.study.tiny import STUDY, make_study
from tests.training.tiny import CONFIG, Ended, call, end_of, environment

TUNE = """
[study.match]
quantity = "train_flops"
[study.tune]
trials = 2
validation = 0.25
keys = { "optimizer.lr" = { low = 1e-3, high = 1e-1, log = true } }
"""
EXTEND = ROOT / "docs" / "extend"
NOISY = ("seconds", "memory_gib", "latency_s")
"""Columns that two runs of one cell do not share."""


def start(*argv: object) -> Forked:
    return Forked(drive, ([str(word) for word in argv],), environment())


def study(*argv: object) -> Ended:
    return end_of(start("study", *argv), timeout=240)


def table(path: Path, *more: str) -> list[dict[str, str]]:
    """What the study has found, as its CSV file says it, without what is never the same."""
    out = path.with_suffix(".csv")
    ended = call("study", "report", path, f"--csv={out}", *more)
    assert ended.code == 0, ended.err
    with out.open() as file:
        return [{key: value for key, value in row.items() if key not in NOISY} for row in csv.DictReader(file)]


pytestmark = pytest.mark.slow  # whole studies, cell after cell; .ci/run runs the one from plan to page


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned study that ran undisturbed."""
    path = make_study(tmp_path_factory.mktemp("done"), STUDY + TUNE)
    ended = study("run", path)
    assert ended.code == 0, ended.err
    return path


def test_a_study_from_plan_to_page(done: Path):
    rows = table(done)
    assert [(row["row"], row["seed"], row["state"]) for row in rows] == [
        ("cross", "0", "finished"), ("cross", "1", "finished"), ("joint", "0", "finished"), ("joint", "1", "finished"),
    ]  # fmt: skip
    status = json.loads(call("study", "status", done, "--json").out)
    assert (status["cells"], status["trials"], status["failed"]) == ({"finished": 4}, {"finished": 4}, {})
    assert status["chosen"].keys() == {"joint", "cross"}
    page = (done.parent / "study" / "report.html").read_text()
    for said in (
        "No difference is shown between any two rows",
        "the smallest p that the sign-flip test can give is 0.5",
        "chosen",
        "p sign-flip",
    ):
        assert said in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "")


def test_what_a_cell_has_used_is_what_was_asked(done: Path):
    planned = {row["row"]: row for row in json.loads(call("study", "plan", done, "--json").out)["rows"]}
    for row in table(done):
        plan = planned[row["row"]]
        assert (int(row["steps"]), float(row["samples"])) == (plan["steps"], plan["samples"])
        assert float(row["train_flops"]) == pytest.approx(plan["train_flops"], rel=0.01)
        assert float(row["trained_tokens"]) == pytest.approx(plan["trained_tokens"], rel=0.01)


def test_rows_begin_with_the_same_weights_and_see_the_same_samples(done: Path):
    from kempnerforge.study.config import load_study
    from kempnerforge.study.findings import find
    from kempnerforge.study.results import same_weights

    findings = find(load_study(done))
    for seed, samples in findings.samples.items():
        assert samples.same and samples.compared >= 8 and len(samples.digests) == 2
        weights = same_weights([one for one in findings.results if one.seed == seed])
        assert weights.different == [] and weights.same > 20
    digests = {next(iter(samples.digests.values())) for samples in findings.samples.values()}
    assert len(digests) == 2, "seeds differ"
    assert not [line for line in findings.warnings if "began" in line or "order" in line]


def test_trials_do_not_read_the_test_split(done: Path):
    trial, cell = (done.parent / "study" / name / "config.toml" for name in ("tune/joint/trial-00", "cells/joint/seed-0"))
    assert "validation = 0.25" in trial.read_text() and "seed = 1000" in trial.read_text()
    assert "validation = 0.0" in cell.read_text()
    questions = [json.loads(line)["id"] for line in (trial.parent / "predictions.jsonl").read_text().splitlines()]
    assert len(questions) == 4 and all("train" in name for name in questions), "four of sixteen training rows"


def test_killed_at_random_moments_it_finds_the_same(done: Path, tmp_path: Path):
    """kill -9 of the study, its cells are asked to save and leave; ten times, among its trials and among its cells, and while it reports."""
    path = make_study(tmp_path, STUDY + TUNE)
    rng, cells = random.Random(7), tmp_path / "study" / "cells"
    for kill in range(10):
        process = start("study", "run", path)
        process.listen()
        while kill >= 4 and process.returncode is None and not cells.exists():
            time.sleep(0.05)
        time.sleep(rng.uniform(0.3, 1.5))
        assert process.returncode is None, "it was not over yet"
        process.kill()
        process.wait(30)
        assert cells.exists() == (kill >= 4), "four kills are among the trials, six among the cells"
    ended = study("run", path)
    assert ended.code == 0, ended.err
    for _ in range(3):
        process = start("study", "report", path, f"--csv={tmp_path / 'cut.csv'}")
        process.listen()
        time.sleep(rng.uniform(0.1, 1.0))
        process.kill()
        process.wait(30)
    assert table(path) == table(done)
    chosen = [json.loads(call("study", "status", each, "--json").out)["chosen"] for each in (path, done)]
    assert chosen[0] == chosen[1]


def test_a_finished_study_is_left_alone_and_more_seeds_can_be_added(done: Path):
    before = {file: file.stat().st_mtime_ns for file in (done.parent / "study" / "cells").rglob("metrics.jsonl")}
    ended = study("run", done, "--study.seeds=[0, 1, 5]")
    assert ended.code == 0 and "joint/seed-5: finished" in ended.err and "seed-0: starts" not in ended.err
    assert {file: file.stat().st_mtime_ns for file in before} == before
    rows = table(done, "--study.seeds=[0, 1, 5]")
    assert len(rows) == 6
    assert len(table(done)) == 4


def test_a_cell_that_fails_does_not_stop_the_others(tmp_path: Path):
    bad = STUDY.replace("[study.axes.arch]", "[study.axes.arch]\nwild.optimizer.lr = 1e9\nwild.train.max_skipped_steps = 1")
    path = make_study(tmp_path, bad.replace("seeds = [0, 1]", "seeds = [0]"))
    ended = study("run", path)
    assert ended.code == 3, ended.err
    assert "wild/seed-0: failed with exit code 3: " in ended.err and "cross/seed-0: finished" in ended.err
    status = json.loads(call("study", "status", path, "--json").out)
    assert status["cells"] == {"finished": 2, "failed": 1} and "not finite" in status["failed"]["wild/seed-0"]
    report = call("study", "report", path)
    assert "wild: the cells of seeds 0 are missing." in report.out and "wild/seed-0 has failed" in report.out


def test_stopped_by_a_signal_it_saves_and_goes_on(tmp_path: Path):
    path = make_study(tmp_path, STUDY.replace("seeds = [0, 1]", "seeds = [0]"))
    process = start("study", "run", path, "--train.max_steps=400", "--checkpoint.interval=0", "--study.keep=none")
    process.listen()
    metrics = tmp_path / "study" / "cells" / "joint" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    ended = end_of(process)
    assert ended.code == 130 and "the same command goes on" in ended.err
    assert [*(metrics.parent / "checkpoints").glob("step-*")], "the cell has saved"
    assert json.loads(call("study", "status", path, "--train.max_steps=400", "--checkpoint.interval=0", "--json").out)["cells"] == {
        "started": 1, "waiting": 1,
    }  # fmt: skip


def test_no_two_drivers_of_one_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = make_study(tmp_path)
    with RunLock(tmp_path / "study"):
        assert command(["study", "run", str(path)]) == 3
    assert "is in use by another job" in capsys.readouterr().err


def test_a_study_that_was_changed_is_refused(tmp_path: Path):
    path = make_study(tmp_path, STUDY.replace("seeds = [0, 1]", "seeds = [0]"))
    cell = tmp_path / "study" / "cells" / "joint" / "seed-0"
    assert study("run", path, "--train.max_steps=1").code == 0
    ended = call("study", "run", path)
    assert ended.code == 2 and f"{cell}: is there already, of another study:\n  train.max_steps: 1 -> 6" in ended.err


WITH_PLUGINS = """
plugins = ["metric.py", "tracker.py", "schedule.py"]

[study]
name = "plugged"
dir = "{folder}/study"
seeds = [0, 1]
scores = [{ key = "eval/token_f1" }]

[study.axes]
"scheduler.power" = [1.0, 3.0]
"""


def test_plugins_bring_a_metric_a_tracker_and_an_axis(tmp_path: Path):
    """The examples of docs/extend in one study: the rows differ in a key of the schedule, the score is the metric."""
    for kind, page in (("metric", "task"), ("tracker", "tracker"), ("schedule", "schedule")):
        (tmp_path / f"{kind}.py").write_text(re.findall(r"^```python\n(.*?)^```$", (EXTEND / f"{page}.md").read_text(), re.M | re.S)[0])
    head, _, tables = WITH_PLUGINS.partition("\n[study]")
    config = CONFIG.replace("interval = 1\n", "interval = 1\ntrackers = [{ type = 'csv' }]\n")
    config += "[scheduler]\nname = 'power'\nwarmup_steps = 1\n[eval]\ntasks = ['token_f1']\n"
    path = make_study(tmp_path, "\n[study]" + tables, config=head + config)
    ended = study("run", path)
    assert ended.code == 0, ended.err
    rows = table(path)
    assert [(row["row"], row["seed"], row["state"]) for row in rows] == [
        (f"power={p}", s, "finished") for p in ("1.0", "3.0") for s in "01"
    ]
    for cell in (tmp_path / "study" / "cells").glob("*/*"):
        numbers = dict(line.split(",")[1:] for line in (cell / "metrics.csv").read_text().splitlines() if line.startswith("6,"))
        assert float(numbers["eval/token_f1"]) == pytest.approx(float(next(
            row["eval/token_f1"] for row in rows if (row["row"], f"seed-{row['seed']}") == (cell.parent.name, cell.name)
        )))  # fmt: skip
    assert study("report", path).code == 0 and "token_f1" in (tmp_path / "study" / "report.html").read_text()
