"""``train.batch_size = "auto"``: what is chosen for how much memory, that it changes nothing but rounding, and that a run keeps it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from kempnerforge.config import load_config
from kempnerforge.config.files import read_toml
from kempnerforge.data.batching.collate import collate
from kempnerforge.data.batching.loader import heavy_rows, padded_length
from kempnerforge.inspection.cluster import Gpu, on_cluster
from kempnerforge.inspection.plan import plan
from kempnerforge.study.budget import _with_batches
from kempnerforge.study.run import is_finished
from kempnerforge.training.batch_size import SHARE, Chooser, memory_here
from kempnerforge.training.memory import Passes
from kempnerforge.training.run import train
from kempnerforge.training.setup import Assembly, assemble
from kempnerforge.util.errors import InputError
from kempnerforge.vlm.build import build_model
from tests.dist import ranks_pass, run_ranks
from tests.training.tiny import assert_same_tensors, call, losses, make_job, tensors

ROWS = 12
AUTO = ("--train.batch_size=auto", f"--train.rows_per_step={ROWS}", "--data.image_cache_mib=0", "--scheduler.name=constant")
NO_EVAL = ("--eval.at_end=false", "--eval.interval=0")
BYTES = "kempnerforge.training.batch_size.memory_here"
LARGE = 1 << 40


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("auto"))


def assembled(config: Path, *words: str) -> Assembly:
    return assemble(load_config(config, [*AUTO, *words]), device="meta")


def chooser(assembly: Assembly) -> Chooser:
    return Chooser(assembly, torch.float32, on_cpu=True)


def needed(assembly: Assembly, rows: int) -> int:
    """Bytes that micro-batches of ``rows`` need, with one process."""
    count = chooser(assembly)._counter(assembly.stages[0], 1, ROWS)
    return count.needed(rows, count.peak(rows))


def room_for(assembly: Assembly, rows: int) -> int:
    """Memory with which micro-batches of ``rows`` just fit, with one process."""
    return int(needed(assembly, rows) / SHARE["cpu"]) + 2


def cuts(assembly: Assembly, memory: int) -> int:
    """Micro-batches of a step with ``memory``, with one process."""
    return chooser(assembly).choose(assembly.stages[0], 1, memory).accumulated


def stub(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(BYTES, lambda device, ranks, weights: size)


# ---- what is chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "words"), [(1, ()), (2, ()), (1, ("--train.logits_at_once=5", "--model.vocab_size=20000", "--model.dim=8"))]
)
def test_the_largest_divisor_that_fits(config: Path, processes: int, words: tuple[str, ...]) -> None:
    """At limits around what each of them needs; with logits in pieces more rows take less than in proportion."""
    assembly = assembled(config, "--data.batching=pad", *words)
    divisors = [d for d in (12, 6, 4, 3, 2, 1) if ROWS // processes % d == 0]
    found = chooser(assembly)
    count = found._counter(assembly.stages[0], processes, ROWS // processes)
    needs, seen = {rows: count.needed(rows, count.peak(rows)) for rows in divisors}, set[int]()
    for memory in sorted(int(size / SHARE["cpu"]) + change for size in {*needs.values()} for change in (-2, 2)):
        choice = found.choose(assembly.stages[0], processes, memory)
        assert choice.rows == max((rows for rows in divisors if needs[rows] <= choice.room), default=0)
        seen.add(choice.rows)
        if choice.rows:
            assert choice.accumulated == ROWS // processes // choice.rows and choice.needed == needs[choice.rows]
            assert choice.too_much > choice.room if choice.too_many else choice.rows == divisors[0]
    assert len(seen) > len(divisors) / 2 and {0, divisors[0]} <= seen


def test_what_a_choice_says(config: Path) -> None:
    assembly = assembled(config)
    said = str(chooser(assembly).choose(assembly.stages[0], 1, room_for(assembly, 6) + 2))
    assert re.search(r"stage 'train': micro-batches of 6 rows \(12 a step = 1 x 2 x 6\); they need [\d.]+ MiB, 12 rows [\d.]+ MiB; ", said)
    none = chooser(assembly).choose(assembly.stages[0], 1, 1000)
    with pytest.raises(InputError, match=r"not even one row fits: a process needs [\d.]+ MiB, and 0.00 MiB of 0.00 MiB may be planned for"):
        none.require()


def test_the_longest_row_of_the_data_counts(tmp_path: Path) -> None:
    """One long text far behind, in data whose first batches are short."""
    config = make_job(tmp_path)
    short = chooser(assembled(config)).choose(assembled(config).stages[0], 1, LARGE).needed
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    row = json.loads(lines[-1])
    row["answer"] = "red green " * 3
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:-1], json.dumps(row)]) + "\n")
    assembly = assembled(config)
    assert chooser(assembly).choose(assembly.stages[0], 1, LARGE).needed > 1.2 * short


def test_at_every_size_the_row_that_takes_most_counts(tmp_path: Path) -> None:
    """Of one row the gradient of a large head is the peak, whichever row it is; of many, rows with many trained tokens take most."""
    config = make_job(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    texts = [("q", "".join(map(chr, range(40, 60)))), ("".join(map(chr, range(60, 96))), "a")]
    lines = [json.dumps({**row, "prompt": prompt, "answer": answer}) for row in rows[:8] for prompt, answer in texts]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    assembly = assembled(config, "--data.batching=pad", "--model.vocab_size=6000")
    stage, data = assembly.stages[0], assembly.data
    heavy = heavy_rows(data.sources[0], data.encoder(stage), stage.data, data.layouts[0], stage.train)
    found, names = chooser(assembly), assembly.freeze.trainable(0)
    pad_to = padded_length(stage.data, data.layouts[0])
    takes = lambda row, rows: found.passes.run(collate([row] * rows, data.tokenizer.pad_id, pad_to), names).peak
    each = [takes(row, 12) for row in heavy]
    assert len(each) > 1 and len({takes(row, 1) for row in heavy}) == 1 and max(each) > 1.4 * min(each)
    assert found._counter(stage, 1, ROWS).peak(12) == max(each)


@pytest.mark.parametrize("words", [(), ("--train.activation_checkpointing=true",), ("--data.batching=pack",), ("--data.batching=pad",)])
def test_bytes_are_those_of_a_pass_on_this_machine(config: Path, words: tuple[str, ...]) -> None:
    """Tensors of a real pass forward and backward; shapes on the meta device."""
    assembly = assembled(config, *words)
    batch = next(assembly.data.batches(assembly.stages[0], 0))
    names = assembly.freeze.trainable(0)
    passes = Passes(assembly.job, torch.float32, on_cpu=True)
    counted = passes.run(batch, names).peak
    passes.model = build_model(assembly.job, "cpu")
    for unit in passes.model.shard_units() if "activation" in str(words) else ():
        forward = unit.forward
        unit.forward = lambda *args, forward=forward, **kw: torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kw)
    real = passes.run(batch, names).peak
    assert counted == pytest.approx(real, rel=0.05)
    assert counted > 3 * batch.input_ids.numel() * 32 * 4


def test_checkpointing_and_fewer_rows_take_less(config: Path) -> None:
    deep = "--model.n_layers=12"
    needs = lambda *words: chooser(a := assembled(config, deep, *words)).choose(a.stages[0], 1, LARGE).needed
    assert needs("--train.activation_checkpointing=true") < 0.8 * needs()


def test_a_process_shares_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "kempnerforge.training.batch_size"
    cpu = torch.device("cpu")
    for name, size in (("memory_bytes", 1000), ("available_bytes", 900), ("resident_bytes", 100)):
        monkeypatch.setattr(f"{module}.{name}", lambda size=size: size)
    assert memory_here(cpu, 1, 40) == min(1000 - 60, 900 + 40) == 940
    assert memory_here(cpu, 2, 40) == min(500 - 60, 450 + 40) == 440
    monkeypatch.setattr(f"{module}.available_bytes", lambda: 300)
    assert memory_here(cpu, 1, 40) == 340


# ---- it changes nothing but rounding -------------------------------------------------------------


@pytest.mark.parametrize("batching", ["group", "pad", "pack"])
def test_a_step_has_the_same_samples_however_it_is_cut(config: Path, batching: str) -> None:
    def step(step: int, world: int, accum: int) -> list[str]:
        assembly = assemble(
            load_config(config, [f"--train.batch_size={ROWS}", f"--train.grad_accum_steps={accum}", f"--data.batching={batching}"]),
            device="meta",
        )
        ranks = [assembly.data.batches(assembly.stages[0], step, rank, world) for rank in range(world)]
        return [name for _ in range(accum) for batches in ranks for name in next(batches).sample_names]

    for number in range(3):
        whole = step(number, 1, 1)
        assert len(whole) >= ROWS
        for world, accum in ((1, 2), (1, 12), (2, 1), (2, 3), (2, 6)):
            assert step(number, world, accum) == whole


@pytest.mark.parametrize("batching", ["group", "pad", "pack"])
def test_two_machines_have_one_curve(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: str) -> None:
    words, curves = (*AUTO, *NO_EVAL, "--train.max_steps=4", f"--data.batching={batching}"), {}
    assembly = assembled(config, f"--data.batching={batching}")
    for rows in (12, 1):
        stub(monkeypatch, memory := room_for(assembly, rows))
        run_dir = tmp_path / str(rows)
        assert call("train", config, *words, f"--run.dir={run_dir}").code == 0
        accumulated = read_toml(run_dir / "config.toml")["train"]["grad_accum_steps"]
        assert accumulated == cuts(assembly, memory) and (accumulated == 1) == (rows == 12)
        curves[rows] = losses(run_dir)
    assert curves[1] == pytest.approx(curves[12], rel=1e-5) and len(curves[1]) == 4


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--vlm.arch=dual_encoder",), "compared within a micro-batch"),
        (("--vlm.arch=moma",), "auxiliary loss"),
        (("--model.dropout=0.1",), "draws random numbers"),
        (("--model.answer_dropout=0.1",), "draws random numbers"),
    ],
)
def test_a_model_that_sees_its_micro_batch_is_refused(config: Path, words: tuple[str, ...], why: str) -> None:
    assembly = assembled(config, *words)
    with pytest.raises(InputError, match=f'train.batch_size = "auto": what this model learns depends on the micro-batch: .*{why}'):
        chooser(assembly).choose(assembly.stages[0], 1, LARGE)


def test_rows_are_divided_among_processes(config: Path) -> None:
    assembly = assembled(config)
    with pytest.raises(InputError, match="train.rows_per_step = 12: must be a multiple of the number of processes, 5"):
        chooser(assembly).choose(assembly.stages[0], 5, LARGE)


# ---- it is remembered ----------------------------------------------------------------------------


def test_a_run_goes_on_as_it_began(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assembly = assembled(config)
    small, run_dir = room_for(assembly, 1), tmp_path / "run"
    accumulated = cuts(assembly, small)
    assert accumulated > 1
    words = (*AUTO, *NO_EVAL, f"--run.dir={run_dir}")
    stub(monkeypatch, small)
    assert call("train", config, *words, "--train.max_steps=6").code == 0
    straight = tensors(run_dir)
    shutil.rmtree(run_dir)
    numbers = (f"--train.batch_size={ROWS}", "--train.rows_per_step=0", f"--train.grad_accum_steps={accumulated}")
    assert call("train", config, *words, *numbers, "--train.max_steps=6").code == 0
    assert_same_tensors(tensors(run_dir), straight)
    shutil.rmtree(run_dir)
    assert call("train", config, *words, "--train.max_steps=3").code == 0
    before = read_toml(run_dir / "config.toml")["train"]
    assert (before["batch_size"], before["rows_per_step"], before["grad_accum_steps"]) == (12, 0, accumulated)
    for memory in (LARGE, 1):  # more of it, and too little for a single row
        stub(monkeypatch, memory)
        copy = tmp_path / str(memory)
        shutil.copytree(run_dir, copy)
        ended = call("train", config, *words, "--train.max_steps=6", f"--run.dir={copy}")
        assert ended.code == 0, ended
        assert read_toml(copy / "config.toml")["train"]["grad_accum_steps"] == accumulated
        assert_same_tensors(tensors(copy), straight)
        caplog.set_level("INFO")
        assert call("train", config, *words, "--train.max_steps=6", f"--run.dir={copy}").code == 0
        assert "complete, 6 steps" in caplog.text
    refused = call("train", config, *words, "--train.max_steps=6", "--train.rows_per_step=24")
    assert refused.code == 2 and "train.batch_size: 12 -> 'auto'" in refused.err and "train.rows_per_step: 0 -> 24" in refused.err


def test_a_finished_cell_of_a_study_stays_finished(config: Path, tmp_path: Path) -> None:
    job = load_config(config, [*AUTO, *NO_EVAL, f"--run.dir={tmp_path / 'run'}", "--train.max_steps=2"])
    assert train(job)
    cell = lambda job: cast(Any, SimpleNamespace(dir=tmp_path / "run", job=job))
    assert is_finished(cell(job))
    assert not is_finished(cell(load_config(config, [*AUTO, *NO_EVAL, "--train.rows_per_step=24", "--train.max_steps=2"])))


def test_a_study_scales_the_rows_of_a_step(config: Path) -> None:
    staged = config.read_text() + STAGES
    (config.parent / "staged.toml").write_text(staged)
    made = _with_batches(load_config(config.parent / "staged.toml", AUTO), 2.0, 2)
    assert [stage.train.step_rows for stage in made.resolved_stages()] == [24, 12, 8]
    assert [stage.train.batch_size for stage in made.resolved_stages()] == ["auto", "auto", 8]


STAGES = """
[[stages]]
name = "whole"
steps = 2
[[stages]]
name = "own"
steps = 2
train.rows_per_step = 6
[[stages]]
name = "numbers"
steps = 2
train = {batch_size = 4, grad_accum_steps = 2}
"""


def test_stages_have_choices_of_their_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stage that ``train.max_steps`` cuts off is chosen for when it comes to be trained."""
    staged = tmp_path / "staged.toml"
    staged.write_text(config.read_text() + STAGES)
    stub(monkeypatch, room_for(assembled(config), 4))
    words = (*AUTO, *NO_EVAL, f"--run.dir={tmp_path / 'run'}")
    numbers = lambda: [stage["train"] for stage in read_toml(tmp_path / "run" / "config.toml")["stages"]]
    assert call("train", staged, *words, "--train.max_steps=2").code == 0
    assert numbers()[:2] == [{"batch_size": 12, "grad_accum_steps": 3}, {"batch_size": "auto", "rows_per_step": 6}]
    stub(monkeypatch, LARGE)
    caplog.clear()
    caplog.set_level("INFO")
    ended = call("train", staged, *words, "--train.max_steps=0")
    assert ended.code == 0, ended
    assert "stage 'own': micro-batches of 6 rows" in caplog.text and "stage 'whole'" not in caplog.text
    assert numbers() == [
        {"batch_size": 12, "grad_accum_steps": 3},
        {"batch_size": 6, "grad_accum_steps": 1},
        {"batch_size": 4, "grad_accum_steps": 2},
    ]
    assert len(losses(tmp_path / "run")) == 6


