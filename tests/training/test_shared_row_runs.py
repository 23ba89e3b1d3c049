"""Training on ranks that share rows: the losses of one process, and checkpoints that change hands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import run_ranks
from tests.training.tiny import Ended, assert_same_tensors, call, losses, make_job, metrics, tensors

pytestmark = pytest.mark.dist

STEPS = 6
STAGES = f"""
[[stages]]
name = "all"
steps = {STEPS}
"""
ARGV = (
    "--data.batching=pack",
    "--checkpoint.interval=3",
    "--checkpoint.keep_last_n=3",
    "--train.grad_clip_norm=0",
    "--metrics.diagnosis=true",
)
SHARED = ("--distributed.context_parallel=2",)
MAIN = "from kempnerforge.cli.main import main; main()"


def on(ranks: int, *argv: object) -> Ended:
    """The command on so many ranks; its code is the first that is not 0."""
    if ranks == 1:
        return call(*argv)
    ended = run_ranks(MAIN, ranks, *argv, timeout=240)
    code = next((one.returncode for one in ended if one.returncode), 0)
    return Ended(code, "".join(one.stdout for one in ended), "".join(one.stderr for one in ended))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run by one process and by two that share its rows."""
    folder = tmp_path_factory.mktemp("shared")
    job = make_job(folder, extra=STAGES)
    for name, ranks, extra in (("one", 1, ()), ("shared", 2, SHARED)):
        ended = on(ranks, "train", job, *ARGV, *extra, f"--run.dir={folder}/{name}", "--train.max_steps=0")
        assert ended.code == 0, ended
    return folder


def same_curve(a: Path, b: Path) -> None:
    """Losses, norms, counts and scores of two runs, up to rounding of sums in another order."""
    found, want = (metrics(path) for path in (a, b))
    assert len(losses(a)) == STEPS and [sorted(row) for row in found] == [sorted(row) for row in want]
    skipped = ("time/", "attention_on", "train/tflops", "train/peak", "train/products", "train/mfu")
    for row, its in zip(found, want, strict=True):
        kept = {key: value for key, value in row.items() if not key.startswith(skipped)}
        assert kept == pytest.approx({key: its[key] for key in kept}, rel=1e-4, abs=1e-6)
        spent = {key: value for key, value in row.items() if key.startswith("attention_on")}
        assert spent == pytest.approx({key: its[key] for key in spent}, rel=1e-4)
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)


def test_two_ranks_follow_the_curve_of_one_process(runs: Path) -> None:
    """The same samples in the same order, counted once; evaluation is as on any two ranks."""
    same_curve(runs / "shared", runs / "one")


def test_an_arch_that_needs_whole_rows_is_refused(tmp_path: Path) -> None:
    argv = ("train", make_job(tmp_path), *SHARED, "--vlm.arch=moma")
    for ended in run_ranks(MAIN, 2, *argv):
        assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended
        assert (
            "context_parallel = 2: vlm.arch = 'moma' needs whole rows; 1, or an arch that can share them: cross_attention" in ended.stderr
        )
    ended = call("train", tmp_path / "job.toml", *SHARED)
    assert ended.code == 2 and "context_parallel = 2: their product must divide the number of processes, 1" in ended.err
    assert not (tmp_path / "run").exists()


def test_a_bad_sample_is_counted_and_written_once(tmp_path: Path) -> None:
    job = make_job(tmp_path, extra=STAGES)
    (tmp_path / "3.png").write_bytes(b"no picture")
    found = {}
    for name, ranks, extra in (("one", 1, ()), ("shared", 2, SHARED)):
        ended = on(ranks, "train", job, *ARGV, *extra, f"--run.dir={tmp_path}/{name}", "--data.max_bad_fraction=0.5", "--eval.at_end=false")
        assert ended.code == 0, ended
        lines = (tmp_path / name / "bad_samples.jsonl").read_text().splitlines()
        found[name] = len(lines), [row["data/bad_samples"] for row in metrics(tmp_path / name) if "data/bad_samples" in row][-1]
    assert found["shared"] == found["one"] and found["one"][0] == 1 <= found["one"][1]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["cross_attention", "mot"])
