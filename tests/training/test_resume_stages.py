"""Four stages that change everything a stage may change: stopped and continued at every step, and on other numbers of ranks."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kempnerforge.checkpoint.state import MODEL
from kempnerforge.checkpoint.store import find
from kempnerforge.config import CheckpointConfig, load_config
from kempnerforge.distributed.world import World
from kempnerforge.training.hooks.checkpoints import Checkpoints
from kempnerforge.training.run_state import SavedRun
from kempnerforge.training.setup import assemble
from kempnerforge.training.tokenizer import saved_tokenizer
from kempnerforge.training.trainer import StepResult, Trainer
from tests.dist import run_ranks
from tests.distributed.workers import in_world
from tests.params import quick
from tests.training.tiny import (
    assert_same_tensors,
    call,
    checkpoint_steps,
    losses,
    make_job,
    metrics,
    rows_of,
    tensors,
    two_ranks,
    write_rows,
)

STEPS = 11
STAGES = """
[[stages]]
name = "align"
steps = 2
data.path = "{folder}/captions.jsonl"
data.prompt_column = ""
optimizer.lr = 4e-3
scheduler.name = "constant"
freeze = [{ module = "*" }, { module = "adapter", frozen = false }]

[[stages]]
name = "read"
steps = 3
train.batch_size = 2
data.batching = "pad"
optimizer.lr = 1e-3
optimizer.moments = "reset"
scheduler.name = "wsd"
scheduler.warmup_steps = 2
freeze = [{ module = "vision_encoder" }]

[[stages]]
name = "look"
steps = 3
train.batch_size = 8
optimizer.lr_scale = { vision_encoder = 0.3, "*.mlp.*" = 0.5 }
scheduler.name = "linear"
freeze = [{ module = "transformer" }, { module = "transformer.layers.1.*", frozen = false }]

[[stages]]
name = "all"
steps = 3
data.path = "{folder}/captions.jsonl"
data.prompt_template = "{prompt}"
optimizer.lr = 5e-4
optimizer.betas = [0.9, 0.99]
optimizer.moments = "reset"
scheduler.warmup_steps = 1
freeze = []
"""
LAST = [2, 5, 8, 11]
"""The steps after which stages are over."""
LOADED = [1, 2, 4, 5, 7, 8, 11]
EVERY_STEP = ("--checkpoint.interval=1", "--checkpoint.keep_last_n=20")


def four_stages(folder: Path) -> Path:
    job = make_job(folder, extra=STAGES.replace("{folder}", str(folder)))
    write_rows(folder / "captions.jsonl", [row | {"answer": row["answer"] * (1 + k % 3)} for k, row in enumerate(rows_of(folder))])
    return job


def training_lines(run: Path) -> list[dict[str, float]]:
    return [row for row in metrics(run) if "train/loss" in row]


# ---- stopped at every step ---------------------------------------------------------------------------------------------

DROPOUT = ("--train.max_steps=0", "--model.dropout=0.2", "--model.answer_dropout=0.1", "--eval.interval=2", "--metrics.interval=1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("stages")
    ended = call("train", four_stages(folder), *DROPOUT, *EVERY_STEP)
    assert ended.code == 0, ended
    assert [row["train/stage"] for row in training_lines(folder / "run")] == [0.0] * 2 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    return folder


@pytest.mark.parametrize("cut", quick(range(1, STEPS), 2, 3, 8))
def test_cut_at_every_step(cut: int, whole: Path) -> None:
    """Weights, optimizer state and logged numbers are those of the run that was not cut, at the end and at every step after the cut."""
    run = whole / f"cut-{cut}"
    argv = ("train", whole / "job.toml", *DROPOUT, f"--checkpoint.interval={cut + 1}", "--checkpoint.keep_last_n=20", f"--run.dir={run}")
    assert call(*argv, f"--train.max_steps={cut}", "--eval.at_end=false").code == 0
    assert checkpoint_steps(run)[-1] == cut and len(losses(run)) == cut
    manifest = run / f"checkpoints/step-{cut:08d}/manifest.json"
    saved = manifest.stat().st_mtime_ns
    ended = call(*argv)
    assert ended.code == 0 and manifest.stat().st_mtime_ns == saved, ended  # it did not start over
    assert metrics(run) == metrics(whole / "run")
    for step in {cut, min(cut + 1, STEPS), STEPS}:
        name = f"checkpoints/step-{step:08d}"
        assert_same_tensors(tensors(run / name), tensors(whole / "run" / name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        ("--train.mixed_precision=bf16", "--train.ema_decay=0.9"),
        pytest.param(("--optimizer.name=muon", "--train.activation_checkpointing=true"), marks=pytest.mark.slow),
        pytest.param(("--optimizer.name=schedule_free_adamw",), marks=pytest.mark.slow),
        pytest.param(("--optimizer.name=lion", "--train.ema_decay=0.9"), marks=pytest.mark.slow),
    ],
    ids=["bf16-ema", "muon", "schedule-free", "lion-ema"],
)
def test_interrupted_after_every_single_step(how: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in each step of one run: it is started twelve times and ends where it would have anyway."""
    argv = ("train", four_stages(tmp_path), *DROPOUT, "--checkpoint.interval=4", *how)
    assert call(*argv, f"--run.dir={tmp_path}/reference").code == 0
    with monkeypatch.context() as patch:
        step = Trainer.train_step

        def interrupted(self: Trainer) -> StepResult:
            os.kill(os.getpid(), signal.SIGTERM)
            return step(self)

        patch.setattr(Trainer, "train_step", interrupted)
        for done in range(1, STEPS):
            assert call(*argv).code == 130
            assert checkpoint_steps(tmp_path / "run")[-1] == done
    assert call(*argv).code == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "reference")
    assert_same_tensors(tensors(tmp_path / "run"), tensors(tmp_path / "reference"))