# ---- several processes ---------------------------------------------------------------------------

RANKS = """
import sys
from kempnerforge.training import batch_size
sizes = [int(word) for word in sys.argv[1].split(",")]
import os
batch_size.memory_here = lambda device, ranks, weights: sizes[int(os.environ["RANK"])] if ranks == len(sizes) else 0
sys.argv = sys.argv[1:]
from kempnerforge.cli.main import main
main()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_agree_and_follow_one_process(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two ranks, one of them with little memory; then the same run is continued by one process."""
    assembly = assembled(config)
    found = chooser(assembly)
    small = next(size for size in range(2**20, LARGE, 2**16) if found.choose(assembly.stages[0], 2, size).rows == 3)
    words = (*AUTO, *NO_EVAL, "--train.grad_clip_norm=0")
    ranks_pass(RANKS, 2, f"{LARGE},{small}", "train", config, *words, "--train.max_steps=4", f"--run.dir={tmp_path / 'two'}")
    assert read_toml(tmp_path / "two" / "config.toml")["train"]["grad_accum_steps"] == 2
    stub(monkeypatch, LARGE)
    assert call("train", config, *words, "--train.max_steps=4", f"--run.dir={tmp_path / 'one'}").code == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    stub(monkeypatch, room_for(assembly, 4))
    caplog.set_level("INFO")
    ended = call("train", config, *words, "--train.max_steps=5", f"--run.dir={tmp_path / 'two'}")
    assert ended.code == 0 and "micro-batches of 4 rows (12 a step = 1 x 3 x 4)" in caplog.text, ended
    first, second = run_ranks(RANKS, 2, f"{LARGE},1", "train", config, *words, f"--run.dir={tmp_path / 'none'}")
    assert (first.returncode, second.returncode) == (2, 2) and "not even one row fits" in first.stderr + second.stderr
    assert not (tmp_path / "none").exists()


