"""Runs whose layers two processes share: the curve, scores and checkpoints of one process."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import ranks_pass, run_ranks
from tests.training.tiny import (
    Ended,
    assert_same_tensors,
    call,
    checkpoint_steps,
    end_of,
    losses,
    make_job,
    metrics,
    start,
    tensors,
    two_ranks,
)

pytestmark = pytest.mark.dist

STEPS = 12
MODEL = """
[[stages]]
name = "all"
steps = 6
[[stages]]
name = "frozen"
steps = 6
freeze = [{ module = "vision_encoder" }, { module = "transformer.layers.0.*" }]
"""
SHARED = "--distributed.tensor_parallel=2"
COMMON = ("--train.max_steps=0", "--checkpoint.interval=3", "--checkpoint.keep_last_n=9", "--train.ema_decay=0.9", "--train.batch_size=4")
COMMON += (
    "--optimizer.lr=1e-2",
    "--model.n_heads=4",
    "--model.n_kv_heads=2",
    "--model.qk_norm=true",
    "--model.dropout=0.1",
    "--metrics.interval=3",
)
WHOLE = (*COMMON, "--metrics.diagnosis=true", "--metrics.peak_tflops=1.0", "--eval.interval=6")
COMMON += ("--eval.at_end=false",)
TIMES = ("time/", "train/tflops_per_s", "train/mfu", "train/peak_memory_gib")


def relative(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves of one length."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def near(a: Path, b: Path, most: float = 2e-5) -> None:
    """Losses and norms of two runs."""
    for key in ("train/loss", "train/grad_norm"):
        ours, theirs = ([row[key] for row in metrics(path) if key in row] for path in (a, b))
        assert relative(ours, theirs) < most, key


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run by one process and by two that share layers, the second one's checkpoints written in the background."""
    folder = tmp_path_factory.mktemp("shared")
    job = make_job(folder, extra=MODEL)
    ended = call("train", job, *WHOLE, f"--run.dir={folder}/one")
    assert ended.code == 0, ended
    ended = two_ranks("train", job, *WHOLE, SHARED, "--checkpoint.in_background=true", f"--run.dir={folder}/two")
    assert ended.code == 0, ended
    return folder


def test_two_ranks_follow_the_curve_of_one_process(runs: Path) -> None:
    """Also the scores, and every number of the diagnosis but times."""
    near(runs / "two", runs / "one")
    ones, twos = metrics(runs / "one"), metrics(runs / "two")
    assert len(ones) == len(twos)
    for one, two in zip(ones, twos, strict=True):
        told = [key for key in one if not key.startswith(TIMES)]
        assert {key: two[key] for key in told} == pytest.approx({key: one[key] for key in told}, rel=1e-3, abs=1e-6)
    for name in ("attention_on_images/0", "grad_norm/transformer.layers", "update_ratio/transformer.layers", "eval/exact_match"):
        assert any(name in row for row in ones), name
    a, b = tensors(runs / "one"), tensors(runs / "two")
    assert a.keys() == b.keys() and any(name.startswith("averaged.") for name in a)
    assert all(torch.allclose(a[name], b[name], rtol=1e-2, atol=2e-3) for name in a if a[name].is_floating_point())


def test_a_killed_run_resumes_bitwise(runs: Path, tmp_path: Path) -> None:
    argv = ("train", runs / "job.toml", *COMMON, SHARED, f"--run.dir={tmp_path}/run")
    process = start(*argv, "--nproc", 2)
    deadline = time.monotonic() + 90
    while not ((tmp_path / "run" / "checkpoints").is_dir() and checkpoint_steps(tmp_path / "run")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    end_of(process)
    assert 0 < max(checkpoint_steps(tmp_path / "run")) <= STEPS
    ended = two_ranks(*argv)
    assert ended.code == 0, ended
    assert_same_tensors(tensors(tmp_path / "run"), tensors(runs / "two"))


@pytest.mark.parametrize("first", [1, 2])
def test_checkpoints_change_hands(runs: Path, first: int, tmp_path: Path) -> None:
    """Begun by one process and continued by two, or the other way: at the step of the change bitwise what it was, then the curve."""
    argv = ("train", runs / "job.toml", *COMMON, f"--run.dir={tmp_path}/run")
    train = {1: lambda *words: call(*argv, *words), 2: lambda *words: two_ranks(*argv, SHARED, *words)}
    began = train[first]("--train.max_steps=6")
    assert began.code == 0, began
    six = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert_same_tensors(tensors(six), tensors(runs / ("one", "two")[first - 1] / "checkpoints" / "step-00000006"))
    went_on: Ended = train[3 - first]()
    assert went_on.code == 0, went_on
    near(tmp_path / "run", runs / "one")


def test_one_process_uses_what_two_have_trained(runs: Path, tmp_path: Path) -> None:
    """It gives the scores that the run gave, and an export has the averages of the checkpoint, or weights that never trained."""
    (last,) = [row["eval/exact_match"] for row in metrics(runs / "two") if row["step"] == STEPS and "eval/exact_match" in row]
    assert json.loads(call("eval", runs / "two", "--json").out)["exact_match"] == last
    ended = call("export", runs / "two", tmp_path / "out", "--format=kempnerforge")
    assert ended.code == 0, ended
    saved, exported = tensors(runs / "two"), load_file(tmp_path / "out" / "model.safetensors")
    want = {name.removeprefix(kind): saved[name] for kind in ("model.", "averaged.") for name in saved if name.startswith(kind)}
    assert_same_tensors({name: want[name] for name in exported}, exported)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "schedule_free_adamw"])
def test_four_ranks(runs: Path, optimizer: str, tmp_path: Path) -> None:
    """Two shares of the data, each computed by two ranks: the run of two ranks that share nothing. Any split goes on from there."""
    main = "from kempnerforge.cli.main import main; main()"
    argv = ("train", runs / "job.toml", *COMMON, f"--optimizer.name={optimizer}", "--train.ema_decay=0")
    ended = two_ranks(*argv, f"--run.dir={tmp_path}/plain")
    assert ended.code == 0, ended
    ranks_pass(main, 4, *argv, SHARED, f"--run.dir={tmp_path}/four", "--train.max_steps=6", timeout=300)
    for ended in run_ranks(
        main, 4, *argv, SHARED, "--distributed.shard_size=2", f"--run.dir={tmp_path}/four", "--train.max_steps=9", timeout=300
    ):
        assert ended.returncode == 0, ended
    assert two_ranks(*argv, f"--run.dir={tmp_path}/four").code == 0
    near(tmp_path / "four", tmp_path / "plain", 1e-3 if optimizer == "muon" else 2e-5)
    assert losses(tmp_path / "four")[-1] < losses(tmp_path / "four")[0]