def test_other_archs_follow_the_curve_of_one_process(arch: str, tmp_path: Path) -> None:
    job = make_job(tmp_path, extra=STAGES)
    for name, ranks, extra in (("one", 1, ()), ("shared", 2, (*SHARED, "--train.activation_checkpointing=true"))):
        argv = (
            "train",
            job,
            *ARGV,
            f"--vlm.arch={arch}",
            "--model.n_layers=4",
            "--train.max_steps=0",
            *extra,
            f"--run.dir={tmp_path}/{name}",
        )
        ended = on(ranks, *argv)
        assert ended.code == 0, ended
    same_curve(tmp_path / "shared", tmp_path / "one")


def test_checkpoints_change_hands(runs: Path) -> None:
    """Two ranks that stop and go on end bitwise as those that did not stop; one process goes on where they stopped."""
    for name, ranks, extra in (("again", 2, SHARED), ("alone", 1, ())):
        argv = ("train", runs / "job.toml", *ARGV, f"--run.dir={runs}/{name}")
        assert on(2, *argv, *SHARED, "--train.max_steps=3").code == 0
        ended = on(ranks, *argv, *extra, "--train.max_steps=0")
        assert ended.code == 0, ended
    assert_same_tensors(tensors(runs / "again"), tensors(runs / "shared"))
    assert losses(runs / "again") == losses(runs / "shared")
    assert losses(runs / "alone") == pytest.approx(losses(runs / "one"), rel=1e-5)


@pytest.mark.slow
def test_checkpoints_of_four_ranks_that_share_layers_and_rows_change_hands(runs: Path, tmp_path: Path) -> None:
    """To two ranks that share layers, back, to one process, back."""
    layers = "--distributed.tensor_parallel=2"
    splits = {4: (*SHARED, layers), 2: (layers,), 1: ()}
    for ranks, step in ((4, 1), (2, 2), (4, 3), (1, 4), (4, STEPS)):
        end = (f"--train.max_steps={step}", f"--eval.at_end={str(step == STEPS).lower()}")
        ended = on(ranks, "train", runs / "job.toml", *ARGV, *splits[ranks], f"--run.dir={tmp_path}/run", *end)
        assert ended.code == 0, ended
    same_curve(tmp_path / "run", runs / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [(), ("--distributed.shard_size=2",), ("--train.grad_accum_steps=2", "--distributed.accumulate_sharded=true")]
)
def test_two_groups_of_two_ranks_are_two_ranks(extra: tuple[str, ...], tmp_path: Path) -> None:
    job = make_job(tmp_path, extra=STAGES)
    for name, ranks, more in (("two", 2, ()), ("four", 4, SHARED)):
        argv = ("train", job, *ARGV, *extra, *more, "--train.max_steps=0", f"--run.dir={tmp_path}/{name}")
        ended = on(ranks, *argv)
        assert ended.code == 0, ended
    same_curve(tmp_path / "four", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["joint_decoder", "mot"])
def test_four_ranks_share_layers_and_rows(arch: str, tmp_path: Path) -> None:
    """Two groups that share a row, of two ranks each that share every layer."""
    job = make_job(tmp_path, extra=STAGES)
    argv = ("train", job, *ARGV, f"--vlm.arch={arch}", "--train.max_steps=0")
    for name, ranks, extra in (("one", 1, ()), ("shared", 4, (*SHARED, "--distributed.tensor_parallel=2"))):
        ended = on(ranks, *argv, *extra, f"--run.dir={tmp_path}/{name}")
        assert ended.code == 0, ended
    same_curve(tmp_path / "shared", tmp_path / "one")
