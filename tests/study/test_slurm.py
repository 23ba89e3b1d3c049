"""Cells as jobs of submitit: with a SLURM that this file makes up, and on this machine."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kempnerforge.study import run
from kempnerforge.study.cells import Cell, cell_of, job_of, rows_of
from kempnerforge.study.config import load_study
from kempnerforge.study.run import Command, Stopped, execute, state_of
from kempnerforge.study.slurm import Cluster, Work, parameters
from kempnerforge.util.errors import ConfigError, InputError
from tests.dist import ROOT
from tests.study.test_run import start, study, table
from tests.study.tiny import STUDY, make_study
from tests.training.tiny import assert_same_tensors, call, end_of, metrics, tensors

submitit = pytest.importorskip("submitit")

SLURM = """
[study.slurm]
partition = "gpu"
account = "lab one"
time = 90
gpus_per_node = 2
cpus_per_task = 8
mem_gb = 1.5
setup = ["module load cuda"]
options = { qos = "long", mail-user = "a@b.c", exclusive = true }
"""
LOCAL = '[study.slurm]\nexecutor = "local"\n'
SBATCH = """#!/bin/sh
[ -e "$FAKE/refuse" ] && { echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1; }
echo "$@" >> "$FAKE/calls"
cp "$1" "$FAKE/script"
echo "Submitted batch job 4$(wc -l < "$FAKE/calls")"
[ -e "$FAKE/works" ] || exit 0
for k in 0 1 2 3; do
    SLURM_JOB_ID=4$k SLURM_ARRAY_JOB_ID=4$(wc -l < "$FAKE/calls") SLURM_ARRAY_TASK_ID=$k sh "$1" > /dev/null 2>&1 &
done
"""
SRUN = """#!/bin/sh
while [ "${1#*python}" = "$1" ]; do shift; done
exec "$@"
"""
SQUEUE = """#!/bin/sh
[ -e "$FAKE/works" ] && exit 1
cat "$FAKE/queue"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands of SLURM in it. Files there say what they do and what they were asked."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("squeue", SQUEUE)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def cells_of(path: Path) -> list[Cell]:
    loaded = load_study(path)
    rows = [(row, job_of(loaded, row)) for row in rows_of(loaded)]
    return [cell_of(loaded, row, job, 0, loaded.dir / "cells" / row.name / "seed-0", f"{row.name}/seed-0") for row, job in rows]


def cluster(path: Path, jobs: int = 1) -> Cluster:
    cfg = load_study(path).cfg
    assert cfg.slurm is not None
    return Cluster(cfg.slurm, cfg, jobs)


def stopped_at_once(monkeypatch: pytest.MonkeyPatch, cells: list[Cell], executor: Cluster) -> str:
    """What ``execute`` says when it is interrupted after its first look."""
    with monkeypatch.context() as patch:
        patch.setattr(run.time, "sleep", lambda seconds: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped) as stopped:
            execute(cells, "last", executor)
    assert stopped.value.number == signal.SIGINT
    return stopped.value.said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('executor = "pbs"', "slurm.executor = 'pbs': allowed are 'slurm', 'local'"),
        ("time = 0", "slurm.time = 0: must be >= 1"),
        ("mem_gb = -1", "slurm.mem_gb = -1"),
        ('partitoin = "gpu"', "slurm.partitoin = \"gpu\": unknown key; did you mean 'partition'?"),
        ("options = { array = '0-9' }", "options: 'array': has its own key in [study.slurm], or is set by the study"),
        ("options = { job_name = 'x' }", "options: 'job-name': has its own key"),
        ("options = { qos = ['a'] }", "options: qos = ['a']: must be a text, a number, or true"),
    ],
)
def test_what_is_wrong_in_the_table(tmp_path: Path, line: str, said: str):
    with pytest.raises(ConfigError) as error:
        load_study(make_study(tmp_path, f"{STUDY}[study.slurm]\n{line}\n"))
    assert said in str(error.value)


