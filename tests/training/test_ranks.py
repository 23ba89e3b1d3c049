"""Two gloo ranks against one process: the same data, the same losses, and checkpoints that change hands."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from kempnerforge.config import load_config
from kempnerforge.data.batching.sampler import StepSampler
from tests.dist import free_port, ranks_pass, run_ranks
from tests.params import quick
from tests.processes import Forked
from tests.training.tiny import (
    Ended,
    assert_same_tensors,
    call,
    checkpoint_steps,
    end_of,
    launch,
    losses,
    make_job,
    metrics,
    rows_of,
    spawn,
    start,
    tensors,
    two_ranks,
    write_rows,
)

pytestmark = pytest.mark.dist

STEPS = 12
COMMON = ("--checkpoint.interval=6", "--checkpoint.keep_last_n=3", "--train.grad_clip_norm=0")
STAGES = f"""
[[stages]]
name = "all"
steps = {STEPS}
"""


def torchrun(*argv: object) -> Ended:
    """As on a cluster: ``torchrun --nproc-per-node 2 -m kempnerforge ARGV``."""
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "kempnerforge")
    return end_of(launch(*argv, module=launcher))


def relative(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves of one length."""
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run by one process, by one process with two micro-batches, and by two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    argv = ("train", make_job(folder, extra=STAGES), *COMMON, "--train.max_steps=0")
    for name, extra in (("one", ()), ("micro", ("--train.grad_accum_steps=2",))):
        ended = call(*argv, *extra, f"--run.dir={folder}/{name}")
        assert ended.code == 0, ended
    ended = torchrun(*argv, f"--run.dir={folder}/two")
    assert ended.code == 0, ended
    return folder


@pytest.mark.slow
def test_two_ranks_follow_the_curve_of_one_process(runs: Path):
    """fp32 AdamW. Another split of the same batch sums in another order: the last bits differ. The norms are compared because AdamW would
    hide gradients that are all too small by the same factor.
    """
    assert relative(losses(runs / "two"), losses(runs / "one")) < 1e-5
    norms = ([row["train/grad_norm"] for row in metrics(runs / name) if "train/grad_norm" in row] for name in ("two", "one"))
    assert relative(*norms) < 1e-4
    assert losses(runs / "two")[-1] < losses(runs / "two")[0] - 0.3


def test_two_ranks_equal_one_process_that_accumulates(runs: Path):
    """The same micro-batches, and a sum of two gradients has one order only. (The norm is summed by shards, so that clipping by it adds
    rounding; what is logged is summed in another precision.)
    """
    assert_same_tensors(tensors(runs / "two"), tensors(runs / "micro"))
    assert relative(losses(runs / "two"), losses(runs / "micro")) < 1e-6


def test_sums_of_gradients_that_are_held_sharded(runs: Path):
    """Of two micro-batches on each of two ranks; reduced twice as often."""
    argv = ("train", runs / "job.toml", *COMMON, "--eval.at_end=false", "--train.max_steps=0", "--train.grad_accum_steps=2")
    assert two_ranks(*argv, f"--run.dir={runs}/sharded", "--distributed.accumulate_sharded=true").code == 0
    assert relative(losses(runs / "sharded"), losses(runs / "one")) < 1e-5


def test_counts_and_evaluation_are_over_all_ranks(runs: Path):
    one, two = ([row for row in metrics(runs / name) if "data/samples" in row][-1] for name in ("one", "two"))
    assert one["data/samples"] == two["data/samples"] == 4 * STEPS
    for name, world in (("one", 1), ("two", 2)):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["world_size"] == world and summary["questions"] == 8
        page = (runs / name / "report.html").read_text()
        groups = re.findall(r'<td class="name">(\w+)</td>.*?<td class="n">\d+ of (\d+)</td>', page, re.DOTALL)
        assert {answer: int(total) for answer, total in groups} == Counter(row["answer"] for row in rows_of(runs)[::2])
    assert json.loads((runs / "two" / "checkpoints" / "step-00000012" / "manifest.json").read_text())["world_size"] == 2