def test_moments_are_dropped_where_they_should_be(whole: Path) -> None:
    """Step counters of the optimizer, by step of the run: they begin again in stages 2 and 4; what is frozen waits."""

    def counter(step: int, name: str) -> float:
        found = tensors(whole / "run" / f"checkpoints/step-{step:08d}")
        return float(found.get(f"optim.{name}|step", torch.tensor(-1.0)))

    counted = {
        name: [counter(step, name) for step in (*LAST[:1], 3, *LAST[1:])]
        for name in ("adapter.proj.weight", "vision_encoder.layers.0.mlp.fc1.weight", "transformer.layers.0.mlp.up_proj.weight")
    }
    assert counted == {
        "adapter.proj.weight": [2, 1, 3, 6, 3],
        "vision_encoder.layers.0.mlp.fc1.weight": [-1, -1, -1, 3, 3],
        "transformer.layers.0.mlp.up_proj.weight": [-1, 1, 3, 3, 3],
    }


# ---- other numbers of ranks --------------------------------------------------------------------------------------------

EXACT = ("--train.max_steps=0", "--train.grad_clip_norm=0", "--eval.at_end=false", "--metrics.interval=1")
"""No dropout, whose masks depend on the rank; no clipping, as the norm is a sum over shards."""


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by one process, without (``one``) and with (``micro``) accumulation."""
    folder = tmp_path_factory.mktemp("ranks")
    job = four_stages(folder)
    for name, accumulation in (("one", 1), ("micro", 2)):
        ended = call("train", job, *EXACT, *EVERY_STEP, f"--train.grad_accum_steps={accumulation}", f"--run.dir={folder}/{name}")
        assert ended.code == 0, ended
    return folder


def one_two_one(folder: Path, name: str, accumulation: int, more: tuple[str, ...] = ()) -> Path:
    """A run whose first four steps are done by one process, the next four by two ranks, the rest by one again."""
    argv = ("train", folder / "job.toml", *EXACT, *EVERY_STEP, *more, f"--run.dir={folder}/{name}")
    alone = f"--train.grad_accum_steps={accumulation}"
    for start, extra in ((call, (alone, "--train.max_steps=4")), (two_ranks, ("--train.max_steps=8",)), (call, (alone,))):
        ended = start(*argv, *extra)
        assert ended.code == 0, ended
    return folder / name


@pytest.mark.slow
@pytest.mark.dist
def test_one_two_one_with_the_same_micro_batches(changing: Path) -> None:
    """Accumulation 2 on one rank, 1 on two: bitwise the same at every step."""
    run = one_two_one(changing, "1-2-1", 2)
    for step in range(1, STEPS + 1):
        name = f"checkpoints/step-{step:08d}"
        assert_same_tensors(tensors(run / name), tensors(changing / "micro" / name))
    assert losses(run) == pytest.approx(losses(changing / "micro"), rel=1e-6)  # logged sums are in another order


@pytest.mark.dist
@pytest.mark.slow
def test_one_two_one_in_bf16(changing: Path) -> None:
    argv = ("train", changing / "job.toml", *EXACT, "--train.mixed_precision=bf16")
    assert call(*argv, "--train.grad_accum_steps=2", f"--run.dir={changing}/micro-bf16").code == 0
    run = one_two_one(changing, "1-2-1-bf16", 2, ("--train.mixed_precision=bf16",))
    assert_same_tensors(tensors(run), tensors(changing / "micro-bf16"))


@pytest.mark.slow
@pytest.mark.dist
def test_one_two_one_with_another_split(changing: Path, record_property: Callable[[str, object], None]) -> None:
    """Other sums: what is left is rounding. AdamW divides it by the size of a gradient, so weights differ by more than losses do."""
    run, reference = one_two_one(changing, "split", 1), changing / "one"
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses(run), losses(reference), strict=True))
    mine, theirs = tensors(run), tensors(reference)
    assert mine.keys() == theirs.keys()
    weight = max(float((mine[name] - theirs[name]).abs().max()) for name in mine if name.startswith(MODEL))
    record_property("largest relative difference of a loss", loss)
    record_property("largest difference of a weight", weight)
    print(f"another split: losses differ by {loss:.1e} relative at most, weights by {weight:.1e}")
    assert 0 < loss < 1e-5
    four = "checkpoints/step-00000004"
    assert_same_tensors(tensors(run / four), tensors(reference / four))


def load_and_save(config: str, run: str, out: str) -> None:
    """On any number of ranks: the checkpoints of ``run`` at ``LOADED`` into a new trainer, what trains then is set, and from there into ``out``."""
    in_world(lambda world: pass_on(Path(config), Path(run), Path(out), world))


def pass_on(config: Path, run: Path, out: Path, world: World) -> None:
    job = load_config(config, EXACT)
    (out / "tokenizer").mkdir(parents=True, exist_ok=True)
    for step in LOADED:
        alone = out / "alone" / "checkpoints"  # so that the newest one is the one wanted
        if world.is_main:
            shutil.rmtree(alone, ignore_errors=True)
            alone.mkdir(parents=True)
            shutil.copytree(run / f"checkpoints/step-{step:08d}", alone / f"step-{step:08d}")
        world.barrier()
        found = find(alone)
        assert found is not None
        trainer = Trainer(assemble(job, saved_tokenizer(found[0])), world, [])
        Checkpoints(job.checkpoint, run).restore(trainer, SavedRun.of(*found))
        assert trainer.step == step
        trainer.apply_freeze()
        saver = Checkpoints(CheckpointConfig(interval=1, keep_last_n=99), out)
        saver.start(trainer)
        saver.step(trainer, SimpleNamespace(skipped=False))
        world.barrier()


@pytest.mark.slow
@pytest.mark.dist
def test_what_is_loaded_is_what_was_saved(changing: Path, world: World) -> None:
    """Bitwise, within every stage and between them: from one process to two ranks, and from them to one process."""
    ranks, again = changing / "loaded-by-two", changing / "loaded-by-one"
    results = run_ranks("tests.training.test_resume_stages:load_and_save", 2, changing / "job.toml", changing / "one", ranks)
    assert [r.returncode for r in results] == [0, 0], "".join(r.stderr[-3000:] for r in results)
    pass_on(changing / "job.toml", ranks, again, world)
    for step in LOADED:
        saved = tensors(changing / "one" / f"checkpoints/step-{step:08d}")
        for folder in (ranks, again):
            assert_same_tensors(tensors(folder / f"checkpoints/step-{step:08d}"), saved)