def test_the_example_of_the_docs(tmp_path: Path):
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    example = page[page.index("[study.slurm]\n") :].partition("```")[0]
    cfg = load_study(make_study(tmp_path, STUDY + example)).cfg.slurm
    assert cfg is not None and parameters(cfg, "tiny", 8) == {
        "name": "tiny", "timeout_min": 240, "gpus_per_node": 1, "cpus_per_task": 8, "mem_gb": 64, "slurm_partition": "gpu",
        "slurm_account": "my_lab", "slurm_array_parallelism": 8, "slurm_setup": ["module load cuda"],
        "slurm_srun_args": ["--cpus-per-task=8"], "slurm_additional_parameters": {"qos": "long", "constraint": "a100"},
    }  # fmt: skip


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = make_study(tmp_path, STUDY + SLURM)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"\[study.slurm\] executor = 'slurm': .*srun.* 'local' runs the jobs on this machine"):
        cluster(path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"\[study.slurm\] needs the package submitit: pip install 'kempnerforge\[slurm\]'"):
        cluster(path)


def test_what_sbatch_is_handed(tmp_path: Path, fake: Path):
    path = make_study(tmp_path, STUDY + SLURM)
    cells = cells_of(path)
    for cell in cells:
        cell.dir.mkdir(parents=True)
    begun = list(cluster(path, jobs=3).start(cells))
    lines = (fake / "script").read_text().splitlines()
    for option in (
        "array=0-1%2", "job-name=tiny", "partition=gpu", "account='lab one'", "time=90", "gpus-per-node=2", "cpus-per-task=8",
        "mem=1536MB", "qos=long", "mail-user=a@b.c", "nodes=1", "signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines
    assert "#SBATCH --exclusive" in lines
    assert lines.index("module load cuda") < next(k for k, line in enumerate(lines) if line.startswith("srun "))
    assert "--cpus-per-task=8" in next(line for line in lines if line.startswith("srun "))
    assert [json.loads((cell.dir / "job.json").read_text()) for cell in cells] == [
        {"executor": "slurm", "job": "41_0"}, {"executor": "slurm", "job": "41_1"},
    ]  # fmt: skip
    work = pickle.loads((tmp_path / "study" / "slurm" / "41_1_submitted.pkl").read_bytes()).function
    assert work == Work(cells[1].dir, Command(["train", str(cells[1].config)], {}))
    (fake / "queue").write_text("41_0\n41_1\n")
    assert [one.process.poll() for one in begun] == [None, None]


def test_a_refusal_of_sbatch_is_shown(tmp_path: Path, fake: Path):
    path = make_study(tmp_path, STUDY + SLURM)
    (fake / "refuse").touch()
    with pytest.raises(InputError, match="could not be submitted: sbatch: error: invalid partition specified: gpu"):
        execute(cells_of(path), "last", cluster(path))


def test_not_submitted_twice(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """One job runs and one waits; then one was cancelled while nobody looked."""
    caplog.set_level("INFO")
    path = make_study(tmp_path, STUDY + SLURM)
    cells = cells_of(path)
    (fake / "queue").write_text("7\n41_0\n41_1\n")
    said = stopped_at_once(monkeypatch, cells, cluster(path))
    assert said == "stopped; SLURM goes on with jobs 41_0, 41_1: the same command waits for them, scancel ends them"
    assert stopped_at_once(monkeypatch, cells, cluster(path)) == said
    assert "joint/seed-0: waits for job 41_0, which was submitted before" in caplog.text
    assert len((fake / "calls").read_text().splitlines()) == 1

    (fake / "queue").write_text("7\n41_0\n")
    said = stopped_at_once(monkeypatch, cells, cluster(path))
    assert "jobs 41_0, 42:" in said, "the second one alone was submitted again"


def test_a_lost_job_is_a_failed_cell(tmp_path: Path, fake: Path):
    path = make_study(tmp_path, STUDY + SLURM)
    (fake / "queue").write_text("7\n")
    cells, executor = cells_of(path), cluster(path)
    executor.look_s = 0.01
    (tmp_path / "study" / "slurm").mkdir(parents=True)
    (tmp_path / "study" / "slurm" / "41_1_0_log.err").write_text("slurmstepd: error: *** CANCELLED DUE TO TIME LIMIT ***\n")
    execute(cells, "last", executor)
    states = [state_of(cell) for cell in cells]
    assert [(state.name, state.code) for state in states] == [("failed", 1)] * 2
    assert "job 41_0 has ended before its cell: it said nothing in" in states[0].why
    assert states[1].why == "job 41_1 has ended before its cell: slurmstepd: error: *** CANCELLED DUE TO TIME LIMIT ***"
    assert not any((cell.dir / "job.json").exists() for cell in cells), "the next run submits them again"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A script of the shell in the place of a cell."""
    script: list[str] = []

    def spawn(argv: Any, env: Any, output: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", "-c", script[0]], stdout=output, env=env)

    monkeypatch.setattr(run, "spawn", spawn)
    before = signal.getsignal(signal.SIGTERM)
    yield script
    signal.signal(signal.SIGTERM, before)


def test_a_job_writes_down_how_its_cell_has_failed(tmp_path: Path, scripted: list[str]):
    scripted.append("echo threads $OMP_NUM_THREADS; exit 3")
    Work(tmp_path, Command([], {"OMP_NUM_THREADS": "7"}))()
    assert json.loads((tmp_path / "failure.json").read_text()) == {"code": 3, "said": "threads 7"}


def test_a_job_whose_time_is_over_lets_its_cell_save_and_is_queued_again(tmp_path: Path, scripted: list[str]):
    scripted.append('trap "echo saved; exit 130" TERM; echo ready; while :; do sleep 0.02; done')
    work = Work(tmp_path, Command([], {}))
    work.process = run.start(tmp_path, work.command)
    while "ready" not in (tmp_path / "log.txt").read_text():
        time.sleep(0.01)
    again = work.checkpoint().function
    assert (tmp_path / "log.txt").read_text() == "ready\nsaved\n" and work.process.poll() == 130
    assert again == Work(tmp_path, Command([], {})) and again.process is None


# ---- whole studies ---------------------------------------------------------------------------------------------------


def same_results(path: Path, other: Path) -> None:
    """Bitwise, in all that a cell leaves."""
    assert table(path) == table(other)
    for name in ("joint/seed-0", "cross/seed-1"):
        mine, its = (each.parent / "study" / "cells" / name for each in (path, other))
        assert read(mine) == read(its)
        assert_same_tensors(tensors(mine), tensors(its))


def read(cell: Path) -> list[dict[str, float]]:
    """Without memory and times."""
    return [{key: value for key, value in row.items() if "memory" not in key and "latency" not in key} for row in metrics(cell)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study without the table."""
    path = make_study(tmp_path_factory.mktemp("plain"))
    assert study("run", path).code == 0
    return path


@pytest.mark.slow
def test_local_jobs_killed_and_continued_find_the_same(plain: Path, tmp_path: Path):
    """The study is killed while two jobs run; they go on, and the next study waits for them."""
    path = make_study(tmp_path, STUDY + LOCAL)
    process = start("study", "run", path, "--jobs=2")
    process.listen()
    records = tmp_path / "study" / "cells"
    wait_for(lambda: len([*records.rglob("job.json")]) == 2)
    before = {file: json.loads(file.read_text())["job"] for file in records.rglob("job.json")}
    process.kill()
    process.wait(30)
    ended = study("run", path, "--jobs=2")
    assert ended.code == 0, ended.err
    for number in before.values():
        assert f"waits for job {number}, which was submitted before" in ended.err
    assert len([*(tmp_path / "study" / "slurm").glob("*_submitted.pkl")]) == 4, "one job a cell"
    same_results(path, plain)


@pytest.mark.slow
def test_a_stop_ends_local_jobs(tmp_path: Path):
    path = make_study(tmp_path, STUDY.replace("seeds = [0, 1]", "seeds = [0]") + LOCAL)
    more = ("--train.max_steps=4000", "--checkpoint.interval=0")
    process = start("study", "run", path, *more)
    process.listen()
    cell = tmp_path / "study" / "cells" / "joint" / "seed-0"
    wait_for((cell / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    ended = end_of(process)
    assert ended.code == 130 and "the cells are saved; the same command goes on" in ended.err
    assert [*(cell / "checkpoints").glob("step-*")] and not (cell / "failure.json").exists()
    assert json.loads(call("study", "status", path, *more, "--json").out)["cells"] == {"started": 1, "waiting": 1}


@pytest.mark.slow
def test_an_array_of_a_made_up_slurm_finds_the_same(plain: Path, fake: Path, tmp_path: Path):
    (fake / "works").touch()
    path = make_study(tmp_path, STUDY + SLURM.replace('setup = ["module load cuda"]', ""))
    ended = study("run", path)
    assert ended.code == 0, ended.err
    assert len((fake / "calls").read_text().splitlines()) == 1, "one array"
    same_results(path, plain)


def wait_for(there: Any) -> None:
    deadline = time.monotonic() + 100
    while not there() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert there()