def test_checkpoints_change_hands(runs: Path):
    """Two ranks go on where one process stopped, and one where two stopped: step by step the curve of one process."""
    base = ("train", runs / "job.toml", *COMMON, "--eval.at_end=false")
    for name, first, second in (("one-two", call, two_ranks), ("two-one", two_ranks, call)):
        argv = (*base, f"--run.dir={runs}/{name}")
        started, went_on = first(*argv, "--train.max_steps=6"), second(*argv, "--train.max_steps=0")
        assert started.code == went_on.code == 0, (started, went_on)
        assert relative(losses(runs / name), losses(runs / "one")) < 1e-5
        six = runs / name / "checkpoints" / "step-00000006"
        same = "one" if first is call else "two"
        assert_same_tensors(tensors(six), tensors(runs / same / "checkpoints" / "step-00000006"))


@pytest.mark.parametrize("arch", quick(["joint_decoder", "cross_attention", "mot"]))
def test_a_rank_that_sees_only_text_stays_in_step(arch: str, tmp_path: Path):
    """Rank 1 never gets a picture. The job ends, and gradients and weights are those of one process that accumulates the micro-batches."""
    steps, size = 4, 4
    path = make_job(tmp_path)
    rows = rows_of(tmp_path)
    sampler = StepSampler(len(rows), size, seed=load_config(path).train.seed)
    for step in range(steps):
        for index in sampler.global_indices(step)[size // 2 :]:  # rank 1's half
            rows[index] = {"image": None, "prompt": "which colour comes to mind?", "answer": rows[index]["answer"]}
    write_rows(tmp_path / "train.jsonl", rows)
    argv = ("train", path, *COMMON, f"--vlm.arch={arch}", f"--train.max_steps={steps}", "--data.batching=pad", "--eval.at_end=false")
    argv = (*argv, "--vlm.cross_attention_every_n_layers=1") if arch == "cross_attention" else argv
    ended = two_ranks(*argv, f"--run.dir={tmp_path}/two")
    assert ended.code == 0, ended
    assert call(*argv, "--train.grad_accum_steps=2", f"--run.dir={tmp_path}/one").code == 0
    ones, twos = ([row for row in metrics(tmp_path / name) if "train/loss" in row] for name in ("one", "two"))
    for key in ("train/loss", "train/grad_norm"):
        assert [row[key] for row in twos] == pytest.approx([row[key] for row in ones], rel=1e-6)
    assert_same_tensors(tensors(tmp_path / "two"), tensors(tmp_path / "one"))


@pytest.mark.slow
def test_two_ranks_with_muon_and_freezing(runs: Path):
    extra = '\n[[vlm.freeze_schedule]]\nstart_step = 4\nspecs = [{ module = "vision_encoder" }]\n'
    path = make_job(runs / "muon", extra=STAGES + extra)
    argv = (
        "train",
        path,
        "--train.max_steps=0",
        "--optimizer.name=muon",
        "--eval.interval=4",
        "--eval.at_end=false",
        "--checkpoint.interval=0",
    )
    assert call(*argv, "--train.grad_accum_steps=2").code == 0
    ended = two_ranks(*argv, f"--run.dir={runs}/muon/two")
    assert ended.code == 0, ended
    assert relative(losses(runs / "muon" / "two"), losses(runs / "muon" / "run")) < 1e-3  # Muon orthogonalises in bf16


# ---- exit codes ------------------------------------------------------------------------------------------------------


def wait_for(process: Forked, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not there():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_nproc_ends_with_0_and_2(tmp_path: Path):
    job = make_job(tmp_path)
    ended = spawn("train", job, "--nproc", 2, "--train.max_steps=2", "--data.eval_path", "")
    assert ended.code == 0 and checkpoint_steps(tmp_path / "run") == [2] and "eval/" not in ended.err, ended
    (tmp_path / "train.jsonl").write_text("")
    ended = two_ranks("train", job, f"--run.dir={tmp_path}/other")  # what the launcher makes of it: tests/distributed/test_world.py
    assert ended.code == 2 and "no rows" in ended.err and "Traceback" not in ended.err, ended


@pytest.mark.parametrize(("number", "code"), quick([(signal.SIGTERM, 130), (signal.SIGINT, -signal.SIGINT)]))
def test_nproc_interrupted_saves_and_ends_with_130(number: signal.Signals, code: int, tmp_path: Path):
    """Of SIGINT it dies, which a shell calls 130, too."""
    argv = ("train", make_job(tmp_path), "--nproc", 2, "--train.max_steps=500", "--checkpoint.interval=0", "--eval.at_end=false")
    process = start(*argv)
    wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(losses(tmp_path / "run")) >= 5)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err, err
    done = len(losses(tmp_path / "run"))
    assert checkpoint_steps(tmp_path / "run") == [done] and 5 <= done < 500


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_copies_of_two_shards(runs: Path, optimizer: str, tmp_path: Path):
    """Hybrid sharding on four ranks: the curve, norms and weights of one process, and its checkpoint goes on with any split."""
    main = "from kempnerforge.cli.main import main; main()"
    argv = ("train", runs / "job.toml", *COMMON, f"--optimizer.name={optimizer}", "--eval.at_end=false", "--metrics.diagnosis=true",
            "--metrics.interval=1")  # fmt: skip
    assert call(*argv, f"--run.dir={tmp_path}/one", "--train.max_steps=0").code == 0
    hybrid = (*argv, f"--run.dir={tmp_path}/hybrid", "--distributed.shard_size=2")
    ranks_pass(main, 4, *hybrid, "--train.max_steps=6", timeout=300)
    parts = sorted(path.stat().st_size for path in (tmp_path / "hybrid" / "checkpoints" / "step-00000006").glob("*.distcp"))
    assert len(parts) >= 2 and parts[-1] < 0.8 * sum(parts), "a copy is written once, by the ranks that share it"
    assert two_ranks(*hybrid, "--train.max_steps=9").code == 0
    assert call(*hybrid, "--train.max_steps=0").code == 0
    assert relative(losses(tmp_path / "hybrid"), losses(tmp_path / "one")) < (
        1e-5 if optimizer == "adamw" else 1e-4
    )  # Muon has bf16 inside
    for key in ("train/grad_norm", "grad_norm/adapter", "update_ratio/transformer.layers"):
        ours, theirs = ([row[key] for row in metrics(tmp_path / name) if key in row] for name in ("hybrid", "one"))
        assert relative(ours, theirs) < (1e-3 if optimizer == "adamw" else 1e-2), key


def test_rank_0_alone_has_all_weights_and_says_for_all_what_is_wrong_with_them(runs: Path, tmp_path: Path):
    """What the other rank builds has no memory. It ends with the same message, at once, when the weights cannot be read."""
    main = """
import torch
from kempnerforge.cli.main import main
from kempnerforge.distributed import fsdp
take_away = fsdp.take_away
def look(model):
    devices = {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
    assert devices == ({"cpu"} if torch.distributed.get_rank() == 0 else {"meta"}), devices
    return take_away(model)
fsdp.take_away = look
main()
"""
    argv = ("train", runs / "job.toml", *COMMON, "--eval.at_end=false", f"--run.dir={tmp_path}/run", "--train.max_steps=1")
    began = f"--run.init_from={runs}/one"
    ranks_pass(main, 2, *argv, began)
    assert losses(tmp_path / "run")[0] < 0.9 * losses(runs / "one")[0]
    for wrong, says in (
        (f"--run.init_from={tmp_path}/none", "none: no such directory"),
        ("--vlm.freeze=[{ module = 'transformer' }]", "random weights would stay frozen"),
    ):
        fresh = [*argv, f"--run.dir={tmp_path}/wrong", *([] if "freeze" in wrong else [began]), wrong]
        for ended in run_ranks("from kempnerforge.cli.main import main; main()", 2, *fresh):
            assert ended.returncode == 2 and says in ended.stderr and "Traceback" not in ended.stderr, ended
    assert not (tmp_path / "wrong").exists()


def test_copies_that_do_not_come_out_even(runs: Path, tmp_path: Path):
    ended = two_ranks("train", runs / "job.toml", f"--run.dir={tmp_path}/odd", "--distributed.shard_size=3")
    assert ended.code == 2 and "distributed.shard_size = 3: must divide the number of processes, 2" in ended.err
    assert not (tmp_path / "odd").exists()