# ---- commands ------------------------------------------------------------------------------------


def test_check_prints_the_choice(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, room_for(assembled(config, "--train.mixed_precision=fp32"), 6))
    ended = call("check", config, *AUTO)
    assert ended.code == 0 and "micro-batches of 6 rows (12 a step = 1 x 2 x 6)" in ended.out
    (stage,) = json.loads(call("check", config, *AUTO, "--json").out)["stages"]
    assert (stage["auto"]["rows"], stage["auto"]["step_rows"]) == (6, 12)
    (fixed,) = json.loads(call("check", config, "--json").out)["stages"]
    assert fixed["auto"] is None
    stub(monkeypatch, 1)
    none = call("check", config, *AUTO, "--gpus", "2")
    assert none.code == 0 and "warning: train.batch_size" in none.err and "not even one row fits" in none.err
    assert "micro-batches of 6 rows" in none.out  # on 2 x h200
    dry = call("train", config, *AUTO, "--dry-run")
    assert dry.code == 2 and "not even one row fits" in dry.err
    stub(monkeypatch, LARGE)
    assert "first batch 12 x" in call("train", config, *AUTO, "--dry-run").err


def test_a_cluster_has_a_choice_of_its_own(config: Path) -> None:
    found = plan(load_config(config, AUTO))
    (roomy,) = on_cluster(found, 2, Gpu(1e12, 1e12, 1e12, 1e12))
    assert roomy.rows == 6 and roomy.memory["unsharded gradients"] == 0
    tight = Gpu(float(roomy.total) / SHARE["cuda"], 1e12, 1e12, 1e12)
    (cut,) = on_cluster(found, 2, tight)
    assert cut.rows < 6 and cut.memory["activations"] < roomy.memory["activations"]
    assert cut.memory["activations"] / cut.rows == pytest.approx(roomy.memory["activations"] / roomy.rows, abs=1)
